"""`sink_generate`: `model.generate` with a `SinkCache`; `sink_prefill`: a text of any length through one, in chunks."""

import contextlib
import functools
import inspect
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.generation.utils import GenerateOutput
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache import DEFAULT_NUM_SINK_TOKENS, DEFAULT_WINDOW_LENGTH, SinkCache
from .compat import CACHE_NAMES, CheckedStreamer, DriftError, cache_name, chosen_cache, with_cache

# Wider chunks are somewhat faster (docs/benchmarks.md), and take memory for sinks that are repeated for every token.
DEFAULT_CHUNK_SIZE = 64
# Models compute angles in float32, which rounds them by up to 2^-24 of themselves: by more and more along a stream.
# At this position it changes the logits of SmolLM2-135M by 2e-4 of their scale, at 2^20 by 8e-3 (docs/reliability.md).
_ACCURATE_POSITIONS = 2**15
# The arguments of `generate` that ask for assisted decoding.
ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
_NOT_TEXT = r"pixel_values|_grid_thw|input_features"


def sink_generate(
    model: PreTrainedModel,
    inputs: Tensor | None = None,
    *,
    window_length: int = DEFAULT_WINDOW_LENGTH,
    num_sink_tokens: int = DEFAULT_NUM_SINK_TOKENS,
    cache: SinkCache | None = None,
    past_key_values: SinkCache | None = None,
    prefill_chunk_size: int | None = None,
    **generate_kwargs: Any,
) -> GenerateOutput | torch.LongTensor:
    """Generate text of any length in constant memory: `model.generate` with a `SinkCache`.

    Rows may be padded on the left. Where the positions of a model end or its behaviour changes, they are wound back.

    Args:
        model: a causal language model.
        inputs: the prompt, as `generate` takes it; `input_ids=` or `**tokenizer(...)` do as well.
        window_length: the most tokens a layer of the cache holds, sinks included.
        num_sink_tokens: how many of the first tokens are never evicted.
        cache: the `SinkCache` of an earlier call, to continue it; it keeps its own window. The prompt is the whole text
            so far, or only what is new. As `generate` has it, more tokens than were seen are the whole text, unless
            `attention_mask` covers both what was seen and these.
        past_key_values: the same by its name in earlier versions of `transformers`; give one of the two.
        prefill_chunk_size: read the prompt in chunks of so many tokens, each token with exactly its own window, as if
            the prompt were fed token by token, in memory for `window_length + prefill_chunk_size` tokens. A prompt
            longer than the model's `max_position_embeddings` is read so by default, a shorter one at once and with
            full attention.
        generate_kwargs: anything else that `model.generate` takes.

    Returns:
        What `model.generate` returns; with `return_dict_in_generate=True` it holds the cache, as `cache` from
        `transformers` 5.24 on and as `past_key_values`.

    Raises:
        TypeError, ValueError: naming the argument and its value, before anything is generated.
        NotImplementedError: naming the model type and the reason, for a model that cannot be supported exactly.
        RuntimeError: if the installed `transformers` does not do what this function relies on, before a token is
            returned.
    """
    if not isinstance(model, GenerationMixin):
        raise TypeError(f"`model` must be a transformers model that can generate, got {model.__class__.__name__}.")
    continued = chosen_cache(cache, past_key_values)
    if not isinstance(continued, SinkCache | None):
        raise TypeError(
            f"`cache` must be a SinkCache, got {continued.__class__.__name__}. Leave it out to start a new stream, or "
            "call `model.generate` for other caches."
        )
    if generate_kwargs.setdefault("use_cache", True) is not True:
        raise ValueError(
            f"`use_cache` must be True, got {generate_kwargs['use_cache']!r}: the window is a property of the cache."
        )
    if generate_kwargs.get("cache_implementation") is not None:
        raise ValueError(
            f"`cache_implementation` must be left out, got {generate_kwargs['cache_implementation']!r}: the cache is a "
            "SinkCache."
        )
    if prefill_chunk_size is not None:
        _check_chunk_size(prefill_chunk_size)
    seen = [name for name, value in generate_kwargs.items() if value is not None and re.search(_NOT_TEXT, name)]
    if seen and "mrope_section" in str(model.config.to_dict()):
        raise NotImplementedError(
            f"`{seen[0]}` is not supported: this {model.config.model_type!r} model gives images positions in several "
            "dimensions (M-RoPE), so that tokens cannot be counted as positions any more. Text alone is exact."
        )
    embedded = generate_kwargs.get("inputs_embeds") is not None
    if embedded and prefill_chunk_size is not None:
        raise ValueError(f"`prefill_chunk_size` needs `input_ids`, got {prefill_chunk_size} with `inputs_embeds`.")
    _check_frequencies(model)
    settings = Settings(model, generate_kwargs)
    positioned = generate_kwargs.get("position_ids") is not None
    started = continued is not None and continued.get_seq_length() > 0
    input_ids, attention_mask = _prompt_of(inputs, generate_kwargs, None if started else settings)
    if continued is None:
        cache = SinkCache(model.config, window_length, num_sink_tokens, attention_mask=attention_mask)
    else:
        cache = continued
        _check_continued(cache, window_length, num_sink_tokens)
        if not started and attention_mask is not None:
            cache.announce_padding(attention_mask)
        cache.deactivate_past_recording()
    # The model's own settings may ask for another cache, or for chunks that show each token more than its window.
    generate_kwargs.update(cache_implementation=None, prefill_chunk_size=None)
    if attention_mask is not None:
        generate_kwargs["attention_mask"] = attention_mask

    absent = None
    if input_ids is not None and not embedded:
        absent, attention_mask = _unread(cache, input_ids, attention_mask)
        generate_kwargs["attention_mask"] = attention_mask
        assisted = next((name for name in ASSISTED if settings[name] is not None), None)
        if absent > 0 and assisted is not None and not hasattr(Cache, "activate_past_recording"):
            raise NotImplementedError(
                f"`{assisted}` with only what is new of a text is not supported with early transformers 5, which takes "
                "candidates back by a length of the whole text. Give the whole text, or upgrade transformers."
            )
        fresh = absent + input_ids.shape[1] - cache.get_seq_length()
        unmasked = attention_mask.shape[1] < absent + input_ids.shape[1]
        if unmasked and _takes_positions(model) and generate_kwargs.get("position_ids") is None:
            generate_kwargs["position_ids"] = _positions(cache, absent, input_ids)
        longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or fresh
        chunk_size = prefill_chunk_size or settings["prefill_chunk_size"]
        left = cache.position_limit - cache.kept_length if cache.can_rebase else cache.positions_left()
        if chunk_size is None and fresh > min(longest, left):
            chunk_size = default_chunk_size(model, cache)
        repeats = max(settings["num_beams"] or 1, settings["num_return_sequences"] or 1)
        if cache.num_rows not in (0, len(input_ids), len(input_ids) * repeats):
            raise ValueError(
                f"`input_ids` must have the {cache.num_rows} rows that the cache holds, got {len(input_ids)}. "
                "After a beam search these are all its beams: select one with `batch_select_indices`."
            )
        if chunk_size is not None and fresh > 1:
            if seen:
                raise NotImplementedError(
                    f"`{seen[0]}` is not supported with a prompt that is read in chunks of {chunk_size} tokens."
                )
            check_arguments(model, input_ids, cache, generate_kwargs)
            cache.deactivate_past_recording()
            # The last token is left to `generate`.
            for _ in _read(model, input_ids[:, -fresh:-1], cache, chunk_size, last_logits_only(model)):
                pass
        if cache.num_rows == len(input_ids) and repeats > 1:  # `generate` repeats the rows of the prompt alone
            cache.batch_repeat_interleave(repeats)
    cache.rows.eager_tokens = 0  # how the prompt was read says nothing about what follows
    if generate_kwargs.get("streamer") is not None:
        generate_kwargs["streamer"] = CheckedStreamer(generate_kwargs["streamer"], cache.watch)
    with _prepared_for(model, cache, absent, counted=not positioned):
        output: GenerateOutput | torch.LongTensor
        output = model.generate(input_ids, **{cache_name(): cache}, **generate_kwargs)
        return output


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
        chunk_size: how many tokens the model reads at once; by default 64, or 1 for a model whose masks cannot be
            replaced.
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
    chosen = chosen_cache(cache, past_key_values)
    if not isinstance(chosen, SinkCache):
        raise TypeError(f"`cache` must be a SinkCache, got {chosen.__class__.__name__}.")
    for name in model_kwargs.keys() & {"attention_mask", "position_ids"}:
        raise TypeError(
            f"`{name}` follows from the cache; tell it of padding: `SinkCache(config, attention_mask=mask)`."
        )
    if chunk_size is None:
        chunk_size = default_chunk_size(model, chosen)
    yield from _read(model, input_ids, chosen, chunk_size, model_kwargs)


