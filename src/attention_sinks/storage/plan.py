"""What one forward pass does to every layer of a cache, computed once for all of them.

A `Stream` makes the plan when the model asks for the sizes of its mask, or at the first update, and drops it when the
last layer was reached, or, where indexers follow the layers, at the next pass. A plan is a pure function of the layout,
the tokens seen before the pass and the number of new ones; it remembers what it computes on demand.
"""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..rope import Rotation
from .coordinates import Coordinates
from .layout import Layout, num_recent_in_window

_T = TypeVar("_T")


def num_evicted_after(seen: int, window_length: int, num_evicted: int) -> int:
    """Return the number of evicted tokens after `seen` ones, of which `num_evicted` do not come back."""
    return max(num_evicted, seen - window_length)


class UpdatePlan:
    """One forward pass of `query_length` tokens. Immutable, but for what it remembers.

    Args:
        layout: the slots and positions of the batch.
        start: number of tokens seen before the pass.
        query_length: number of new tokens.
        num_evicted: number of evicted tokens that a `crop` does not bring back, 0 without one.
        in_order: return the tokens in the order of their positions, always.
        all_slots: return all W slots for a single token, full or not, as a compiled step does.
        rebased: the caller gives the model positions as `TokenPositions.position_ids` counts them.
        coordinates: those of the tokens after the pass, if positions are not token counts.

    Attributes:
        evicted: number of evicted tokens when the first query looks: by as many positions the sinks are rotated, less
            the position offset and the padding of a row.
        kv_length, kv_offset: what `get_mask_sizes` announces and `update` returns.
        overwrites: True if the pass writes one token over the oldest one and returns the slots as they lie.
        stores_sinks: True if the new tokens may be sinks of some row.
        rotates_sinks: True if the sinks do not act where they were fed.
    """

    def __init__(
        self,
        layout: Layout,
        start: int,
        query_length: int,
        num_evicted: int = 0,
        in_order: bool = False,
        all_slots: bool = False,
        rebased: bool = False,
        coordinates: Coordinates | None = None,
    ) -> None:
        self.layout = layout
        self.start = start
        self.query_length = query_length
        self.all_slots = all_slots
        self.rebased = rebased
        self.coordinates = coordinates
        overflow = start + 1 - layout.window_length
        # The shift of the first query holds for the whole pass.
        self.evicted = num_evicted_after(start + min(query_length, 1), layout.window_length, num_evicted)
        self.overwrites = query_length == 1 and not in_order and (all_slots or overflow >= num_evicted)
        self.kv_length, self.kv_offset = start + query_length - self.evicted, self.evicted
        if all_slots:
            self.kv_length, self.kv_offset = layout.window_length, max(overflow, 0)
        self.stores_sinks = not layout.has_all_sinks(start)
        self.rotates_sinks = self.evicted > 0
        self._memo: dict[Hashable, Any] = {}

    @property
    def end(self) -> int:
        """Number of tokens seen after the pass."""
        return self.start + self.query_length

    @property
    def is_below_window(self) -> bool:
        """True if nothing is evicted by the end of the pass, so that the slots hold the tokens in order."""
        return self.end <= self.layout.window_length and self.evicted == 0

    def fits(self, start: int, query_length: int) -> bool:
        """Return True if this is the plan for `query_length` new tokens after `start` ones."""
        return (start, query_length) == (self.start, self.query_length)

    def once(self, key: Hashable, function: Callable[..., _T], *arguments: Any) -> _T:
        """Return `function(*arguments)`, computed once per pass for each key."""
        memo = self._memo
        if key in memo:
            computed: _T = memo[key]
            return computed
        memo[key] = computed = function(*arguments)
        return computed

    def token_indices(self, device: torch.device) -> Tensor:
        """Return in which column of all that was fed the token of each returned key stands, -1 for no token.

        The shape is `[1 or batch_size, kv_length]`.
        """
        layout = self.layout
        if self.overwrites:
            return layout.columns_of(layout.tokens_in_slots(self.end, self.evicted, device))
        kept = layout.kept_tokens(self.start, self.evicted, device)
        return layout.columns_of(torch.cat([kept, layout.tokens_between(self.start, self.end, device)], dim=1))

    def slot_mapping(self, device: torch.device) -> Tensor:
        """Return the slot of the single new token, `[1]`, or `[batch_size, 1]` with left padding."""
        return self.once(("slot", device), self.layout.token_slot, self.start, device)

    def step_slots(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the slots of sinks and new token, `[S + 1]` or `[batch_size, S + 1]`, and that of the token alone."""
        return self.once(device, self._step_slots, device)

    def _step_slots(self, device: torch.device) -> tuple[Tensor, Tensor]:
        slots = self.layout.sink_and_token_slots(self.start, device)
        return slots, slots.narrow(-1, self.layout.num_sink_tokens, 1)

    def cos_sin(self, rotation: Rotation, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return what rotates the pristine sinks to where they act: `[2, ..., rotary_dim / 2]`, see `Rotation`."""
        return self.once((rotation, dtype, device), self._cos_sin, rotation, dtype, device)

    def _cos_sin(self, rotation: Rotation, dtype: torch.dtype, device: torch.device) -> Tensor:
        return rotation.cos_sin(self.shift(rotation.inv_freq.device), dtype).to(device)

    def shift(self, device: torch.device) -> Any:
        """Return by how many positions the sinks are rotated, a number or a tensor with one for each row."""
        if self.coordinates is not None:
            evicted, end = torch.tensor([self.evicted]), torch.tensor([self.end])
            return self.coordinates.shift(self.layout, evicted, end)[:, :, None, None].to(device)
        positions = self.layout.positions
        return positions.shift(self.evicted, positions.offset, device)


class WindowedPlan(UpdatePlan):
    """A chunk whose queries each see exactly their own window, by a mask that belongs to the plan.

    `update` returns the sinks once per query, each copy rotated for its query, then the recent tokens and the chunk.

    Args:
        layout, start, query_length, num_evicted, coordinates: see `UpdatePlan`.
        shares_buffers: let all layers return the same memory in turn: no layer reads what another one returned.
    """

    def __init__(
        self,
        layout: Layout,
        start: int,
        query_length: int,
        num_evicted: int = 0,
        shares_buffers: bool = False,
        coordinates: Coordinates | None = None,
    ) -> None:
        super().__init__(layout, start, query_length, num_evicted, rebased=True, coordinates=coordinates)
        self.overwrites = False
        self.shares_buffers = shares_buffers
        self.num_recent = num_recent_in_window(layout, start)
        self.kv_length = query_length * layout.num_sink_tokens + self.num_recent + query_length
        self.kv_offset = self.end - self.kv_length

    def shift(self, device: torch.device) -> Any:
        """Return the shift of the sinks for each query, `[batch_size or 1, 1, query_length, 1, 1]`."""
        first = self.start + 1 - self.layout.window_length
        if self.coordinates is not None:
            evicted = torch.arange(first, first + self.query_length)
            shift = self.coordinates.shift(self.layout, evicted.clamp(min=0), evicted + self.layout.window_length)
            return shift[:, None, :, None, None].to(device)
        evicted = torch.arange(first, first + self.query_length, device=device).clamp(min=0)
        positions = self.layout.positions
        return positions.shift(evicted.view(1, 1, -1, 1, 1), positions.offset, device)

    def token_indices(self, device: torch.device) -> Tensor:
        layout, first = self.layout, self.start - self.num_recent
        others = layout.tokens_between(first, self.end, device)
        sinks = torch.arange(layout.num_sink_tokens, device=device).repeat(self.query_length).expand(len(others), -1)
        # A row may have fewer tokens than sinks.
        sinks = torch.where(sinks <= others[:, -1:], sinks, -1)
        return layout.columns_of(torch.cat([sinks, others], dim=1))

    def visible(self, device: torch.device) -> Callable[..., Any]:
        """Return which keys a query sees, as a mask function of `transformers`."""
        return self.layout.window_mask(self.start, self.query_length, device)

    def concatenated(self, name: str, parts: list[Tensor]) -> Tensor:
        """Concatenate parts along the tokens, in a buffer that all layers of the same shape use in turn.

        A layer's attention is over when the next layer is updated, and fresh memory costs page faults.
        """
        if torch.is_grad_enabled() or not self.shares_buffers:
            return torch.cat(parts, dim=2)
        like = parts[-1]
        shape = (*like.shape[:2], self.kv_length, like.shape[3])
        buffer = self.once((name, shape, like.dtype, like.device), like.new_empty, shape)
        return torch.cat(parts, dim=2, out=buffer)
