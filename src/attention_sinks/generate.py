"""`sink_generate`: `model.generate` with a `SinkCache`."""

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.generation.utils import GenerateOutput

from .architecture.settings import own_text_config
from .architecture.spec import check_int
from .cache import DEFAULT_NUM_SINK_TOKENS, DEFAULT_WINDOW_LENGTH, SinkCache
from .compat import CACHE_NAMES, CheckedStreamer, DriftError, cache_name, chosen_cache
from .grids import following, grid_positions, rope_index_of
from .guidance import guided
from .inputs import check_is_text, check_left_out, check_prompt, check_vocabulary, kind_of, not_text
from .models import Replacement, unwrapped, view_of
from .prefill import (
    asks_for_masks,
    check_model,
    check_readable,
    default_chunk_size,
    first_position,
    last_logits_only,
    read_in_chunks,
    takes_positions,
)
from .prompt import GenerationSettings, Text, mask_of_embeds, mask_of_first, pop_prompt, text_for

# The arguments of `generate` that ask for assisted decoding.
ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
# Settings for ways of decoding that compute with caches of their own, or with code from the Hub.
UNSUPPORTED = ("constraints", "dola_layers", "force_words_ids", "penalty_alpha", "speculation_type", "use_mtp")


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
    inner, continued = unwrapped(model), chosen_cache(cache, past_key_values)
    settings = GenerationSettings(inner, generate_kwargs)
    _check_call(inner, continued, prefill_chunk_size, settings, generate_kwargs)
    is_started = continued is not None and continued.get_seq_length() > 0
    check_prompt(inner, inputs, generate_kwargs, is_started)
    input_ids, attention_mask = pop_prompt(inputs, generate_kwargs)
    embeds = generate_kwargs.get("inputs_embeds")
    ids = input_ids if embeds is None else None
    if ids is not None and not is_started:
        attention_mask = mask_of_first(ids, attention_mask, settings, continued)
    if continued is None:
        cache = SinkCache(own_text_config(inner.config), window_length, num_sink_tokens)
    else:
        cache = continued
        _check_continued(cache, window_length, num_sink_tokens)
    check_model(inner, cache)
    if ids is not None and not_text(generate_kwargs) is None:
        check_vocabulary("input_ids", ids, inner)
    chunk_size = prefill_chunk_size or settings["prefill_chunk_size"]
    _overrule(settings, generate_kwargs)
    if embeds is not None:
        attention_mask = mask_of_embeds(cache, embeds, attention_mask)
    with _padding_announced(cache, None if is_started else attention_mask):
        text = grids = None
        generate_kwargs["attention_mask"] = attention_mask
        if ids is not None:
            text = text_for(cache, ids, attention_mask, settings)
            _check_text(cache, text, settings)
            generate_kwargs["attention_mask"] = text.attention_mask
            grids = grid_positions(inner, cache, text, generate_kwargs)
            if rope_index_of(inner) is not None or (text.needs_positions and takes_positions(inner)):
                generate_kwargs["position_ids"] = cache.token_positions.true_positions(text.num_omitted, ids)
            chunk_size = chunk_size or _default_chunk_size(inner, cache, text)
        forward = guided(model, cache, input_ids, settings, generate_kwargs)
        _begin(model, cache, text, chunk_size, settings.num_repeats, generate_kwargs)
        cache.expect_compiled_steps()  # how the prompt was read says nothing about what follows
        if generate_kwargs.get("streamer") is not None:
            generate_kwargs["streamer"] = CheckedStreamer(generate_kwargs["streamer"], cache.watch)
        view = view_of(model, _passes_prepared(inner, cache, text, grids), forward)
        try:
            with cache.watch.watching():
                return _generate(view, input_ids, cache, generate_kwargs)  # type: ignore[no-any-return]
        finally:
            cache.drop_plan()


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


def _overrule(settings: GenerationSettings, generate_kwargs: dict[str, Any]) -> None:
    """Overrule settings that ask for no cache, for another one, or for chunks that show a token more than its window.

    `generate` does not like arguments beside a `generation_config`.
    """
    if settings["use_cache"] is False:
        generate_kwargs["use_cache"] = True
    for name in ("cache_implementation", "prefill_chunk_size"):
        if settings[name] is not None:
            generate_kwargs[name] = None


