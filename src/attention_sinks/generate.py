"""`sink_generate`: `model.generate` with a `SinkCache`."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.generation.utils import GenerateOutput

from .cache import DEFAULT_NUM_SINK_TOKENS, DEFAULT_WINDOW_LENGTH, SinkCache
from .compat import CACHE_NAMES, CheckedStreamer, DriftError, cache_name, chosen_cache
from .hooks import Prepare, inputs_prepared_by
from .prefill import (
    asks_for_masks,
    check_chunk_size,
    check_is_text,
    check_model,
    default_chunk_size,
    last_logits_only,
    not_text,
    read_in_chunks,
    takes_positions,
)
from .prompt import GenerationSettings, Text, mask_of_embeds, mask_of_first, pop_prompt, text_for

# The arguments of `generate` that ask for assisted decoding.
ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


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

    Rows may be padded on the left. Where the positions of a model end or its behaviour changes, they are rebased.

    Args:
        model: a causal language model.
        inputs: the prompt, as `generate` takes it; `input_ids=` or `**tokenizer(...)` do as well.
        window_length: the most tokens a layer of the cache holds, sinks included.
        num_sink_tokens: the number of first tokens that are never evicted.
        cache: the `SinkCache` of an earlier call, to continue it; it keeps its own window. The prompt is the whole text
            so far, or only what is new. Like for `generate`, a prompt longer than what was seen is the whole text,
            unless `attention_mask` covers both what was seen and the prompt.
        past_key_values: `cache` by its name in earlier versions of `transformers`; give one of the two.
        prefill_chunk_size: read the prompt in chunks of this many tokens, each token with exactly its own window, as if
            the prompt were fed token by token, in memory for `window_length + prefill_chunk_size` tokens. A prompt
            longer than the model's `max_position_embeddings` is read like this by default, a shorter one at once and
            with full attention.
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
    continued = chosen_cache(cache, past_key_values)
    _check_call(model, continued, prefill_chunk_size, generate_kwargs)
    settings = GenerationSettings(model, generate_kwargs)
    is_started = continued is not None and continued.get_seq_length() > 0
    input_ids, attention_mask = pop_prompt(inputs, generate_kwargs)
    embeds = generate_kwargs.get("inputs_embeds")
    ids = input_ids if embeds is None else None
    if ids is not None and not is_started:
        attention_mask = mask_of_first(ids, attention_mask, settings, continued)
    if continued is None:
        cache = SinkCache(model.config, window_length, num_sink_tokens)
        check_model(model, cache)
    else:
        cache = continued
        _check_continued(cache, window_length, num_sink_tokens)
        check_model(model, cache)
        cache.deactivate_past_recording()
    chunk_size = prefill_chunk_size or settings["prefill_chunk_size"]
    # The model's own settings may ask for another cache, or for chunks that show each token more than its window.
    generate_kwargs.update(cache_implementation=None, prefill_chunk_size=None)
    generate: Any = model.generate
    if embeds is not None:
        attention_mask = mask_of_embeds(cache, embeds, attention_mask)
    with _padding_announced(cache, None if is_started else attention_mask):
        text = None
        if ids is not None:
            text = text_for(cache, ids, attention_mask, settings)
            generate_kwargs["attention_mask"] = text.attention_mask
            if text.needs_positions and takes_positions(model):
                generate_kwargs["position_ids"] = cache.token_positions.true_positions(text.num_omitted, ids)
            _prefill(model, cache, text, chunk_size, settings, generate_kwargs)
        else:
            generate_kwargs["attention_mask"] = attention_mask
        cache.expect_compiled_steps()  # how the prompt was read says nothing about what follows
        if generate_kwargs.get("streamer") is not None:
            generate_kwargs["streamer"] = CheckedStreamer(generate_kwargs["streamer"], cache.watch)
        with _passes_prepared(model, cache, text):
            return generate(input_ids, **{cache_name(): cache}, **generate_kwargs)  # type: ignore[no-any-return]


@contextlib.contextmanager
def _padding_announced(cache: SinkCache, attention_mask: Tensor | None) -> Iterator[None]:
    """Tell a cache of the padding of a first prompt, if there is a mask; if nothing is read, it forgets that again."""
    if attention_mask is None:
        yield
        return
    before = cache.token_positions.told_mask()
    cache.announce_padding(attention_mask)
    try:
        yield
    except BaseException:
        if cache.get_seq_length() == 0:
            cache.reset()
            if before is not None:
                cache.announce_padding(before)
        raise


def _check_call(model: Any, cache: Any, prefill_chunk_size: Any, generate_kwargs: dict[str, Any]) -> None:
    """Check all arguments that can be checked without a cache; sets `use_cache`."""
    generates = isinstance(model, GenerationMixin)
    if not generates:
        raise TypeError(f"`model` must be a transformers model that can generate, got {model.__class__.__name__}.")
    if not isinstance(cache, SinkCache | None):
        raise TypeError(
            f"`cache` must be a SinkCache, got {cache.__class__.__name__}. Leave it out to start a new stream, or call "
            "`model.generate` for other caches."
        )
    if generate_kwargs.setdefault("use_cache", True) is not True:
        raise ValueError(
            f"`use_cache` must be True, got {generate_kwargs['use_cache']!r}: the window is a property of the cache."
        )
    if generate_kwargs.get("position_ids") is not None:
        raise TypeError("`position_ids` must be left out: the cache counts them. Tell it of pads by `attention_mask`.")
    if generate_kwargs.get("cache_implementation") is not None:
        raise ValueError(
            f"`cache_implementation` must be left out, got {generate_kwargs['cache_implementation']!r}: the cache is a "
            "SinkCache."
        )
    if prefill_chunk_size is not None:
        check_chunk_size(prefill_chunk_size)
        if generate_kwargs.get("inputs_embeds") is not None:
            raise ValueError(f"`prefill_chunk_size` needs `input_ids`, got {prefill_chunk_size} with `inputs_embeds`.")
    name = not_text(generate_kwargs)
    if name is not None and "mrope_section" in str(model.config.to_dict()):
        raise NotImplementedError(
            f"`{name}` is not supported: this {model.config.model_type!r} model gives images positions in several "
            "dimensions (M-RoPE), so that tokens cannot be counted as positions any more. Text alone is exact."
        )


def _check_continued(cache: SinkCache, window_length: int, num_sink_tokens: int) -> None:
    for name, value, default in (
        ("window_length", window_length, DEFAULT_WINDOW_LENGTH),
        ("num_sink_tokens", num_sink_tokens, DEFAULT_NUM_SINK_TOKENS),
    ):
        if value not in (default, getattr(cache, name)):
            raise ValueError(
                f"`{name}` of a cache cannot change: got {name}={value} for a `cache` with {getattr(cache, name)}. "
                "Leave it out to continue that cache."
            )


def _prefill(
    model: PreTrainedModel,
    cache: SinkCache,
    text: Text,
    chunk_size: int | None,
    settings: GenerationSettings,
    generate_kwargs: dict[str, Any],
) -> None:
    """Read a prompt in chunks, all but its last token, if that was asked for or its positions demand it."""
    assisted = next((name for name in ASSISTED if settings[name] is not None), None)
    if text.num_omitted > 0 and assisted is not None and not hasattr(Cache, "activate_past_recording"):
        raise NotImplementedError(
            f"`{assisted}` with only what is new of a text is not supported with early transformers 5, which takes "
            "candidates back by a length of the whole text. Give the whole text, or upgrade transformers."
        )
    num_rows = len(text.input_ids)
    if cache.num_rows not in (0, num_rows, num_rows * settings.num_repeats):
        raise ValueError(
            f"`input_ids` must have the {cache.num_rows} rows that the cache holds, got {num_rows}. After a beam "
            "search these are all its beams: select one with `batch_select_indices`."
        )
    if chunk_size is None:
        config = model.config.get_text_config(decoder=True)
        longest = getattr(config, "max_position_embeddings", None) or text.num_new
        left = cache.position_limit - cache.kept_length if cache.can_rebase else cache.positions_left()
        if text.num_new > min(longest, left):
            chunk_size = default_chunk_size(model, cache)
    if chunk_size is not None and text.num_new > 1:
        check_is_text(generate_kwargs)
        check_arguments(model, text.input_ids, cache, generate_kwargs)
        cache.deactivate_past_recording()
        new = text.input_ids[:, -text.num_new : -1]
        for _ in read_in_chunks(model, new, cache, chunk_size, last_logits_only(model)):
            pass
    if cache.num_rows == num_rows and settings.num_repeats > 1:  # `generate` repeats the rows of the prompt alone
        cache.batch_repeat_interleave(settings.num_repeats)


@contextlib.contextmanager
def _passes_prepared(model: Any, cache: SinkCache, text: Text | None) -> Iterator[None]:
    """Inside, the passes of `generate` get their positions from the cache, and each is announced to it.

    Args:
        model, cache: those of the call.
        text: the prompt, if it has token ids.
    """
    name, can_lower, asks_mask = cache_name(), takes_positions(model), asks_for_masks(model)

    def prepared(prepare: Prepare, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if kwargs.get(name) is not cache:
            unknown = [key for key, value in kwargs.items() if value is cache]
            if unknown:
                raise DriftError(f"`generate` calls the cache `{unknown[0]}`")
            return prepare(*args, **kwargs)
        given = args[0] if args else kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        seen, num_unread = cache.get_seq_length(), 0
        if text is not None and given[0] is not None:
            # `generate` does not know how many tokens it is not given, and begins with some that may have been read.
            length = given[0].shape[1]
            num_unread = length + text.num_omitted - seen
            kwargs["next_sequence_length"] = num_unread if 0 < num_unread < length else None
            if text.num_omitted > 0 and not cache.holds_padding():
                kwargs["attention_mask"] = None
        query_length = kwargs.get("next_sequence_length") or max(x.shape[1] for x in given if x is not None)
        cache.make_room(query_length)
        cache.announce(query_length)
        inputs = prepare(*args, **kwargs)
        if cache.has_position_limit and all(inputs.get(each) is None for each in CACHE_NAMES):
            # Phi-3 and its kin drop the cache where their frequencies change, which positions here never reach.
            inputs = GenerationMixin.prepare_inputs_for_generation(model, *args, **kwargs)
        new = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
        if num_unread > 0 and new.shape[1] != num_unread:
            raise DriftError(
                f"`generate` gives the model {new.shape[1]} tokens where {num_unread} are new to the cache"
            )
        if new.shape[1] != query_length:
            cache.announce(new.shape[1])
        # Reading positions on another device would wait for it: two passes show how `generate` counts.
        is_checked = new.device.type == "cpu" or cache.watch.passes < 2
        _lower_positions(cache, inputs, seen, new, can_lower, is_checked)
        mask = inputs.get("attention_mask")
        cache.watch.announce(new.shape[1], asks_mask and (mask is None or getattr(mask, "ndim", 0) == 2))
        return inputs

    try:
        with cache.watch.watching(), inputs_prepared_by(model, prepared):
            yield
    finally:
        cache.drop_plan()


def _lower_positions(
    cache: SinkCache, inputs: dict[str, Any], seen: int, new: Tensor, can_lower: bool, is_checked: bool
) -> None:
    """Give the model the positions of `new` tokens after `seen` ones as the cache counts them.

    Raises:
        RuntimeError: if `generate` counts otherwise, or the model takes no positions that must be lowered.
    """
    positions, ours = inputs.get("position_ids"), cache.token_positions
    # Positions in several dimensions are those of a model with images.
    if is_checked and positions is not None and positions.ndim == 2:
        # Beams repeat the rows of the prompt before the cache knows of it. The last token is never a pad.
        num_rows = len(positions)
        known_rows = ours.num_rows or num_rows
        last = ours.true_positions(seen + new.shape[1] - 1, positions[:known_rows, :1])
        last = last.repeat_interleave(num_rows // known_rows, dim=0)
        if positions.shape[1] != new.shape[1] or not torch.equal(positions[:, -1:], last):
            raise DriftError(
                f"`generate` gives {new.shape[1]} tokens after {seen} the positions {positions.tolist()!s:.80}"
            )
    if ours.offset > 0:
        if not can_lower:
            raise DriftError("the model takes no `position_ids`, by which positions are lowered")
        if positions is None:
            positions = torch.arange(seen, seen + new.shape[1], device=new.device)[None]
        inputs["position_ids"] = ours.position_ids(positions)


class _PreparedError(Exception):
    """Raised where `generate` would begin to compute."""


def check_arguments(model: Any, input_ids: Tensor, cache: SinkCache, generate_kwargs: dict[str, Any]) -> None:
    """Let `generate` refuse what it does not take before anything is read: it checks that before its first step."""

    def prepared(prepare: Prepare, *args: Any, **kwargs: Any) -> dict[str, Any]:
        raise _PreparedError

    # Nothing is streamed, and what the model's own settings ask for is overruled, as it will be.
    arguments = {**generate_kwargs, "streamer": None, "cache_implementation": None, "prefill_chunk_size": None}
    with contextlib.suppress(_PreparedError), cache.watch.watching(), inputs_prepared_by(model, prepared):
        model.generate(input_ids, **{cache_name(): cache}, **arguments)
