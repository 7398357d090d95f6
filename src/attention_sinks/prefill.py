"""`sink_prefill`: a text of any length through a `SinkCache`, in chunks, each token with exactly its own window."""

import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import CausalLMOutputWithPast

from .architecture.settings import check_config, config_state
from .architecture.spec import check_int
from .cache import SinkCache
from .compat import DriftError, checkpointing_drops_cache, chosen_cache, with_cache
from .grids import rope_index_of
from .inputs import check_model_arguments, check_token_ids, check_vocabulary, kind_of
from .models import unwrapped, view_of
from .prompt import GenerationSettings, check_no_pad_ids
from .storage.plan import WindowedPlan

# The default chunk. Wider ones use the hardware better (docs/benchmarks.md), but each query brings a copy of the sinks.
# There should be no more copies than this part of a window.
SMALLEST_CHUNK, LARGEST_CHUNK = 16, 128
SINK_COPIES_PER_WINDOW = 0.25


def sink_prefill(
    model: PreTrainedModel,
    input_ids: Tensor,
    cache: SinkCache | None = None,
    chunk_size: int | None = None,
    *,
    past_key_values: SinkCache | None = None,
    **model_kwargs: Any,
) -> Iterator[CausalLMOutputWithPast]:
    """Read a text of any length through a cache, in chunks: the outputs are those of feeding it token by token.

    Each token of a chunk sees exactly its own window. Memory is that of `window_length + chunk_size` tokens, and for
    one layer at a time of the sinks once for each token of the chunk.

    Args:
        model: a causal language model whose attention is `eager`, `sdpa` or `flex_attention`.
        input_ids: the new tokens, `[batch_size, length]`; the pads of a padded batch are known to the cache.
        cache: a `SinkCache`, new or with earlier text.
        chunk_size: how many tokens the model reads at once, at most (fewer where positions end soon after the window);
            by default 16 to 128, depending on the window and the number of sinks, or 1 for a model whose masks cannot
            be replaced.
        past_key_values: `cache` by its name in earlier versions of `transformers`; give one of the two.
        model_kwargs: more arguments of the model, `logits_to_keep=1` for instance.

    Yields:
        The model's output for each chunk, with `logits` `[batch_size, tokens in the chunk, vocab_size]`.

    Raises:
        TypeError, ValueError: naming the argument and its value.
        NotImplementedError: for a model whose masks cannot be replaced, unless `chunk_size` is 1.
        RuntimeError: if the installed `transformers` does not do what this function relies on.

    Example:
        >>> cache = SinkCache(model.config, window_length=1024)
        >>> logits = [output.logits for output in sink_prefill(model, input_ids, cache)]
    """
    inner, chosen = unwrapped(model), chosen_cache(cache, past_key_values)
    if not isinstance(chosen, SinkCache):
        raise TypeError(f"`cache` must be a SinkCache, got {kind_of(chosen)}.")
    check_token_ids("input_ids", input_ids, inner, may_be_empty=True)
    check_vocabulary("input_ids", input_ids, inner)
    check_model_arguments(model_kwargs, input_ids)
    if chosen.get_seq_length() == 0 and chosen.token_positions.known_length(len(input_ids)) == 0:
        remedy = "If they are text, give it a mask of ones."
        demand = "`cache` must be told of padding, `SinkCache(config, attention_mask=mask)`"
        check_no_pad_ids(input_ids, GenerationSettings(inner, {}), demand, remedy, texts_may_end=True)
    if chunk_size is None:
        chunk_size = default_chunk_size(inner, chosen)
    check_int("chunk_size", chunk_size, at_least=1)
    check_readable(inner, chosen, "chunk_size", chunk_size, len(input_ids))
    return read_in_chunks(model, input_ids, chosen, chunk_size, model_kwargs)