def _generate(view: Any, input_ids: Tensor | None, cache: SinkCache, generate_kwargs: dict[str, Any]) -> Any:
    """Call `generate`. The prompt goes by its name: some models take something else first."""
    name = "inputs" if "inputs" in inspect.signature(view.generate).parameters else "input_ids"
    return view.generate(**{name: input_ids, cache_name(): cache}, **generate_kwargs)


def _check_call(
    model: Any, cache: Any, prefill_chunk_size: Any, settings: GenerationSettings, generate_kwargs: dict[str, Any]
) -> None:
    """Check all arguments that can be checked without a cache."""
    generates = isinstance(model, GenerationMixin)
    if not generates:
        raise TypeError(f"`model` must be a transformers model that can generate, got {model.__class__.__name__}.")
    if not isinstance(cache, SinkCache | None):
        raise TypeError(
            f"`cache` must be a SinkCache, got {kind_of(cache)}. Leave it out to start a new stream, or call the "
            "`generate` of the model's class for other caches."
        )
    if generate_kwargs.get("use_cache", True) is not True:
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
        check_int("prefill_chunk_size", prefill_chunk_size, at_least=1)
        if generate_kwargs.get("inputs_embeds") is not None:
            raise ValueError(f"`prefill_chunk_size` needs `input_ids`, got {prefill_chunk_size} with `inputs_embeds`.")
    _check_decoding(settings, generate_kwargs)


def _check_decoding(settings: GenerationSettings, generate_kwargs: dict[str, Any]) -> None:
    """Check that a way of decoding uses the cache, and nothing is asked for that it does not give."""
    check_left_out(generate_kwargs, ("adapter_names", "labels"))
    unsupported = next((name for name in UNSUPPORTED if settings[name]), None)
    if unsupported is not None:
        raise NotImplementedError(
            f"`{unsupported}` is not supported, got {settings[unsupported]!r:.80}: this way of decoding has caches of "
            "its own. Leave it out; sampling, beam search, assistant models and prompt lookup are supported."
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


def _check_text(cache: SinkCache, text: Text, settings: GenerationSettings) -> None:
    """Check that a prompt is for the rows of a cache, and that `generate` can take candidates for it back."""
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


def _default_chunk_size(model: PreTrainedModel, cache: SinkCache, text: Text) -> int | None:
    """Return the chunk size for a prompt that is longer than what the model was made for, or None for another one."""
    config = model.config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None) or text.num_new
    left = cache.position_limit - cache.kept_length if cache.can_rebase else cache.positions_left()
    return default_chunk_size(model, cache) if text.num_new > min(longest, left) else None


def _begin(
    model: PreTrainedModel,
    cache: SinkCache,
    text: Text | None,
    chunk_size: int | None,
    num_repeats: int,
    generate_kwargs: dict[str, Any],
) -> None:
    """Bring a cache to where `generate` starts. What `generate` does not take is refused before the cache is changed.

    Args:
        model, cache, generate_kwargs: those of the call.
        text: the prompt, if it has token ids.
        chunk_size: read all of the prompt but its last token in chunks of this size, unless it is None.
        num_repeats: how often `generate` repeats each row of the prompt.
    """
    inner, input_ids, unread = unwrapped(model), None, None
    if text is not None:
        input_ids = text.input_ids
        unread = input_ids[:, -text.num_new : -1] if chunk_size is not None and text.num_new > 1 else None
    repeats = input_ids is not None and num_repeats > 1 and (unread is not None or cache.num_rows == len(input_ids))
    if unread is not None or repeats:
        check_arguments(inner, input_ids, cache, generate_kwargs)
    cache.deactivate_past_recording()
    if unread is not None and chunk_size is not None:
        check_is_text(generate_kwargs)
        check_readable(inner, cache, "prefill_chunk_size", chunk_size, len(unread))
        for _ in read_in_chunks(model, unread, cache, chunk_size, last_logits_only(inner)):
            pass
    if repeats:  # `generate` repeats the rows of the prompt alone
        cache.batch_repeat_interleave(num_repeats)


