"""Where the tokens of each row of a batch lie and how far they are turned, computed once a step for all layers.

Knows neither models nor stored states.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .rope import Rotation

_T = TypeVar("_T")


class Rows:
    """What the layers of a cache share: padding, rebasing, and what one step computes for all of them.

    In a batch padded on the left, token `t` of row `b` stands in column `t + pads[b]`, and the mask of `generate`
    covers the last columns. So the slots of a row without a token must be its first ones: its tokens fill the slots
    from `pads[b]` to W in their order, then those before from right to left, and then the ring goes round.

    Args:
        window_length, num_sink_tokens: those of the cache.
        pads: how many columns of padding each row begins with; None if there are none.
    """

    def __init__(self, window_length: int, num_sink_tokens: int, pads: Tensor | None) -> None:
        self.window_length = window_length
        self.num_sink_tokens = num_sink_tokens
        self.pads = pads
        self.most_pads = self.least_pads = 0
        if pads is not None:
            self.most_pads, self.least_pads = int(pads.max()), int(pads.min())
        # Positions are counted from where they were when so many tokens had been evicted.
        self.base = 0
        # Whether the model is being given positions that are lower by as much.
        self.lowered = False
        # Whether `update` returns what lets every query of a chunk see exactly its own window.
        self.windowed = False
        self._computed: dict[Any, Any] = {}

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.pads is not None:
            self.pads = function(self.pads)
            self._computed.clear()

    def offsets(self) -> int | Tensor:
        """How far positions were wound back, for all rows or `[batch_size]`."""
        return self.base if self.pads is None else (self.base - self.pads).clamp(min=0)

    def phase(self, rotation: Rotation, shift: int, states: Tensor) -> Tensor:
        """The factors that turn `states` `[batch_size, ..., rotary_dim / 2]` to where they act after `shift` evictions.

        They are for states that act at `offsets()`.
        """

        def compute(device: torch.device) -> int | Tensor:
            pads = self._pads_on(device)
            if pads is None:
                return shift - self.base
            evicted: Tensor = (shift - pads).clamp(min=0) - (self.base - pads).clamp(min=0)
            return evicted[:, None, None, None]

        return self._phase(("phase", shift), rotation, states, compute)

    def windowed_phase(self, rotation: Rotation, seen: int, query_length: int, states: Tensor) -> Tensor:
        """The same for the window of every query, `[batch_size or 1, 1, query_length, 1, rotary_dim / 2]`."""

        def compute(device: torch.device) -> Tensor:
            evicted = torch.arange(query_length, device=device)[None] + (seen + 1 - self.window_length)
            pads = self._pads_on(device)
            if pads is None:
                shifts = evicted.clamp(min=0) - self.base
            else:
                shifts = (evicted - pads[:, None]).clamp(min=0) - (self.base - pads[:, None]).clamp(min=0)
            return shifts[:, None, :, None, None]

        return self._phase(("windowed", seen, query_length), rotation, states, compute)

    def _phase(self, key: Any, rotation: Rotation, states: Tensor, shift: Callable[[torch.device], Any]) -> Tensor:
        device = states.device
        # MPS has no float64.
        on = torch.device("cpu") if device.type == "mps" else device
        there = self._once(("rotation", rotation, on), lambda: rotation.to(on))
        return self._once(
            (*key, rotation, device, states.dtype, self.base),
            lambda: there.phase(shift(on), states.dtype).to(device),
        )

    def _once(self, key: Any, compute: Callable[[], _T]) -> _T:
        if key not in self._computed:
            if len(self._computed) > 64:  # those of earlier steps
                self._computed.clear()
            self._computed[key] = compute()
        computed: _T = self._computed[key]
        return computed

    def _pads_on(self, device: torch.device) -> Any:
        pads = self.pads
        return None if pads is None else self._once(("pads", device), lambda: pads.to(device))

    def _slots(self, tokens: Tensor, device: torch.device) -> Tensor:
        """The slots of tokens `[k]`, or `[batch_size, k]` of a padded batch."""
        window_length, num_sinks = self.window_length, self.num_sink_tokens
        in_ring = num_sinks + (tokens - num_sinks) % (window_length - num_sinks)
        slots = torch.where(tokens < window_length, tokens, in_ring)
        pads = self._pads_on(device)
        if pads is None:
            return slots
        pads = pads.clamp(max=window_length)[:, None]
        return torch.where(slots < window_length - pads, pads + slots, window_length - 1 - slots)

    def sink_slots(self, device: torch.device) -> Tensor:
        def compute() -> Tensor:
            tokens = torch.arange(self.num_sink_tokens, device=device)
            return self._slots(tokens if self.pads is None else tokens.expand(len(self.pads), -1), device)

        return self._once(("sinks", device), compute)

    def all_sinks_seen(self, seen: int) -> bool:
        return seen - self.most_pads >= self.num_sink_tokens

    def new_slots(self, seen: int, device: torch.device) -> Tensor:
        """Where the next token of each row of a padded batch goes, `[batch_size, 1]`."""
        return self._once(("new", seen, device), lambda: self._slots(seen - self._pads_on(device)[:, None], device))

    def ordered_slots(self, seen: int, length: int, device: torch.device) -> Tensor:
        """The sinks and the last tokens of each row, `length` in all, in order; empty slots come first."""

        def compute() -> Tensor:
            held = seen - self._pads_on(device)[:, None]
            missing = length - held.clamp(0, length)
            tokens = torch.arange(length, device=device) - missing
            tokens = torch.where(tokens < self.num_sink_tokens, tokens, held - length + missing + tokens)
            return self._slots(tokens.clamp(min=0), device)

        return self._once(("ordered", seen, length, device), compute)

    def sources(self, seen: int, query_length: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Which of a chunk's tokens go into the slots, or to the sinks, and where in the chunk they are.

        Two tensors `[batch_size, length]` for W slots or S sinks: whether it gets a new token, and that one's index.
        """

        def compute() -> tuple[Tensor, Tensor]:
            pads = self._pads_on(device)[:, None]
            tokens = torch.arange(length, device=device)[None]
            if length == self.window_length:
                empty = pads.clamp(max=length)
                tokens = torch.where(tokens >= empty, tokens - empty, length - 1 - tokens)
            end = seen + query_length - pads
            ring_length = self.window_length - self.num_sink_tokens
            laps = (end - 1 - tokens).clamp(min=0) // ring_length
            tokens = torch.where(tokens < self.num_sink_tokens, tokens, tokens + ring_length * laps)
            source = tokens + pads - seen
            return (source >= 0) & (tokens < end), source.clamp(0, query_length - 1)

        return self._once(("sources", seen, query_length, length, device), compute)

    def _windowed_recent(self, seen: int) -> int:
        return min(seen, self.window_length - self.num_sink_tokens - 1)

    def windowed_slots(self, seen: int, device: torch.device) -> Tensor:
        """Where the tokens lie that the first query of a chunk sees beside the sinks and itself."""

        def compute() -> Tensor:
            tokens = torch.arange(seen - self._windowed_recent(seen), seen, device=device)
            pads = self._pads_on(device)
            if pads is not None:
                tokens = (tokens - pads[:, None]).clamp(min=0)
            return self._slots(tokens, device)

        return self._once(("windowed slots", seen, device), compute)

    def windowed_length(self, seen: int, query_length: int) -> int:
        return query_length * self.num_sink_tokens + self._windowed_recent(seen) + query_length

    def windowed_mask(self, seen: int, query_length: int, device: torch.device) -> Callable[[Any, Any, Any, Any], Any]:
        """Which keys of a windowed update a query sees, as the mask functions of `transformers` say it."""

        def visible(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
            num_sinks, pads = self.num_sink_tokens, self._pads_on(device)
            padding = 0 if pads is None else pads[batch_idx]
            own_copy = kv_idx // max(num_sinks, 1) == q_idx
            query = seen + q_idx - padding
            copies = query_length * num_sinks
            column = seen - self._windowed_recent(seen) + kv_idx - copies
            token = column - padding
            evicted = (query + 1 - self.window_length).clamp(min=0)
            in_window = (token >= num_sinks + evicted) & (token <= query)
            # A pad must see something, or its state is no number; it sees itself.
            in_window = in_window | ((query < 0) & (token == query))
            is_copy = kv_idx < copies
            return (is_copy & own_copy & (kv_idx % max(num_sinks, 1) <= query)) | (~is_copy & in_window)

        return visible


def spread(index: Tensor, states: Tensor) -> Tensor:
    """An index `[batch_size, k]` of tokens for `gather` and `scatter` on states `[batch_size, heads, tokens, dim]`."""
    return index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])


def take(states: Tensor, index: Tensor) -> Tensor:
    """A copy of the tokens at an index `[k]`, the same for all rows, or `[batch_size, k]`."""
    return states.index_select(2, index) if index.ndim == 1 else states.gather(2, spread(index, states))
