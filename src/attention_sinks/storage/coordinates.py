"""Positions that are not token counts: the grids of images and videos (M-RoPE).

Text stands at `(p, p, p)`, an image on a grid of positions, and the text after it goes on where the model says
(Qwen2-VL, arXiv 2409.12191): positions advance by less than tokens. Moving a token by the same number on all axes is
the ordinary rotation by that number, whatever its coordinates. So the sinks are rotated by one shift per row, counted
in coordinates instead of tokens, and recent keys are never rewritten.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .layout import Layout

# Beyond every coordinate.
_NEVER = torch.iinfo(torch.long).max // 4


@dataclass(frozen=True)
class Coordinates:
    """The coordinates of the last tokens of a stream, on the CPU. Immutable.

    Attributes:
        low: the smallest coordinate of the last columns, `[batch_size, num_columns]`; that of a pad is beyond all.
        following: where text goes on after each of them, `[batch_size, num_columns]`; at 0 after a pad.
        end_of_sinks: the largest coordinate of each sink plus one, `[batch_size, S]`.
        end: number of columns seen: the last column here is `end - 1`.
    """

    low: Tensor
    following: Tensor
    end_of_sinks: Tensor
    end: int

    @staticmethod
    def of_text(layout: Layout, seen: int, batch_size: int) -> "Coordinates":
        """Return the coordinates of a stream of `seen` tokens that are all text."""
        positions, start = layout.positions, max(seen - layout.window_length - 1, 0)
        nothing = torch.empty(batch_size, 0, dtype=torch.long)
        end_of_sinks = torch.arange(1, layout.num_sink_tokens + 1).expand(batch_size, -1)
        before = Coordinates(nothing, nothing, end_of_sinks, start)
        if seen == 0:
            return before
        text = positions.true_positions(start, torch.empty(batch_size, seen + 1 - start))
        # A position offset is that of recent tokens: sinks stay where they were fed.
        return replace(before.followed_by(layout, positions.position_ids(text)[None]), end_of_sinks=end_of_sinks)

    def text(self, layout: Layout, query_length: int) -> Tensor:
        """Return the positions of text that follows, `[batch_size, query_length]`; it begins behind pads to come."""
        start = self.following[:, -1:] if self.following.shape[1] > 0 else self.following.new_zeros(len(self.low), 1)
        numbers = torch.arange(query_length)
        if self.end < layout.positions.max_padding:
            num_pads = (layout.positions.padding_of(len(self.low))[:, None] - self.end).clamp(min=0)
            numbers = (numbers - num_pads).clamp(min=0)
        return start + numbers

    def before(self, end: int) -> "Coordinates":
        """Return the coordinates of the first `end` columns; later ones were taken back."""
        length = self.low.shape[1] - (self.end - end)
        return replace(self, low=self.low[:, :length], following=self.following[:, :length], end=end)

    def followed_by(self, layout: Layout, positions: Tensor) -> "Coordinates":
        """Return the coordinates once new tokens were fed.

        Args:
            layout: the slots of the batch.
            positions: of the new tokens and of the text that would follow, `[num_axes, batch_size, query_length + 1]`.
        """
        lowest, largest = positions.amin(dim=0).cpu(), positions.amax(dim=0).cpu()
        batch_size, query_length = lowest.shape[0], lowest.shape[1] - 1
        padding = layout.positions.padding_of(batch_size)[:, None]
        is_pad = torch.arange(self.end, self.end + query_length) < padding
        low, after = lowest[:, :-1].masked_fill(is_pad, _NEVER), (largest[:, :-1] + 1).masked_fill(is_pad, 0)
        # Each sink asks which of the new tokens it is.
        source = padding + torch.arange(layout.num_sink_tokens) - self.end
        is_new = (source >= 0) & (source < query_length)
        end_of_sinks = torch.where(is_new, after.gather(1, source.clamp(0, query_length - 1)), self.end_of_sinks)
        if len(positions) > 1:  # the last token of a long video stands further than the text behind it
            on_grid = lowest != largest
            after = torch.where(on_grid[:, :-1] & ~on_grid[:, 1:], largest[:, 1:], after)
        after[:, -1] = largest[:, -1]
        # One more than the window: text goes on behind it if all that a window without sinks holds is taken back.
        known = slice(max(self.low.shape[1] - layout.window_length - 1, 0), None)
        return Coordinates(
            torch.cat([self.low[:, known], low], dim=1),
            torch.cat([self.following[:, known], after], dim=1),
            end_of_sinks,
            self.end + query_length,
        )

    def shift(self, layout: Layout, num_evicted: Tensor, ends: Tensor) -> Tensor:
        """Return by how much the sinks are rotated: what closes the gap to the recent tokens, `[batch_size, n]`.

        Args:
            layout: the slots of the batch.
            num_evicted: number of evicted tokens, `[n]`.
            ends: number of columns that are seen then, `[n]`.
        """
        padding = layout.positions.padding_of(len(self.low))[:, None]
        columns = torch.arange(self.end - self.low.shape[1], self.end)
        first = torch.maximum(num_evicted, padding) + layout.num_sink_tokens
        is_recent = (columns >= first[..., None]) & (columns < ends[:, None])
        lowest = self.low[:, None].masked_fill(~is_recent, _NEVER).amin(dim=2)
        # Without recent tokens, which a crop took back, the next one will be the first.
        lowest = lowest.where(lowest < _NEVER, self.following[:, ends - 1 - columns[0]])
        end_of_sinks = self.end_of_sinks.amax(dim=1)[:, None] if layout.num_sink_tokens > 0 else 0
        return (lowest - end_of_sinks).where(num_evicted > padding, 0)

    def lowered(self, shift: Tensor) -> "Coordinates":
        """Return the coordinates once recent tokens were moved back by `shift` `[batch_size]`; the sinks stay."""
        low = (self.low - shift[:, None]).where(self.low < _NEVER, _NEVER)
        return replace(self, low=low, following=(self.following - shift[:, None]).clamp(min=0))

    def compacted(self, layout: Layout, num_evicted: int) -> "Coordinates":
        """Return the coordinates once evicted columns are not counted: the sinks take the last ones of these."""
        first = num_evicted - (self.end - self.low.shape[1])
        low, following = self.low[:, first:], self.following[:, first:].clone()
        has_evicted = num_evicted > layout.positions.padding_of(len(low))[:, None]
        sinks = following[:, : layout.num_sink_tokens]
        sinks.copy_(self.end_of_sinks[:, : sinks.shape[1]].where(has_evicted, sinks))
        return Coordinates(low, following, self.end_of_sinks, self.end - num_evicted)

    def select_rows(self, index: Tensor) -> "Coordinates":
        """Return the coordinates of the rows at `index`."""
        index = index.cpu()
        low, following, end_of_sinks = self.low[index], self.following[index], self.end_of_sinks[index]
        return Coordinates(low, following, end_of_sinks, self.end)


def coordinates_after(
    known: Coordinates | None, layout: Layout, seen: int, query_length: int, positions: Tensor | None
) -> Coordinates | None:
    """Return the coordinates after a forward pass, or None if all tokens of the stream are counted as text.

    Args:
        known: those before it, or None if all were text so far.
        layout, seen, query_length: of the pass.
        positions: of the new tokens, see `Coordinates.followed_by`, or None for text.
    """
    if known is None:
        if positions is None:
            return None
        known = Coordinates.of_text(layout, seen, positions.shape[1])
    known = known.before(seen)
    if positions is None:
        positions = known.text(layout, query_length + 1)[None]
    return known.followed_by(layout, positions)