@torch.no_grad()
def _read(
    model: PreTrainedModel, input_ids: Tensor, cache: SinkCache, chunk_size: int, model_kwargs: dict[str, Any]
) -> Iterator[CausalLMOutputWithPast]:
    _check_chunk_size(chunk_size)
    if chunk_size > 1 and not _can_window(model, cache):
        raise NotImplementedError(
            f"`prefill_chunk_size` must be 1 for this {model.config.model_type!r} model with {_attention(model)!r} "
            f"attention, got {chunk_size}: its masks cannot be replaced by one that shows each token its own window."
        )
    if cache.can_rebase:
        # Once positions are wound back, the window and a chunk must fit below their end.
        chunk_size = min(chunk_size, cache.position_limit - cache.window_length)
    pads = cache.rows.pads
    if pads is not None and any(hasattr(layer, "conv_states") for layer in cache.layers):
        raise NotImplementedError(
            f"`prefill_chunk_size` must be left out for a padded batch: this {model.config.model_type!r} model tells "
            "pads from tokens in its first chunk only. Read the rows one by one."
        )
    asks_mask = asks_for_masks(model)
    while input_ids.shape[1] > 0:
        _wind_back(cache, min(chunk_size, input_ids.shape[1]))
        seen = cache.get_seq_length()
        # After a crop single tokens fill the window again.
        query_length = chunk_size if cache.kept_length == min(seen, cache.window_length) else 1
        chunk, input_ids = input_ids[:, :query_length], input_ids[:, query_length:]
        query_length = chunk.shape[1]
        windowed = _can_window(model, cache) and (query_length > 1 or pads is not None)
        mask = None
        if windowed:
            mask = _windowed_mask(model, cache, seen, chunk)
        elif cache.rows.pads_held(seen):
            mask = _mask_of(cache, 0, chunk.new_empty(chunk.shape[0], seen + query_length))
        if _takes_positions(model):
            model_kwargs = {**model_kwargs, "position_ids": _lowered(cache, _positions(cache, seen, chunk))}
        elif cache.rows.base > 0:
            raise DriftError("the model takes no `position_ids`, by which positions are lowered")
        with cache.watch.watching(), cache.lowers_positions(), cache.windows(windowed):
            cache.watch.announce(query_length, asks_mask and not windowed)
            arguments = {**model_kwargs, **with_cache(model.forward, cache)}
            output = model(input_ids=chunk, attention_mask=mask, use_cache=True, **arguments)
        if cache.get_seq_length() != seen + query_length:
            raise DriftError(f"the cache counts {cache.get_seq_length()} tokens where {seen + query_length} were read")
        yield output