@torch.no_grad()
def read_in_chunks(
    model: Any, input_ids: Tensor, cache: SinkCache, chunk_size: int, model_kwargs: dict[str, Any]
) -> Iterator[CausalLMOutputWithPast]:
    """Read a text that was checked, see `sink_prefill`."""
    model = view_of(model)
    if cache.can_rebase:
        # Once positions are rebased, the window and a chunk must fit below their end.
        chunk_size = min(chunk_size, cache.position_limit - cache.window_length)
    asks_mask, first, windowed = asks_for_masks(model), first_position(model), can_window(model, cache)
    while input_ids.shape[1] > 0:
        cache.make_room(min(chunk_size, input_ids.shape[1]))
        # After a crop single tokens fill the window again.
        is_full = cache.kept_length == min(cache.get_seq_length(), cache.window_length)
        chunk, input_ids = input_ids.tensor_split([chunk_size if is_full else 1], dim=1)
        has_own_mask = windowed and (chunk.shape[1] > 1 or cache.token_positions.num_rows > 0)
        yield run_pass(model, chunk, cache, asks_mask, first, has_own_mask, model_kwargs)


def run_pass(
    model: Any,
    input_ids: Tensor,
    cache: SinkCache,
    asks_mask: bool,
    first: int,
    windowed: bool,
    model_kwargs: dict[str, Any],
) -> Any:
    """Return the output of a model for its next tokens `[batch_size, query_length]`, with positions from the cache.

    Args:
        model: a view of the model, see `view_of`.
        input_ids, cache, model_kwargs: see `sink_prefill`.
        asks_mask: True if the model asks the cache for the sizes of a mask that it makes itself.
        first: the position of the first token of a text, see `first_position`.
        windowed: let each token see exactly its own window.
    """
    if model.device.type != "meta":  # offloaded weights are on no device; accelerate moves inputs to where they are
        input_ids = input_ids.to(model.device)
    seen, query_length = cache.get_seq_length(), input_ids.shape[1]
    positions = cache.token_positions
    arguments = {**model_kwargs, **with_cache(model.forward, cache), "use_cache": True}
    if takes_positions(model):
        text = cache.text_positions(input_ids)
        has_grids = rope_index_of(model) is not None
        arguments["position_ids"] = text.expand(3, -1, -1) if has_grids else text + first
    elif positions.offset > 0:
        raise DriftError("the model takes no `position_ids`, by which positions are lowered")
    with cache.watch.watching(), cache.announced(query_length, windowed) as plan:
        cache.watch.announce(query_length, asks_mask and not windowed)
        mask = None
        if isinstance(plan, WindowedPlan):
            mask = _windowed_mask(model, plan, input_ids)
        elif cache.holds_padding():
            mask = positions.mask(0, input_ids.new_empty(input_ids.shape[0], seen + query_length))
        output = model(input_ids=input_ids, attention_mask=mask, **arguments)
    if cache.get_seq_length() != seen + query_length:
        raise DriftError(f"the cache counts {cache.get_seq_length()} tokens where {seen + query_length} were read")
    return output


def _windowed_mask(model: PreTrainedModel, plan: WindowedPlan, chunk: Tensor) -> Any:
    """Return the mask of a chunk `[batch_size, query_length]`, in the form that the model's attention takes."""
    return ALL_MASK_ATTENTION_FUNCTIONS[attention_of(model)](
        batch_size=chunk.shape[0],
        q_length=plan.query_length,
        kv_length=plan.kv_length,
        q_offset=0,
        kv_offset=0,
        mask_function=plan.visible(chunk.device),
        attention_mask=None,
        allow_is_causal_skip=False,
        dtype=model.dtype,
        config=model.config,
        use_vmap=False,
        device=chunk.device,
    )


def check_model(model: PreTrainedModel, cache: SinkCache) -> None:
    """Check that a cache belongs to a model, which must keep it.

    Raises:
        ValueError: naming the setting that differs, the frequencies that were rounded, or an attention without masks.
    """
    if checkpointing_drops_cache(model):
        raise ValueError(
            "`model` must not checkpoint activations here: in training mode its layers would then drop the cache. Call "
            "`model.eval()`, or `model.gradient_checkpointing_disable()`."
        )
    attention = attention_of(model)
    if attention.startswith("paged|"):
        raise ValueError(
            f"`model` must have an attention that gets masks, got {attention!r}, which is for `generate_batch` alone. "
            f"Call `model.set_attn_implementation({attention.removeprefix('paged|')!r})`."
        )
    config = model.config.get_text_config(decoder=True)
    if config is not cache.config:
        check_config(config_state(cache.config), config, "`cache` must be made with the config of `model`")
    # `model.to(torch.bfloat16)` rounds the rotary frequencies with the weights; the cache rotates by the exact ones.
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and buffer.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"`model` has rotary frequencies rounded to {buffer.dtype} ({name}), so that positions drift apart. "
                f"Load it with `from_pretrained(..., dtype={buffer.dtype})` instead of converting it afterwards."
            )


