"""The positions that a model gives to images and videos, if these are no token counts (M-RoPE)."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .cache import SinkCache
from .prompt import Text

# What `get_rope_index` is given besides the grids: they alone do not make positions other than those of text.
_NOT_GRIDS = {"input_ids", "attention_mask", "mm_token_type_ids"}


def rope_index_of(model: Any) -> Callable[..., Any] | None:
    """Return the method by which a model finds the positions of images, or None if it counts tokens."""
    for part in (model, getattr(model, "base_model", None), getattr(model, "model", None)):
        rope_index: Callable[..., Any] | None = getattr(part, "get_rope_index", None)
        if rope_index is not None:
            return rope_index
    return None


def grid_positions(model: Any, cache: SinkCache, text: Text, arguments: dict[str, Any]) -> Tensor | None:
    """Return the positions of what is new of a prompt with images or videos, or None if positions are those of text.

    Args:
        model, cache: those of the call.
        text: the prompt.
        arguments: what `generate` is given besides.

    Returns:
        `[num_axes, batch_size, text.num_new + 1]`, from 0 in each row: `rope_deltas`, which the model keeps, may be
        those of another stream. The last position is that of text that would follow.

    Raises:
        ValueError: if the types of tokens are missing that tell images from text.
        NotImplementedError: naming the argument, for a model that must be given positions by the cache.
    """
    rope_index = rope_index_of(model)
    if rope_index is None:
        return None
    taken = inspect.signature(rope_index).parameters
    given = {name: arguments[name] for name in taken if arguments.get(name) is not None}
    token_types = given.get("mm_token_type_ids")
    grids = sorted(given.keys() - _NOT_GRIDS)
    if not grids:
        return None
    if token_types is None and "mm_token_type_ids" in taken:
        raise ValueError(
            f"`mm_token_type_ids` must be given with `{grids[0]}`: by them the model finds images among the tokens. A "
            "processor returns them with `return_mm_token_type_ids=True`."
        )
    if cache.needs_temporal_order:
        raise NotImplementedError(
            f"`{grids[0]}` is not supported with this {model.config.model_type!r} model: its indexer pools the keys of "
            "neighbours, and finds them by the number of tokens. Text alone is supported."
        )
    new = text.input_ids[:, -text.num_new :]
    mask = cache.token_positions.mask(cache.get_seq_length(), new)
    given |= {"input_ids": pad(new, (0, 1)), "attention_mask": pad(mask, (0, 1), value=1)}
    if token_types is not None:
        given["mm_token_type_ids"] = pad(token_types[:, -text.num_new :], (0, 1))
    return torch.as_tensor(rope_index(**given)[0])


def following(grids: Tensor, start: Tensor, query_length: int) -> Tensor:
    """Return positions from `start` `[batch_size, 1]` on: those of images, then text, `query_length + 1` in all."""
    grids = grids.repeat_interleave(len(start) // grids.shape[1], dim=1).to(start.device)  # beams repeat rows
    text = grids[:, :, -1:] + torch.arange(1, query_length + 2 - grids.shape[2], device=start.device)
    return torch.cat([grids, text], dim=2) + start
