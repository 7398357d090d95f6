"""The prompt of a call of `sink_generate`, and which part of it the cache has already seen."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cache import SinkCache


class GenerationSettings:
    """The setting that `generate` will use: the argument, or that of the given generation config, or the model's."""

    def __init__(self, model: Any, generate_kwargs: dict[str, Any]) -> None:
        self._kwargs = generate_kwargs
        self._configs = generate_kwargs.get("generation_config"), model.generation_config

    def __getitem__(self, name: str) -> Any:
        values = [self._kwargs.get(name), *(getattr(config, name, None) for config in self._configs)]
        return next((value for value in values if value is not None), None)

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


def pop_prompt(
    inputs: Tensor | None, generate_kwargs: dict[str, Any], settings: GenerationSettings | None
) -> tuple[Tensor | None, Tensor | None]:
    """Take the prompt and its mask out of the arguments of a call.

    Args:
        inputs: the prompt, if it was given by position.
        generate_kwargs: the other arguments.
        settings: with them, the mask of a first prompt is read from its pads if none is given, as `generate` does it.

    Raises:
        ValueError: if the prompt was given twice, or the mask of a first prompt has another shape.
    """
    input_ids = generate_kwargs.pop("input_ids", None)
    if inputs is not None and input_ids is not None:
        raise ValueError("`inputs` and `input_ids` must not both be given: they are the same prompt.")
    input_ids = input_ids if inputs is None else inputs
    mask = generate_kwargs.pop("attention_mask", None)
    if mask is None and input_ids is not None and settings is not None:
        pad, eos = settings["pad_token_id"], settings["eos_token_id"]
        if pad is not None and pad not in (eos if isinstance(eos, list) else [eos]):
            mask = (input_ids != pad).long()
    is_first = input_ids is not None and settings is not None and generate_kwargs.get("inputs_embeds") is None
    if is_first and getattr(mask, "ndim", 0) == 2 and mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` must have the shape of the prompt, {[*input_ids.shape]}, got {[*mask.shape]}."
        )
    return input_ids, mask


def text_for(cache: SinkCache, input_ids: Tensor, attention_mask: Tensor | None) -> Text:
    """Return which part of a prompt is new to a cache.

    Like `generate`: `input_ids` that are longer than what the cache has seen are the whole text, unless
    `attention_mask` is longer than `input_ids`.

    Raises:
        ValueError: if the mask pads the text so far in another way than the cache knows.
    """
    seen, length, positions = cache.get_seq_length(), input_ids.shape[1], cache.token_positions
    if seen == 0:
        mask = positions.mask(0, input_ids) if attention_mask is None else attention_mask
        return Text(input_ids, mask, 0, length)
    mask_length = length if attention_mask is None else attention_mask.shape[1]
    is_whole = mask_length == length > seen
    omitted = 0 if is_whole else seen
    if attention_mask is not None:
        known = positions.mask(omitted + length - mask_length, attention_mask)
        if mask_length > omitted + length or not torch.equal(attention_mask.to(known), known):
            raise ValueError(
                "`attention_mask` must say of the text so far what it said before: of which tokens are padding, "
                "nothing can change. Tokens between the turns cannot be masked either."
                if is_whole
                else f"`attention_mask` must be one for each of the {length} new tokens, or cover all {seen + length}, "
                f"with the padding that the cache knows; got the shape {[*attention_mask.shape]}."
            )
    if omitted > 0 and not cache.holds_padding():
        mask = torch.ones_like(input_ids)  # of a mask for all that was seen no column would be read
    else:
        mask = positions.mask(0, input_ids.new_empty(input_ids.shape[0], omitted + length))
    return Text(input_ids, mask, omitted, omitted + length - seen)