def check_readable(model: PreTrainedModel, cache: SinkCache, name: str, chunk_size: int, num_rows: int) -> None:
    """Check that a model can read a text of `num_rows` rows through a cache, in chunks; `name` is that of their size.

    Raises:
        ValueError, NotImplementedError: naming the argument and what to do instead.
    """
    check_model(model, cache)
    if any(getattr(layer, "record_past", False) for layer in cache.layers):
        raise ValueError(
            "`cache` must not record what it evicts while a text is read in chunks. Call "
            "`cache.deactivate_past_recording()` before; a `crop` reaches back to that point."
        )
    num_padded = cache.token_positions.num_rows
    if num_padded not in (0, num_rows):
        raise ValueError(
            f"`input_ids` must have a row for each of the {num_padded} rows whose padding the cache knows, got "
            f"{num_rows}."
        )
    if chunk_size > 1 and not can_window(model, cache):
        raise NotImplementedError(
            f"`{name}` must be 1 for this {model.config.model_type!r} model with {attention_of(model)!r} "
            f"attention, got {chunk_size}: its masks cannot be replaced by one that shows each token its own window."
        )
    if num_padded > 0 and any(hasattr(layer, "conv_states") for layer in cache.layers):
        raise NotImplementedError(
            f"`{name}` must be left out for a padded batch: this {model.config.model_type!r} model tells "
            "pads from tokens in its first chunk only. Read the rows one by one."
        )


def default_chunk_size(model: PreTrainedModel, cache: SinkCache) -> int:
    """Return how many tokens at once a model reads with a window for each, by default.

    It follows from `window_length` and `num_sink_tokens`: 16 to 128 tokens, or 1 for a model whose masks cannot be
    replaced.
    """
    if not can_window(model, cache):
        return 1
    wanted = int(SINK_COPIES_PER_WINDOW * cache.window_length / max(cache.num_sink_tokens, 1))
    return min(max(wanted, SMALLEST_CHUNK), LARGEST_CHUNK)


def can_window(model: PreTrainedModel, cache: SinkCache) -> bool:
    """Return True if a model can read a chunk with a window for each of its tokens."""
    return cache.supports_windowed_chunks and attention_of(model) in ("eager", "sdpa", "flex_attention")


def attention_of(model: PreTrainedModel) -> str:
    """Return the name of the attention implementation of a model."""
    name: str = model.config.get_text_config(decoder=True)._attn_implementation
    return name


def asks_for_masks(model: PreTrainedModel) -> bool:
    """Return True if the model leaves its masks to `transformers`, which asks the cache for their sizes."""
    modules = {type(module).__module__ for module in model.modules()}
    return attention_of(model) in ALL_MASK_ATTENTION_FUNCTIONS and any(
        hasattr(sys.modules[name], "create_causal_mask") for name in modules
    )


def takes_positions(model: PreTrainedModel) -> bool:
    """Return True if a model takes `position_ids`."""
    return "position_ids" in inspect.signature(model.forward).parameters


def first_position(model: Any) -> int:
    """Return the position that a model gives the first token under `generate`: PaliGemma counts from 1."""
    zero = torch.zeros(1, 1, dtype=torch.long)
    try:
        inputs = model.prepare_inputs_for_generation(zero, attention_mask=zero + 1, position_ids=zero)
        return int(inputs["position_ids"].max())
    except Exception:  # it needs more than text, or gives no positions
        return 0


def last_logits_only(model: PreTrainedModel) -> dict[str, Any]:
    """Return the argument that lets a model compute no logits but those of the last token."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
