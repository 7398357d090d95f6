"""The prompt of a call of `sink_generate`, and which part of it the cache has already seen."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cache import SinkCache
from .storage.checks import ROW_BY_ROW


class GenerationSettings:
    """The setting that `generate` will use: the argument, or that of the given generation config, or the model's."""

    def __init__(self, model: Any, generate_kwargs: dict[str, Any]) -> None:
        self._kwargs = generate_kwargs
        self._configs = generate_kwargs.get("generation_config"), getattr(model, "generation_config", None)
        self._config = model.config.get_text_config(decoder=True)

    def __getitem__(self, name: str) -> Any:
        values = [self._kwargs.get(name), *(getattr(config, name, None) for config in self._configs)]
        return next((value for value in values if value is not None), None)

    def token_ids(self, name: str) -> set[int]:
        """Return the token ids of a setting that may have none, one or several."""
        value = self[name]
        return set() if value is None else {*torch.as_tensor(value).flatten().tolist()}

    @property
    def pad_ids(self) -> set[int]:
        """The ids that pads may have: those of padding and of the end of a text."""
        of_config = getattr(self._config, "pad_token_id", None)
        ids = self.token_ids("pad_token_id") | self.token_ids("eos_token_id")
        return ids if of_config is None else ids | {of_config}

    @property
    def num_repeats(self) -> int:
        """How often `generate` repeats each row of the prompt."""
        return max(self["num_beams"] or 1, self["num_return_sequences"] or 1)


@dataclass(frozen=True)
class Text:
    """The token ids of a prompt beside what the cache has seen.

    Attributes:
        input_ids: the prompt, `[batch_size, length]`.
        attention_mask: the mask that `generate` needs.
        num_omitted: number of tokens that the cache has seen and the prompt leaves out.
        num_new: number of tokens of the prompt that the cache has not seen.
    """

    input_ids: Tensor
    attention_mask: Tensor
    num_omitted: int
    num_new: int

    @property
    def needs_positions(self) -> bool:
        """True if the mask does not cover what the cache has seen, so that `generate` cannot count positions by it."""
        return self.attention_mask.shape[1] < self.num_omitted + self.input_ids.shape[1]


def pop_prompt(inputs: Tensor | None, generate_kwargs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """Take the prompt and its mask out of the arguments of a call.

    Args:
        inputs: the prompt, if it was given by position.
        generate_kwargs: the other arguments.

    Raises:
        ValueError: if the prompt was given twice.
    """
    input_ids = generate_kwargs.pop("input_ids", None)
    if inputs is not None and input_ids is not None:
        raise ValueError("`inputs` and `input_ids` must not both be given: they are the same prompt.")
    return input_ids if inputs is None else inputs, generate_kwargs.pop("attention_mask", None)


def mask_of_first(
    input_ids: Tensor, attention_mask: Tensor | None, settings: GenerationSettings, cache: SinkCache | None
) -> Tensor | None:
    """Return the mask of a first prompt: the given one, or that of its pads, as `generate` reads it.

    None if there are no pads, or if the cache was told of them.

    Raises:
        ValueError: if the mask has another shape than the prompt, or if nothing tells pads from text.
    """
    if attention_mask is not None:
        if getattr(attention_mask, "ndim", 0) == 2 and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"`attention_mask` must have the shape of the prompt, {[*input_ids.shape]}, got "
                f"{[*attention_mask.shape]}."
            )
        return attention_mask
    if cache is not None and cache.token_positions.known_length(len(input_ids)) > 0:
        return None
    pad = settings.token_ids("pad_token_id")
    if pad and not pad & settings.token_ids("eos_token_id"):
        mask = (input_ids != pad.pop()).long()
        if not mask.all():
            return mask
    remedy = "Give the mask of the tokenizer, or a mask of ones if all are text."
    check_no_pad_ids(input_ids, settings, "`attention_mask` must be given", remedy, texts_may_end=False)
    return None