def _windowed_mask(model: PreTrainedModel, cache: SinkCache, seen: int, chunk: Tensor) -> Any:
    """The mask of a chunk `[batch_size, query_length]`, in the form that the model's attention takes."""
    batch_size, query_length = chunk.shape
    return ALL_MASK_ATTENTION_FUNCTIONS[_attention(model)](
        batch_size=batch_size,
        q_length=query_length,
        kv_length=cache.rows.windowed_length(seen, query_length),
        q_offset=0,
        kv_offset=0,
        mask_function=cache.rows.windowed_mask(seen, query_length, chunk.device),
        attention_mask=None,
        allow_is_causal_skip=False,
        dtype=model.dtype,
        config=model.config,
        use_vmap=False,
        device=chunk.device,
    )


def _attention(model: PreTrainedModel) -> str:
    name: str = model.config.get_text_config(decoder=True)._attn_implementation
    return name


def asks_for_masks(model: PreTrainedModel) -> bool:
    """True if the model leaves its masks to `transformers`, which asks the cache for their sizes."""
    modules = {type(module).__module__ for module in model.modules()}
    return _attention(model) in ALL_MASK_ATTENTION_FUNCTIONS and any(
        hasattr(sys.modules[name], "create_causal_mask") for name in modules
    )


def _can_window(model: PreTrainedModel, cache: SinkCache) -> bool:
    return cache.can_window and _attention(model) in ("eager", "sdpa", "flex_attention")


