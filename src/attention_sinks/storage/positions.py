"""At which position the tokens of a stream stand: the one place that knows left padding and position offsets.

A token of row `b` stands at `column - left_padding[b]`, minus what a rebase took off. Attention counts distances inside
the cache, so the sinks act further on by as many positions as tokens were evicted since.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class TokenPositions:
    """Positions of a batch without left padding. Immutable.

    Args:
        offset: number of evicted tokens at the last rebase; positions are that much lower from then on.
        told: the shape of the mask by which the caller told the padding of the first columns.

    Attributes:
        num_rows: number of rows that the padding describes, 0 without padding: then any number of rows is right.
        max_padding, min_padding: most and fewest pads of a row.
    """

    num_rows = max_padding = min_padding = 0

    def __init__(self, offset: int = 0, told: tuple[int, ...] = (0, 0)) -> None:
        self.offset = offset
        self._told = told

    @property
    def left_padding(self) -> Tensor | None:
        """Number of pads at the start of each row, `[batch_size]`, or None without padding."""
        return None

    def padding_of(self, batch_size: int) -> Tensor:
        """Return the number of pads of each row of a batch, `[batch_size]`, on the CPU."""
        return torch.zeros(batch_size, dtype=torch.long)

    def known_length(self, num_rows: int) -> int:
        """Return of how many first columns of a batch of `num_rows` it is known whether they are padding."""
        return self._told[1] if self._told[0] == num_rows else 0

    def told_mask(self) -> Tensor | None:
        """Return the mask by which the caller told the padding, or None."""
        return self.mask(0, torch.empty(self._told)) if self._told[1] > 0 else None

    def offsets(self) -> int | Tensor:
        """Return how much lower positions are than the model would count them, for all rows or `[batch_size]`."""
        return self.offset

    def rebased(self, offset: int) -> "TokenPositions":
        """Return the positions after a rebase at `offset` evicted tokens."""
        return TokenPositions(offset, self._told)

    def compacted(self, num_evicted: int) -> "TokenPositions":
        """Return the positions once the first `num_evicted` columns are not counted any more."""
        return TokenPositions()

    def select_rows(self, select: Callable[[Tensor], Tensor]) -> "TokenPositions":
        """Return the positions of selected rows."""
        return self

    def shift(self, num_evicted: Any, offset: Any, device: torch.device) -> Any:
        """Return by how many positions the sinks are rotated after `num_evicted` evictions.

        Args:
            num_evicted: an int, or a tensor that broadcasts with one number per row in its first dimension.
            offset: that of these positions, or a tensor that holds it.
            device: where a tensor is wanted.
        """
        return num_evicted - offset

    def true_positions(self, start: int, like: Tensor) -> Tensor:
        """Return the positions of columns `start`, ... as `generate` counts them, shaped `[rows, n]` like `like`."""
        return torch.arange(start, start + like.shape[1], device=like.device).expand(like.shape)

    def position_ids(self, true_positions: Tensor) -> Tensor:
        """Return positions `[..., n]` as the model must be given them."""
        return (true_positions - self.offset).clamp(min=0)

    def mask(self, start: int, like: Tensor) -> Tensor:
        """Return the padding mask of columns `start`, ..., shaped `[rows, n]` like `like`."""
        return torch.ones(like.shape, dtype=torch.long, device=like.device)


class PaddedTokenPositions(TokenPositions):
    """Positions of a batch with left padding. Immutable.

    Args:
        left_padding: number of pads at the start of each row, `[batch_size]`.
        offset, told: see `TokenPositions`.
    """

    def __init__(self, left_padding: Tensor, offset: int = 0, told: tuple[int, ...] = (0, 0)) -> None:
        super().__init__(offset, told)
        self._left_padding = left_padding
        self.max_padding, self.min_padding = int(left_padding.max()), int(left_padding.min())
        self.num_rows = len(left_padding)
        self._on_device = {left_padding.device: left_padding}

    @property
    def left_padding(self) -> Tensor:
        return self._left_padding

    def padding_on(self, device: torch.device) -> Tensor:
        """Return the left padding on a device; it is moved there once."""
        if device not in self._on_device:
            with torch.inference_mode(False):
                self._on_device[device] = self._left_padding.to(device)
        return self._on_device[device]

    def padding_of(self, batch_size: int) -> Tensor:
        # For beams and several answers to a prompt, which the cache learns of by their first states.
        return self.padding_on(torch.device("cpu")).repeat_interleave(batch_size // self.num_rows)

    def known_length(self, num_rows: int) -> int:
        return max(self._told[1], self.max_padding)

    def offsets(self) -> Tensor:
        return (self.offset - self._left_padding).clamp(min=0)

    def rebased(self, offset: int) -> "PaddedTokenPositions":
        return PaddedTokenPositions(self._left_padding, offset, self._told)

    def compacted(self, num_evicted: int) -> "PaddedTokenPositions":
        return PaddedTokenPositions((self._left_padding - num_evicted).clamp(min=0))

    def select_rows(self, select: Callable[[Tensor], Tensor]) -> "PaddedTokenPositions":
        return PaddedTokenPositions(select(self._left_padding), self.offset, self._told)

    def shift(self, num_evicted: Any, offset: Any, device: torch.device) -> Tensor:
        ndim = max(4, num_evicted.ndim) if isinstance(num_evicted, Tensor) else 4
        padding = self.padding_on(device).view(-1, *[1] * (ndim - 1))
        evicted: Tensor = (num_evicted - padding).clamp(min=0) - (offset - padding).clamp(min=0)
        return evicted

    def true_positions(self, start: int, like: Tensor) -> Tensor:
        columns = super().true_positions(start, like)
        return (columns - self.padding_on(like.device)[:, None]).clamp(min=0)

    def position_ids(self, true_positions: Tensor) -> Tensor:
        offsets = self.offsets().to(true_positions.device)[:, None]
        return (true_positions - offsets).clamp(min=0)

    def mask(self, start: int, like: Tensor) -> Tensor:
        columns = torch.arange(start, start + like.shape[1], device=like.device)
        return (columns >= self.padding_on(like.device)[:, None]).long()


def token_positions(left_padding: Tensor | None, offset: int = 0, told: tuple[int, ...] = (0, 0)) -> TokenPositions:
    """Return the positions of a batch with or without left padding."""
    return TokenPositions(offset, told) if left_padding is None else PaddedTokenPositions(left_padding, offset, told)


def left_padding_of(attention_mask: Tensor | None) -> Tensor | None:
    """Return how many pads each row of a mask `[batch_size, length]` begins with; None if there are none.

    Raises:
        ValueError: if it is not such a mask, or is not padded on the left.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2 or attention_mask.is_complex():
        shape = [*attention_mask.shape] if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(f"`attention_mask` must be a tensor of shape [batch_size, prompt_length], got {shape}.")
    if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise ValueError("`attention_mask` must be 1 for tokens and 0 for padding, got other values.")
    mask = attention_mask.long()
    if not bool((mask[:, 1:] >= mask[:, :-1]).all()) or not bool((mask[:, -1:] == 1).all()):
        raise ValueError(
            "`attention_mask` must be padded on the left: zeros, then ones, in every row. Set the tokenizer's "
            "`padding_side` to 'left'. If the pad token is a word of the prompt, pass a mask of ones."
        )
    padding = mask.shape[1] - mask.sum(dim=1)
    return padding if bool(padding.any()) else None