def mask_of_embeds(cache: SinkCache, inputs_embeds: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """Return the mask that `generate` needs for a prompt of embeddings, which are always those of the whole text.

    Raises:
        ValueError: if they bring nothing new, or if the mask is not that of the text.
    """
    like, seen = inputs_embeds[..., 0], cache.get_seq_length()
    _check_rows("inputs_embeds", inputs_embeds, cache)
    if like.shape[1] <= seen:
        raise ValueError(
            f"`inputs_embeds` must be those of the whole text, longer than the {seen} tokens seen, got "
            f"{like.shape[1]}. New tokens alone are possible as `input_ids`."
        )
    known = cache.token_positions.mask(0, like)
    if attention_mask is None:
        return known if cache.token_positions.num_rows > 0 else None
    if attention_mask.shape != like.shape or (seen > 0 and not torch.equal(attention_mask.to(known), known)):
        raise ValueError(
            f"`attention_mask` must have the shape of the text, {[*like.shape]}, got {[*attention_mask.shape]}, and "
            f"after the first prompt the padding that the cache knows. {ROW_BY_ROW}."
        )
    return attention_mask


def check_no_pad_ids(
    input_ids: Tensor, settings: GenerationSettings, demand: str, remedy: str, texts_may_end: bool
) -> None:
    """Check that nothing speaks for pads in a first prompt `[batch_size, length]` of which nobody said anything.

    Rows with padding begin, or end, with different numbers of pads; rows of text do not, but for a single token that
    begins a text in some rows, or ends it: then a warning says so.

    Args:
        input_ids: the prompt.
        settings: where the ids of pads are.
        demand, remedy: the beginning and the end of the message.
        texts_may_end: True if nothing will follow the last tokens of the prompt.

    Raises:
        ValueError: if the rows differ in the number of pads.
    """
    pad_ids = settings.pad_ids
    if len(input_ids) == 1:
        return
    is_pad = _is_any(input_ids, pad_ids)
    at_start, at_end = _differing_run(is_pad), 0 if texts_may_end else _differing_run(is_pad.flip(1))
    where = "begin" if at_start >= at_end else "end"
    what = f"some rows of `input_ids` {where} with the token {_among(pad_ids, input_ids)} more often than others, as "
    what += "padding does"
    if max(at_start, at_end) > 1 or (at_start == 1 and not pad_ids & settings.token_ids("bos_token_id")):
        raise ValueError(f"{demand}: {what}, and nothing tells pads from text. {remedy}")
    if max(at_start, at_end) == 1:
        warnings.warn(f"Tokens are taken for text: {what}. Give an `attention_mask` if they are pads.", stacklevel=4)


def _check_no_later_pads(input_ids: Tensor, settings: GenerationSettings) -> None:
    """Check the same of the new tokens `[batch_size, length]` of a later prompt.

    `generate` may have made the first of them, and a single one may end a turn, if it is not the id of padding alone.
    """
    pad_ids = settings.pad_ids
    if len(input_ids) == 1:
        return
    is_pad, is_only_pad = (
        _is_any(input_ids, ids)
        for ids in (pad_ids, pad_ids - settings.token_ids("eos_token_id") - settings.token_ids("bos_token_id"))
    )
    later = _differing_run(is_pad[:, 1:])
    if later == 1:  # pads from the first token on
        later = _differing_run(is_pad)
    only_pads = max(_differing_run(is_only_pad[:, 1:]), _differing_run(is_only_pad[:, 1:].flip(1)))
    if max(later, _differing_run(is_pad.flip(1))) > 1 or only_pads > 0:
        raise ValueError(
            "`input_ids` must not be padded after the first prompt: some rows of the new tokens begin or end with the "
            f"token {_among(pad_ids, input_ids)} more often than others. {ROW_BY_ROW}. If they are text, give an "
            "`attention_mask` of ones."
        )


def _is_any(input_ids: Tensor, ids: set[int]) -> Tensor:
    return torch.isin(input_ids, torch.tensor([*ids], dtype=torch.long, device=input_ids.device)).cpu()


def _among(ids: set[int], input_ids: Tensor) -> str:
    """Return which of some ids are in a prompt, for a message."""
    return " or ".join(str(each) for each in sorted(ids & {*input_ids.flatten().tolist()}))


def _differing_run(is_pad: Tensor) -> int:
    """Return with how many pads a row `[batch_size, length]` begins at most; 0 if all begin with the same number."""
    runs = is_pad.long().cumprod(dim=1).sum(dim=1)
    return int(runs.max()) if (runs != runs[:1]).any() else 0


def text_for(cache: SinkCache, input_ids: Tensor, attention_mask: Tensor | None, settings: GenerationSettings) -> Text:
    """Return which part of a prompt is new to a cache.

    Like `generate`: `input_ids` that are longer than what the cache has seen are the whole text, unless
    `attention_mask` is longer than `input_ids`.

    Raises:
        ValueError: if the mask pads the text so far in another way than the cache knows, or new tokens, or if the
            tokens may have been seen already.
    """
    seen, length, positions = cache.get_seq_length(), input_ids.shape[1], cache.token_positions
    if seen == 0:
        _check_rows("input_ids", input_ids, cache)
        if attention_mask is None and (told := positions.known_length(len(input_ids))) > length:
            raise ValueError(
                f"`input_ids` must be the prompt whose mask the cache was told, of {told} tokens or more, got {length}."
            )
        mask = positions.mask(0, input_ids) if attention_mask is None else attention_mask
        return Text(input_ids, mask, 0, length)
    mask_length = length if attention_mask is None else attention_mask.shape[1]
    if mask_length == length in (seen, cache.window_length) and length <= seen:
        raise _seen_or_new(length, seen)
    is_whole = mask_length == length > seen
    omitted = 0 if is_whole else seen
    if attention_mask is None:
        _check_no_later_pads(input_ids[:, seen - omitted :], settings)
    else:
        known = positions.mask(omitted + length - mask_length, attention_mask)
        if mask_length > omitted + length or not torch.equal(attention_mask.to(known), known):
            raise ValueError(
                "`attention_mask` must say of the text so far what it said before: of which tokens are padding, "
                f"nothing can change. {ROW_BY_ROW}."
                if is_whole
                else f"`attention_mask` must be one for each of the {length} new tokens, or cover all {seen + length}, "
                f"with the padding that the cache knows; got the shape {[*attention_mask.shape]}. {ROW_BY_ROW}."
            )
    if omitted > 0 and not cache.holds_padding():
        mask = torch.ones_like(input_ids)  # of a mask for all that was seen no column would be read
    else:
        mask = positions.mask(0, input_ids.new_empty(input_ids.shape[0], omitted + length))
    return Text(input_ids, mask, omitted, omitted + length - seen)


def _check_rows(name: str, rows: Tensor, cache: SinkCache) -> None:
    num_rows = cache.token_positions.num_rows
    if num_rows not in (0, len(rows)):
        raise ValueError(
            f"`{name}` must have a row for each of the {num_rows} rows whose padding the cache knows, got {len(rows)}."
        )


def _seen_or_new(length: int, seen: int) -> ValueError:
    """Return the error about a prompt that was seen already, or is a part of what was seen, or is new."""
    what = "it has as many tokens as the cache has seen"
    if length < seen:
        what = f"it has as many tokens as the window, as if a text was cut to it after {seen} were seen"
    return ValueError(
        f"`input_ids` of {length} tokens may be the text so far or its end, or new tokens: {what}. For new tokens give "
        f"an `attention_mask` for all {seen + length}. Otherwise give the whole text, uncut, with at least one token "
        "that is new to the cache (`cache.crop(-1)` takes the last one back)."
    )