def default_chunk_size(model: PreTrainedModel, cache: SinkCache) -> int:
    """How many tokens at once a model can read with a window for each."""
    return DEFAULT_CHUNK_SIZE if _can_window(model, cache) else 1


def last_logits_only(model: PreTrainedModel) -> dict[str, Any]:
    """What lets a model compute no more logits than those of the last token."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _takes_positions(model: PreTrainedModel) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def _wind_back(cache: SinkCache, query_length: int) -> None:
    """Wind positions back if so many new tokens would come to their end, or to where they are less accurate.

    No key more than once in its life, for two windows lie in between.
    """
    left = cache.positions_left()
    accurate = max(_ACCURATE_POSITIONS, 2 * cache.window_length)
    if cache.can_rebase and (query_length > left or cache.position_limit - left >= accurate):
        cache.rebase()


def _lowered(cache: SinkCache, position_ids: Tensor) -> Tensor:
    """Positions `[..., query_length]` as the model must be given them."""
    offsets = cache.position_offsets
    if isinstance(offsets, Tensor):
        offsets = offsets.to(position_ids.device)[:, None]
    return (position_ids - offsets).clamp(min=0)


@contextlib.contextmanager
def _prepared_for(model: Any, cache: SinkCache, absent: int | None, counted: bool) -> Iterator[None]:
    """Wind positions back whenever `generate` would come to their end, and give the model lower ones from then on.

    Where `generate` prepares a forward pass: a hook on the model would be compiled with it. `absent` is how many of the
    tokens that the cache has seen are not in the prompt, if it has tokens; `counted`: positions are those that
    `generate` counts.
    """
    name, takes_positions, asks_mask = cache_name(), _takes_positions(model), asks_for_masks(model)

    def prepared(prepare: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get(name) is not cache:
            unknown = [key for key, value in kwargs.items() if value is cache]
            if unknown:
                raise DriftError(f"`generate` calls the cache `{unknown[0]}`")
            return prepare(*args, **kwargs)
        given = args[0] if args else kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        unread = 0
        if absent is not None and given[0] is not None:
            # `generate` does not know how many tokens it is not given, and begins with some that may have been read.
            unread = given[0].shape[1] + absent - cache.get_seq_length()
            kwargs["next_sequence_length"] = unread if 0 < unread < given[0].shape[1] else None
            if absent > 0 and not cache.rows.pads_held(cache.get_seq_length()):
                kwargs["attention_mask"] = None
        longest = max(new.shape[1] for new in given if new is not None)
        _wind_back(cache, kwargs.get("next_sequence_length") or longest)
        model_inputs = prepare(*args, **kwargs)
        if cache.ends and all(model_inputs.get(each) is None for each in CACHE_NAMES):
            # Phi-3 and its kin drop the cache where their frequencies change, which positions here never come to.
            model_inputs = GenerationMixin.prepare_inputs_for_generation(model, *args, **kwargs)
        new = model_inputs.get("input_ids")
        new = model_inputs["inputs_embeds"] if new is None else new
        if unread > 0 and new.shape[1] != unread:
            raise DriftError(f"`generate` gives the model {new.shape[1]} tokens where {unread} are new to the cache")
        positions = model_inputs.get("position_ids")
        # Reading positions on another device would wait for it: twice shows how `generate` counts.
        if counted and positions is not None and (positions.device.type == "cpu" or cache.watch.passes < 2):
            _check_counted(cache, positions, new.shape[1])
        if cache.rows.base > 0:
            if not takes_positions:
                raise DriftError("the model takes no `position_ids`, by which positions are lowered")
            if positions is None:
                seen = cache.get_seq_length()
                positions = torch.arange(seen, seen + new.shape[1], device=new.device)[None]
            model_inputs["position_ids"] = _lowered(cache, positions)
        mask = model_inputs.get("attention_mask")
        cache.watch.announce(new.shape[1], asks_mask and (mask is None or getattr(mask, "ndim", 0) == 2))
        return model_inputs

    with cache.watch.watching(), cache.lowers_positions(), _prepared_by(model, prepared):
        yield


def _check_counted(cache: SinkCache, positions: Tensor, query_length: int) -> None:
    """Check that `generate` counts positions `[batch_size, query_length]` as the cache does.

    Raises:
        RuntimeError: if the last one, which is never that of a pad, differs.
    """
    if positions.ndim != 2:  # positions in several dimensions
        return
    seen, rows = cache.get_seq_length(), positions.shape[0]
    # Beams repeat the rows of the prompt before the cache knows of it.
    padded_rows = rows if cache.rows.pads is None else len(cache.rows.pads)
    last = _positions(cache, seen + query_length - 1, positions[:padded_rows, :1]).repeat_interleave(
        rows // padded_rows, 0
    )
    if positions.shape[1] != query_length or not torch.equal(positions[:, -1:], last):
        raise DriftError(
            f"`generate` gives {query_length} tokens after {seen} the positions {positions.tolist()!s:.80}"
        )


class _PreparedError(Exception):
    """Raised where `generate` would begin to compute."""


def check_arguments(model: Any, input_ids: Tensor, cache: SinkCache, generate_kwargs: dict[str, Any]) -> None:
    """Let `generate` refuse what it does not take before anything is read: it checks all that before its first step."""

    def prepared(prepare: Any, *args: Any, **kwargs: Any) -> Any:
        raise _PreparedError

    # Nobody streams, and what the model's own settings ask for is overruled, as it will be.
    arguments = {**generate_kwargs, "streamer": None, "cache_implementation": None, "prefill_chunk_size": None}
    with contextlib.suppress(_PreparedError), cache.watch.watching(), _prepared_by(model, prepared):
        model.generate(input_ids, **{cache_name(): cache}, **arguments)


class _Patch:
    """What stands in the place of a model's `prepare_inputs_for_generation` while some thread needs it."""

    name = "prepare_inputs_for_generation"
    lock = threading.Lock()

    def __init__(self, model: Any) -> None:
        self.own = vars(model).get(self.name)
        self.prepare = getattr(model, self.name)
        # By thread, so that streams through one model do not meet.
        self.functions: dict[int, list[Any]] = {}

        @functools.wraps(self.prepare)  # `generate` reads the signature
        def prepared(*args: Any, **kwargs: Any) -> Any:
            prepare = self.prepare
            for function in self.functions.get(threading.get_ident(), ()):
                prepare = functools.partial(function, prepare)
            return prepare(*args, **kwargs)

        self.prepared = prepared
        vars(prepared)["patch"] = self