def _passes_prepared(model: Any, cache: SinkCache, text: Text | None, grids: Tensor | None) -> Replacement:
    """Return what prepares the passes of `generate`: positions come from the cache, and each pass is announced to it.

    Args:
        model: the model inside its wrappers.
        cache: that of the call.
        text: the prompt, if it has token ids.
        grids: the positions of what is new of the prompt, if they are not those of text, see `grid_positions`.
    """
    name, asks_mask = cache_name(), asks_for_masks(model)
    can_lower, first_of = functools.cache(takes_positions), functools.cache(first_position)
    has_grids, start = rope_index_of(model) is not None, cache.get_seq_length()

    def prepared(prepare: Replacement, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if kwargs.get(name) is not cache:
            unknown = [key for key, value in kwargs.items() if value is cache]
            if unknown:
                raise DriftError(f"`generate` calls the cache `{unknown[0]}`")
            return prepare(*args, **kwargs)  # type: ignore[no-any-return]
        generating = getattr(prepare, "__self__", model)  # `model`, or one inside it
        given = args[0] if args else kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        seen, num_unread = cache.get_seq_length(), 0
        if text is not None and given[0] is not None:
            # `generate` does not know how many tokens it is not given, and begins with some that may have been read.
            length = given[0].shape[1]
            num_unread = length + text.num_omitted - seen
            if num_unread <= 0 and cache.watch.passes > 0:
                # The text has ended; with `synced_gpus` the pass is for the other processes, and its output is dropped.
                return {"input_ids": given[0][:, -1:], "use_cache": False}
            kwargs["next_sequence_length"] = num_unread if 0 < num_unread < length else None
            if text.num_omitted > 0 and not cache.holds_padding():
                kwargs["attention_mask"] = None
        query_length = kwargs.get("next_sequence_length") or max(x.shape[1] for x in given if x is not None)
        cache.make_room(query_length)
        cache.announce(query_length)
        inputs = prepare(*args, **kwargs)
        if all(inputs.get(each) is None for each in CACHE_NAMES):
            # Phi-3 and its kin drop the cache where frequencies may change, which positions here never reach.
            inputs = GenerationMixin.prepare_inputs_for_generation(generating, *args, **kwargs)
        new = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
        if num_unread > 0 and new.shape[1] != num_unread:
            raise DriftError(
                f"`generate` gives the model {new.shape[1]} tokens where {num_unread} are new to the cache"
            )
        positions = None
        if grids is not None and seen == start:
            positions = following(grids, cache.text_positions(new[:, :1]), new.shape[1])
        if positions is not None or new.shape[1] != query_length:
            cache.announce(new.shape[1], positions=positions)
        # Reading positions on another device would wait for it: two passes show how `generate` counts.
        is_checked = new.device.type == "cpu" or cache.watch.passes < 2
        if has_grids:
            text_positions = cache.text_positions(new).expand(3, -1, -1)
            inputs["position_ids"] = text_positions if positions is None else positions[:, :, :-1]
        else:
            first = first_of(generating) if is_checked else None
            _lower_positions(cache, inputs, seen, new, can_lower(generating), first)
        mask = inputs.get("attention_mask")
        cache.watch.announce(new.shape[1], asks_mask and (mask is None or getattr(mask, "ndim", 0) == 2))
        return inputs  # type: ignore[no-any-return]

    return prepared


def _lower_positions(
    cache: SinkCache, inputs: dict[str, Any], seen: int, new: Tensor, can_lower: bool, first: int | None
) -> None:
    """Give the model the positions of `new` tokens after `seen` ones as the cache counts them.

    `first`: the position that the model gives the first token of a text; None to check nothing.

    Raises:
        RuntimeError: if `generate` counts otherwise, or the model takes no positions that must be lowered.
    """
    positions, ours = inputs.get("position_ids"), cache.token_positions
    # Positions in several dimensions are those of a model with images.
    if first is not None and positions is not None and positions.ndim == 2:
        # Beams repeat the rows of the prompt before the cache knows of it. The last token is never a pad.
        num_rows = len(positions)
        known_rows = ours.num_rows or num_rows
        last = ours.true_positions(seen + new.shape[1] - 1, positions[:known_rows, :1])
        last = last.repeat_interleave(num_rows // known_rows, dim=0)
        if positions.shape[1] != new.shape[1] or not torch.equal(positions[:, -1:], last + first):
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


def check_arguments(model: Any, input_ids: Tensor | None, cache: SinkCache, generate_kwargs: dict[str, Any]) -> None:
    """Let `generate` refuse what it does not take before anything is read: it checks that before its first step."""

    def prepared(prepare: Replacement, *args: Any, **kwargs: Any) -> dict[str, Any]:
        raise _PreparedError

    settings, arguments = GenerationSettings(model, generate_kwargs), {**generate_kwargs, "streamer": None}
    _check_decoding(settings, generate_kwargs)
    _overrule(settings, arguments)
    with contextlib.suppress(_PreparedError), cache.watch.watching():
        _generate(view_of(model, prepared), input_ids, cache, arguments)
