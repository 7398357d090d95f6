"""Which slot of a layer holds which token of a row, and at which position the token stands.

A layout is immutable: a change of the batch or of the positions makes a new one. It computes indices and moves states;
the caller passes the number of tokens.
"""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .positions import PaddedTokenPositions, TokenPositions

_T = TypeVar("_T")
# Call a function, given after a key, once per forward pass for each key. The plan of the pass provides it.
Once = Callable[..., Any]


def compute(_: Hashable, function: Callable[..., _T], *arguments: Any) -> _T:
    """An `Once` that remembers nothing, for changes outside of a forward pass."""
    return function(*arguments)


class Layout:
    """The slots of a batch without left padding.

    Token `t` lies in slot `t` while the window is not full, and in slot `S + (t - S) % (W - S)` from then on
    (W = `window_length`, S = `num_sink_tokens`).

    Args:
        window_length: number of slots.
        num_sink_tokens: number of sink tokens, which keep the first slots.
        positions: at which position a token stands.
    """

    # True if all rows evict a token at the same time.
    evicts_together = True

    def __init__(self, window_length: int, num_sink_tokens: int, positions: TokenPositions) -> None:
        self.window_length = window_length
        self.num_sink_tokens = num_sink_tokens
        self.positions = positions
        self._on_device: dict[Hashable, Tensor] = {}

    def slot(self, token: int) -> int:
        """Return the slot of a token."""
        num_sinks = self.num_sink_tokens
        in_ring = num_sinks + (token - num_sinks) % (self.window_length - num_sinks)
        return token if token < self.window_length else in_ring

    def _slots(self, tokens: Tensor) -> Tensor:
        """Return the slots of tokens `[1 or batch_size, k]`."""
        return self._ring_slots(tokens)

    def _ring_slots(self, tokens: Tensor) -> Tensor:
        num_sinks = self.num_sink_tokens
        in_ring = num_sinks + (tokens - num_sinks) % (self.window_length - num_sinks)
        return torch.where(tokens < self.window_length, tokens, in_ring)

    def next_slots(self, seen: Tensor) -> Tensor:
        """Return the slot of the token after `seen` `[1]` tokens: `[1]`, or `[batch_size, 1]` with left padding."""
        return self._ring_slots(seen)

    def token_slot(self, seen: int, device: torch.device) -> Tensor:
        """Return the same after a number of tokens that Python knows."""
        return torch.full((1,), self.slot(seen), device=device)

    def sink_and_token_slots(self, seen: int, device: torch.device) -> Tensor:
        """Return the slots of the sinks and of the token after `seen` ones, `[S + 1]` or `[batch_size, S + 1]`."""
        if not self.has_all_sinks(seen):
            sinks = self._kept("sink slots", device, lambda: self.sink_slots(device))
            return torch.cat([sinks, self.token_slot(seen, device)], dim=-1)
        return self._sinks_and_last(device).clamp(max=self.slot(seen))

    def _sinks_and_last(self, device: torch.device) -> Tensor:
        """Return 0, 1, ..., S - 1 and a number above all slots and tokens, to be lowered to one of them, `[S + 1]`."""

        def function() -> Tensor:
            numbers = torch.arange(self.num_sink_tokens + 1, device=device)
            numbers[self.num_sink_tokens] = torch.iinfo(numbers.dtype).max
            return numbers

        return self._kept("sinks and last", device, function)

    def sink_slots(self, device: torch.device) -> Tensor:
        """Return the slots of the sinks, `[S]`, or `[batch_size, S]` with left padding."""
        return torch.arange(self.num_sink_tokens, device=device)

    def sinks(self, slots: Tensor) -> Tensor:
        """Return what lies in the slots of the sinks, `[batch_size, num_heads, S, head_dim]`."""
        return slots[:, :, : self.num_sink_tokens]

    def _kept(self, name: str, device: torch.device, function: Callable[[], Tensor]) -> Tensor:
        """Return what stays on a device as long as the layout."""
        if (name, device) not in self._on_device:
            with torch.inference_mode(False):  # autograd could not save a tensor of inference mode
                self._on_device[name, device] = function()
        return self._on_device[name, device]

    def has_all_sinks(self, seen: int) -> bool:
        """Return True if every row has all its sinks after `seen` tokens."""
        return seen - self.positions.max_padding >= self.num_sink_tokens

    def recent_in_order(self, slots: Tensor, seen: int, length: int, once: Once) -> list[Tensor]:
        """Return the last `length` of `seen` tokens, in order, as parts to concatenate."""
        first = seen - length
        num_sinks = min(max(self.num_sink_tokens - first, 0), length)
        start = self.slot(first + num_sinks)
        wrapped = max(start + length - num_sinks - self.window_length, 0)
        return [
            slots[:, :, first : first + num_sinks],
            slots[:, :, start : start + length - num_sinks - wrapped],
            slots[:, :, self.num_sink_tokens : self.num_sink_tokens + wrapped],
        ]

    def kept_in_order(
        self, slots: Tensor, seen: int, num_evicted: int, sinks: Tensor | None, once: Once
    ) -> list[Tensor]:
        """Return the kept tokens of `seen` ones, in order, as parts to concatenate.

        Args:
            slots: `[batch_size, num_heads, W, head_dim]`.
            seen: number of tokens that were fed.
            num_evicted: number of tokens that no query sees any more; the sinks are not among them.
            sinks: what to return in the place of the sinks, if not what lies in their slots.
            once: see `Once`.
        """
        num_sinks = min(self.num_sink_tokens, seen)
        first = slots if sinks is None else sinks
        recent = self.recent_in_order(slots, seen, max(seen - num_evicted - num_sinks, 0), once)
        return [first[:, :, :num_sinks], *recent]

    def tokens_between(self, first: int, end: int, device: torch.device) -> Tensor:
        """Return which token of each row stands in the columns `first` to `end`, `[1 or batch_size, length]`.

        Columns are counted as they were fed. A pad has a negative number.
        """
        return torch.arange(first, end, device=device)[None]

    def kept_tokens(self, seen: int, num_evicted: int, device: torch.device) -> Tensor:
        """Return the kept tokens of each row in order, `[1 or batch_size, seen - num_evicted]`.

        A row with fewer tokens begins with negative numbers.
        """
        tokens = torch.arange(seen - num_evicted, device=device)[None]
        return torch.where(tokens < self.num_sink_tokens, tokens, tokens + num_evicted)

    def tokens_in_slots(self, seen: int, num_evicted: int, device: torch.device) -> Tensor:
        """Return which of the kept tokens lies in each slot, `[1 or batch_size, W]`, -1 for none."""
        tokens = self.kept_tokens(seen, num_evicted, device)
        slots = torch.where(tokens < 0, self.window_length, self._slots(tokens.clamp(min=0)))
        in_slots = tokens.new_full((len(tokens), self.window_length + 1), -1)
        return in_slots.scatter_(1, slots, tokens)[:, : self.window_length]

    def columns_of(self, tokens: Tensor) -> Tensor:
        """Return in which columns, counted as they were fed, tokens `[1 or batch_size, k]` stand; -1 for no token."""
        return tokens.clamp(min=-1)

    def write(self, slots: Tensor, states: Tensor, seen: int, once: Once) -> None:
        """Write the states of new tokens into their slots, over the tokens that they evict."""
        query_length = states.shape[2]
        num_sinks = min(max(self.num_sink_tokens - seen, 0), query_length)
        slots[:, :, seen : seen + num_sinks] = states[:, :, :num_sinks]
        # Of a chunk that is longer than the ring only the last tokens stay.
        skipped = max(num_sinks, query_length - (self.window_length - self.num_sink_tokens))
        first = self.slot(seen + skipped)
        straight = min(query_length - skipped, self.window_length - first)
        slots.narrow(2, first, straight).copy_(states.narrow(2, skipped, straight))
        if skipped + straight < query_length:
            wrapped = states[:, :, skipped + straight :]
            slots[:, :, self.num_sink_tokens : self.num_sink_tokens + wrapped.shape[2]] = wrapped

    def write_sinks(self, sinks: Tensor, states: Tensor, seen: int, once: Once) -> None:
        """Store the sinks among new tokens `[batch_size, num_heads, query_length, head_dim]` in `sinks`."""
        num_sinks = min(max(self.num_sink_tokens - seen, 0), states.shape[2])
        if num_sinks > 0:
            sinks[:, :, seen : seen + num_sinks] = states[:, :, :num_sinks]

    def window_mask(self, seen: int, query_length: int, device: torch.device) -> Callable[..., Any]:
        """Return which keys of a windowed chunk a query sees, as a mask function of `transformers`.

        The keys are the sinks once per query, then the recent tokens, then the chunk.
        """
        num_sinks, copies = self.num_sink_tokens, query_length * self.num_sink_tokens
        first_recent = seen - num_recent_in_window(self, seen)

        def visible(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
            padding = self._padding_of(batch_idx, device)
            own_copy = kv_idx // max(num_sinks, 1) == q_idx
            query = seen + q_idx - padding
            token = first_recent + kv_idx - copies - padding
            evicted = (query + 1 - self.window_length).clamp(min=0)
            in_window = (token >= num_sinks + evicted) & (token <= query)
            # A pad must see something, or its state is not a number: it sees itself.
            in_window = in_window | ((query < 0) & (token == query))
            is_copy = kv_idx < copies
            return (is_copy & own_copy & (kv_idx % max(num_sinks, 1) <= query)) | (~is_copy & in_window)

        return visible

    def _padding_of(self, batch_idx: Any, device: torch.device) -> Any:
        return 0


class PaddedLayout(Layout):
    """The slots of a batch with left padding.

    Token `t` of row `b` stands in column `t + left_padding[b]`, and the mask of `generate` covers the last columns. So
    the slots of a row that hold no token must be its first ones: its tokens fill the slots from `left_padding[b]` to W
    in order, then the slots before from right to left. From then on the ring goes round. Until a token takes its slot,
    a pad lies in the slot of its column: a mask hides it, but attention of other pads may see it.
    """

    evicts_together = False
    positions: PaddedTokenPositions

    def _slots(self, tokens: Tensor) -> Tensor:
        slots = self._ring_slots(tokens)
        padding = self.positions.padding_on(tokens.device).clamp(max=self.window_length)[:, None]
        return torch.where(slots < self.window_length - padding, padding + slots, self.window_length - 1 - slots)

    def next_slots(self, seen: Tensor) -> Tensor:
        return self._slots(self._tokens(seen, seen.device))

    def token_slot(self, seen: int, device: torch.device) -> Tensor:
        return self._slots(self._tokens(seen, device))

    def sink_and_token_slots(self, seen: int, device: torch.device) -> Tensor:
        if not self.has_all_sinks(seen):
            return super().sink_and_token_slots(seen, device)
        return self._slots(torch.minimum(self._sinks_and_last(device), self._tokens(seen, device)))

    def _tokens(self, seen: Any, device: torch.device) -> Tensor:
        """Return which token of each row comes after `seen` ones, `[batch_size, 1]`; the first one for a pad."""
        tokens: Tensor = (seen - self.positions.padding_on(device)[:, None]).clamp(min=0)
        return tokens

    def sink_slots(self, device: torch.device) -> Tensor:
        tokens = torch.arange(self.num_sink_tokens, device=device)
        return self._slots(tokens.expand(self.positions.num_rows, -1))

    def sinks(self, slots: Tensor) -> Tensor:
        return read_slots(slots, self.sink_slots(slots.device))

    def recent_in_order(self, slots: Tensor, seen: int, length: int, once: Once) -> list[Tensor]:
        def function() -> Tensor:
            tokens = torch.arange(seen - length, seen, device=slots.device)
            return self._slots((tokens - self.positions.padding_on(slots.device)[:, None]).clamp(min=0))

        return [read_slots(slots, once(("recent", seen, length, slots.device), function))]

    def kept_in_order(
        self, slots: Tensor, seen: int, num_evicted: int, sinks: Tensor | None, once: Once
    ) -> list[Tensor]:
        if num_evicted == 0:
            return [slots[:, :, :seen]]  # each column in its own slot
        length, device = seen - num_evicted, slots.device

        def function() -> Tensor:
            return self._slots(self.kept_tokens(seen, num_evicted, device).clamp(min=0))

        if sinks is not None:
            slots = write_slots(slots.clone(), self.sink_slots(device), sinks)
        return [read_slots(slots, once(("kept", seen, length, device), function))]

    def tokens_between(self, first: int, end: int, device: torch.device) -> Tensor:
        return super().tokens_between(first, end, device) - self.positions.padding_on(device)[:, None]

    def kept_tokens(self, seen: int, num_evicted: int, device: torch.device) -> Tensor:
        length, held = seen - num_evicted, seen - self.positions.padding_on(device)[:, None]
        missing = length - held.clamp(0, length)
        tokens = torch.arange(length, device=device) - missing
        return torch.where(tokens < self.num_sink_tokens, tokens, held - length + missing + tokens)

    def columns_of(self, tokens: Tensor) -> Tensor:
        return torch.where(tokens < 0, -1, tokens + self.positions.padding_on(tokens.device)[:, None])

    def write(self, slots: Tensor, states: Tensor, seen: int, once: Once) -> None:
        self._write(slots, states, seen, once)

    def write_sinks(self, sinks: Tensor, states: Tensor, seen: int, once: Once) -> None:
        if not self.has_all_sinks(seen):
            self._write(sinks, states, seen, once)

    def _write(self, stored: Tensor, states: Tensor, seen: int, once: Once) -> None:
        """Write new tokens into W slots, or into the S slots of pristine sinks.

        Several pads may map to one slot, and a scatter with equal indices has no order on CUDA: each slot asks instead
        which token it gets.
        """
        query_length, length, device = states.shape[2], stored.shape[2], states.device
        key = ("sources", seen, query_length, length, device)
        is_new, source = once(key, self._sources, seen, query_length, length, device)
        stored.copy_(torch.where(is_new[:, None, :, None], read_slots(states, source), stored))

    def _sources(self, seen: int, query_length: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return which slots get a token of a chunk, and the index of that token in the chunk.

        Two tensors `[batch_size, length]`, for W slots or for S sinks.
        """
        padding = self.positions.padding_on(device)[:, None]
        tokens = torch.arange(length, device=device)[None]
        if length == self.window_length:
            empty = padding.clamp(max=length)
            tokens = torch.where(tokens >= empty, tokens - empty, length - 1 - tokens)
        end = seen + query_length - padding
        ring_length = self.window_length - self.num_sink_tokens
        laps = (end - 1 - tokens).clamp(min=0) // ring_length
        tokens = torch.where(tokens < self.num_sink_tokens, tokens, tokens + ring_length * laps)
        if length == self.window_length and seen < self.positions.max_padding:
            # Where no token lies yet, the pad of that column.
            pads = torch.arange(length, device=device) - padding
            tokens = torch.where((tokens >= end) & (pads < 0), pads, tokens)
        source = tokens + padding - seen
        return (source >= 0) & (tokens < end), source.clamp(0, query_length - 1)

    def _padding_of(self, batch_idx: Any, device: torch.device) -> Any:
        return self.positions.padding_on(device)[batch_idx]


def layout_of(window_length: int, num_sink_tokens: int, positions: TokenPositions) -> Layout:
    """Return the layout of a batch whose tokens stand at `positions`."""
    kind = PaddedLayout if isinstance(positions, PaddedTokenPositions) else Layout
    return kind(window_length, num_sink_tokens, positions)


def num_recent_in_window(layout: Layout, seen: int) -> int:
    """Return how many recent tokens the first query of a windowed chunk sees, besides the sinks and itself."""
    return min(seen, layout.window_length - layout.num_sink_tokens - 1)


def expand_index(index: Tensor, states: Tensor) -> Tensor:
    """Expand an index `[batch_size, k]` for `gather` and `scatter` on `[batch_size, num_heads, tokens, head_dim]`."""
    return index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])


def write_slots(slots: Tensor, index: Tensor, states: Tensor) -> Tensor:
    """Write states into the slots `[k]`, the same for all rows, or `[batch_size, k]`, in place."""
    if index.ndim == 1:
        return slots.index_copy_(2, index, states)
    return slots.scatter_(2, expand_index(index, states), states)


def read_slots(slots: Tensor, index: Tensor) -> Tensor:
    """Return a copy of the slots `[k]`, the same for all rows, or `[batch_size, k]`."""
    return slots.index_select(2, index) if index.ndim == 1 else slots.gather(2, expand_index(index, slots))