@contextlib.contextmanager
def _prepared_by(model: Any, function: Any) -> Iterator[None]:
    """Let calls of this thread to the model's `prepare_inputs_for_generation` go to `function(prepare, ...)`."""
    thread = threading.get_ident()
    with _Patch.lock:
        patch = getattr(vars(model).get(_Patch.name), "patch", None) or _Patch(model)
        setattr(model, _Patch.name, patch.prepared)
        patch.functions.setdefault(thread, []).append(function)
    try:
        yield
    finally:
        with _Patch.lock:
            patch.functions[thread].pop()
            if not patch.functions[thread]:
                del patch.functions[thread]
            if not patch.functions:
                vars(model).pop(_Patch.name)
                if patch.own is not None:
                    setattr(model, _Patch.name, patch.own)


class Settings:
    """What `generate` will be told: by an argument, by the given generation config, or by that of the model."""

    def __init__(self, model: GenerationMixin, generate_kwargs: dict[str, Any]) -> None:
        self._kwargs = generate_kwargs
        self._configs = generate_kwargs.get("generation_config"), model.generation_config

    def __getitem__(self, name: str) -> Any:
        values = [self._kwargs.get(name), *(getattr(config, name, None) for config in self._configs)]
        return next((value for value in values if value is not None), None)


def _prompt_of(
    inputs: Tensor | None, generate_kwargs: dict[str, Any], settings: Settings | None
) -> tuple[Tensor | None, Tensor | None]:
    """The prompt and its mask; that of a first prompt is read from the pads if none is given, as `generate` does it."""
    input_ids = generate_kwargs.pop("input_ids", None)
    if inputs is not None and input_ids is not None:
        raise ValueError("`inputs` and `input_ids` must not both be given: they are the same prompt.")
    input_ids = input_ids if inputs is None else inputs
    mask = generate_kwargs.pop("attention_mask", None)
    if mask is None and input_ids is not None and settings is not None:
        pad, eos = settings["pad_token_id"], settings["eos_token_id"]
        if pad is not None and pad not in (eos if isinstance(eos, list) else [eos]):
            mask = (input_ids != pad).long()
    return input_ids, mask


def _mask_of(cache: SinkCache, start: int, like: Tensor) -> Tensor:
    """The mask of tokens `[batch_size, length]` from column `start` on, by what the cache knows of its padding."""
    if cache.rows.pads is None:
        return torch.ones(like.shape, dtype=torch.long, device=like.device)
    columns = torch.arange(start, start + like.shape[1], device=like.device)
    return (columns >= cache.rows.pads.to(like.device)[:, None]).long()


def _positions(cache: SinkCache, start: int, like: Tensor) -> Tensor:
    """The positions of tokens `[batch_size, length]` from column `start` on, counted from that of the first token."""
    positions = torch.arange(start, start + like.shape[1], device=like.device).expand(like.shape)
    pads = cache.rows.pads
    return positions if pads is None else (positions - pads.to(like.device)[:, None]).clamp(min=0)


def _unread(cache: SinkCache, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[int, Tensor]:
    """How many tokens the cache has seen that `input_ids` leaves out, and the mask that `generate` needs."""
    seen, length = cache.get_seq_length(), input_ids.shape[1]
    given = length if attention_mask is None else attention_mask.shape[1]
    if seen == 0:
        return 0, _mask_of(cache, 0, input_ids) if attention_mask is None else attention_mask
    # As `generate` has it: more tokens than were seen are the whole text, unless the mask says that there are more.
    whole = given == length > seen
    absent = 0 if whole else seen
    if attention_mask is not None:
        known = _mask_of(cache, absent + length - given, attention_mask)
        if given > absent + length or not torch.equal(attention_mask.to(known), known):
            raise ValueError(
                "`attention_mask` must say of the text so far what it said before: of which tokens are padding, "
                "nothing can change. Tokens between the turns cannot be masked either."
                if whole
                else f"`attention_mask` must be one for each of the {length} new tokens, or cover all {seen + length}, "
                f"with the padding that the cache knows; got the shape {[*attention_mask.shape]}."
            )
    if absent > 0 and not cache.rows.pads_held(seen):
        return absent, torch.ones_like(input_ids)  # of a mask for all that was seen no column would be read
    return absent, _mask_of(cache, 0, input_ids.new_empty(input_ids.shape[0], absent + length))


def _check_continued(cache: SinkCache, window_length: int, num_sink_tokens: int) -> None:
    for name, value, default in (
        ("window_length", window_length, DEFAULT_WINDOW_LENGTH),
        ("num_sink_tokens", num_sink_tokens, DEFAULT_NUM_SINK_TOKENS),
    ):
        if value not in (default, getattr(cache, name)):
            raise ValueError(
                f"`{name}` of a cache cannot change: got {name}={value} for a `cache` with "
                f"{getattr(cache, name)}. Leave it out to continue that cache."
            )


def _check_chunk_size(chunk_size: Any) -> None:
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool):
        raise TypeError(f"`prefill_chunk_size` must be an int, got {chunk_size!r}.")
    if chunk_size < 1:
        raise ValueError(f"`prefill_chunk_size` must be at least 1, got {chunk_size}.")


def _check_frequencies(model: PreTrainedModel) -> None:
    # `model.to(torch.bfloat16)` rounds the rotary frequencies with the weights; the cache turns by the exact ones.
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and buffer.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"`model` has rotary frequencies rounded to {buffer.dtype} ({name}), so that positions drift apart. "
                f"Load it with `from_pretrained(..., dtype={buffer.dtype})` instead of converting it afterwards."
            )
