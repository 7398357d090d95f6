"""Where the tokens of each row of a batch lie and how far they are turned, computed once a step for all layers."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from .rope import Rotation

_T = TypeVar("_T")


def generate_compiles(device: torch.device | None) -> bool:
    """Whether `generate` of transformers compiles by itself on a device, or on one at hand, if the cache allows it."""
    if device is None:
        return torch.cuda.is_available() or torch.xpu.is_available()
    return device.type in {"cuda", "xpu"}


class Rows:
    """What the layers of a cache share: padding, rebasing, and what one step computes for all of them.

    In a batch padded on the left, token `t` of row `b` stands in column `t + pads[b]`, and the mask of `generate`
    covers the last columns. So the slots of a row without a token must be its first ones: its tokens fill the slots
    from `pads[b]` to W in their order, then those before from right to left, and then the ring goes round.

    Args:
        window_length, num_sink_tokens: those of the cache.
        compiles: whether single tokens can be taken by tensors alone, as `torch.compile` wants it.
        sliding: whether some mask is that of a sliding window of the model's own.
        longest_window: the most tokens that a layer of any kind holds.
    """

    def __init__(
        self, window_length: int, num_sink_tokens: int, compiles: bool, sliding: bool, longest_window: int
    ) -> None:
        self.window_length = window_length
        self.longest_window = longest_window
        self.num_sink_tokens = num_sink_tokens
        self.compiles = compiles
        self.sliding = sliding
        self.restart(None)

    def restart(self, pads: Tensor | None) -> None:
        """Begin a new stream; `pads` is how many columns of padding each row begins with, None if there are none."""
        self._set_pads(pads)
        # Positions are counted from where they were when so many tokens had been evicted.
        self.base = 0
        # Whether the model is being given positions that are lower by as much.
        self.lowered = False
        # Whether `update` returns what lets every query of a chunk see exactly its own window.
        self.windowed = False
        self._computed: dict[Any, Any] = {}
        # Whether states are being changed, or were when something interrupted it, so that they cannot be relied on.
        self.changing = False
        # What follows is about compiled steps. They cannot read numbers of Python, which change at every step, without
        # being compiled anew, but flags they can.
        self.all_sinks_born = False
        # Whether fewer tokens are held than fit, after a `crop`.
        self.has_gap = False
        # Where `generate` compiles by itself, single tokens are announced as a compiled step takes them, until it shows
        # that they are not compiled.
        self.accelerated = generate_compiles(None)
        self.eager_tokens = 0
        # Whether the mask of the coming single token is made for a step. Where only parts of a model are compiled it is
        # made by another one.
        self.masked_for_step = False
        # Whether compiled steps have counted tokens that Python does not know of, and how many there are at most.
        self.stale = False
        self.announced = 0
        self._groups: dict[Any, Group] = {}
        self.last_ring: Any = None

    def _set_pads(self, pads: Tensor | None) -> None:
        self.pads = pads
        self.most_pads = self.least_pads = 0
        if pads is not None:
            self.most_pads, self.least_pads = int(pads.max()), int(pads.min())

    def group_of(self, ring: Any) -> "Group":
        """The group of a ring that has just got its buffers."""
        device, sinks = ring.keys.device, None if ring.rotation is None else ring.sinks
        key = ring.rotation, device, ring.keys.dtype, None if sinks is None else sinks.shape
        if key not in self._groups:
            self.accelerated = generate_compiles(device)
            if not self._groups and self.pads is not None:
                self.pads = self.pads.to(device)
            self._groups[key] = Group(self, ring.rotation, device)
        group = self._groups[key]
        group.rings.append(ring)
        group.forget_sinks()
        self.last_ring = ring
        return group

    def fix_address(self, *tensors: Tensor) -> None:
        """Let CUDA graphs write to tensors where they are; another cache is no reason to compile anew."""
        if self.accelerated and not torch.compiler.is_compiling():
            for tensor in tensors:
                torch._dynamo.mark_static_address(tensor, guard=False)

    @contextlib.contextmanager
    def changes(self, *refusals: type[Exception]) -> Iterator[None]:
        """Inside, states are changed; an exception leaves them in doubt, unless it is one by which they refuse."""
        self.changing = True
        try:
            yield
        except refusals:
            self.changing = False
            raise
        self.changing = False

    def settle(self) -> None:
        """Let Python know how many tokens compiled steps have taken; waits for the device."""
        self.stale = False
        self.announced = 0
        for group in self._groups.values():
            behind = int(group.count) - group.rings[0].seen
            for ring in group.rings:
                ring.seen += behind
            group.forget_sinks()

    def set_base(self, base: int) -> None:
        """Count positions from where they were when `base` tokens had been evicted."""
        self.base = base
        for group in self._groups.values():
            group.base.fill_(base)

    def forget(self, shift: int) -> None:
        """Count no more the first `shift` columns, of which nothing but sinks is left; positions begin anew."""
        self.set_base(0)
        self._computed.clear()
        if self.pads is not None:
            self._set_pads((self.pads - shift).clamp(min=0))

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.pads is not None:
            self.pads = function(self.pads)
            self._computed.clear()

    def pads_held(self, seen: int) -> bool:
        """Whether some layer may still hold padding, or slots without a token, which a mask must hide."""
        return self.pads is not None and seen - self.longest_window < self.most_pads

    @property
    def announces_step(self) -> bool:
        """Whether the next single token is announced as a compiled step takes it."""
        steady = self.compiles and not self.windowed and not self.has_gap
        return steady and (torch.compiler.is_compiling() or (self.accelerated and self.eager_tokens < 2))

    def offsets(self) -> int | Tensor:
        """How far positions were wound back, for all rows or `[batch_size]`."""
        return self.base if self.pads is None else (self.base - self.pads).clamp(min=0)

    def phase(self, rotation: Rotation, shift: int, states: Tensor) -> Tensor:
        """What turns `states` to where they act after `shift` evictions, if they act at `offsets()` now.

        Cosine and sine, `[2, rotary_dim / 2]`, or `[2, batch_size, 1, 1, rotary_dim / 2]` of a padded batch.
        """

        def compute(device: torch.device) -> Any:
            return turns(shift, self.base, self.pads_on(device))

        return self._phase(("phase", shift), rotation, states, compute)

    def windowed_phase(self, rotation: Rotation, seen: int, query_length: int, states: Tensor) -> Tensor:
        """The same for the window of every query, `[2, batch_size or 1, 1, query_length, 1, rotary_dim / 2]`."""

        def compute(device: torch.device) -> Tensor:
            evicted = torch.arange(query_length, device=device)[None] + (seen + 1 - self.window_length)
            pads = self.pads_on(device)
            if pads is None:
                shifts = evicted.clamp(min=0) - self.base
            else:
                shifts = (evicted - pads[:, None]).clamp(min=0) - (self.base - pads[:, None]).clamp(min=0)
            return shifts[:, None, :, None, None]

        return self._phase(("windowed", seen, query_length), rotation, states, compute)

    def _phase(self, key: Any, rotation: Rotation, states: Tensor, shift: Callable[[torch.device], Any]) -> Tensor:
        device = states.device
        on = _where_float64(device)
        there = self._once(("rotation", rotation, on), lambda: rotation.to(on))
        return self._once(
            (*key, rotation, device, states.dtype, self.base),
            lambda: there.cos_sin(shift(on), states.dtype).to(device),
        )

    def _once(self, key: Any, compute: Callable[[], _T]) -> _T:
        if torch.compiler.is_compiling():  # the compiler sees by itself what layers have in common
            return compute()
        if key not in self._computed:
            if len(self._computed) > 64:  # those of earlier steps; what lies on a device for good stays there
                for old in [old for old in self._computed if old[0] not in ("rotation", "pads", "sinks")]:
                    del self._computed[old]
            with torch.inference_mode(False):  # its tensors could not be used under autograd later
                self._computed[key] = compute()
        computed: _T = self._computed[key]
        return computed

    def pads_on(self, device: torch.device) -> Any:
        pads = self.pads
        return None if pads is None else self._once(("pads", device), lambda: pads.to(device))

    def _slots(self, tokens: Tensor, pads: Tensor | None) -> Tensor:
        """The slots of tokens `[k]`, or `[batch_size, k]` of a padded batch."""
        window_length, num_sinks = self.window_length, self.num_sink_tokens
        in_ring = num_sinks + (tokens - num_sinks) % (window_length - num_sinks)
        slots = torch.where(tokens < window_length, tokens, in_ring)
        if pads is None:
            return slots
        pads = pads.clamp(max=window_length)[:, None]
        return torch.where(slots < window_length - pads, pads + slots, window_length - 1 - slots)

    def sink_slots(self, device: torch.device) -> Tensor:
        def compute() -> Tensor:
            tokens = torch.arange(self.num_sink_tokens, device=device)
            return self._slots(tokens if self.pads is None else tokens.expand(len(self.pads), -1), self.pads_on(device))

        return self._once(("sinks", device), compute)

    def slots_after(self, seen: Tensor, pads: Tensor | None) -> Tensor:
        """Where the next token of each row goes after `seen` `[1]` tokens, `[1]` or `[batch_size, 1]`."""
        # A pad goes where the first token will.
        return self._slots(seen if pads is None else (seen - pads[:, None]).clamp(min=0), pads)

    def all_sinks_seen(self, seen: int) -> bool:
        return seen - self.most_pads >= self.num_sink_tokens

    def new_slots(self, seen: int, device: torch.device) -> Tensor:
        """The same, after a number of tokens that Python knows."""
        seen_there = torch.full((1,), seen, device=device)
        return self._once(("new", seen, device), lambda: self.slots_after(seen_there, self.pads_on(device)))

    def slot(self, token: int) -> int:
        """The slot of a token in a batch without padding."""
        num_sinks = self.num_sink_tokens
        in_ring = num_sinks + (token - num_sinks) % (self.window_length - num_sinks)
        return token if token < self.window_length else in_ring

    def ordered_slots(self, seen: int, length: int, device: torch.device) -> Tensor:
        """The sinks and the last tokens of each row, `length` in all, in order; empty slots come first."""

        def compute() -> Tensor:
            held = seen - self.pads_on(device)[:, None]
            missing = length - held.clamp(0, length)
            tokens = torch.arange(length, device=device) - missing
            tokens = torch.where(tokens < self.num_sink_tokens, tokens, held - length + missing + tokens)
            return self._slots(tokens.clamp(min=0), self.pads_on(device))

        return self._once(("ordered", seen, length, device), compute)

    def sources(self, seen: int, query_length: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Which of a chunk's tokens go into the slots, or to the sinks, and where in the chunk they are.

        Two tensors `[batch_size, length]` for W slots or S sinks: whether it gets a new token, and that one's index.
        """

        def compute() -> tuple[Tensor, Tensor]:
            pads = self.pads_on(device)[:, None]
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

    def windowed_recent(self, seen: int) -> int:
        """How many tokens the first query of a chunk sees beside the sinks and itself."""
        return min(seen, self.window_length - self.num_sink_tokens - 1)

    def recent_slots(self, seen: int, length: int, device: torch.device) -> Tensor:
        """Where the last `length` tokens of each row of a padded batch lie, in order, `[batch_size, length]`."""

        def compute() -> Tensor:
            pads = self.pads_on(device)
            tokens = torch.arange(seen - length, seen, device=device) - pads[:, None]
            return self._slots(tokens.clamp(min=0), pads)

        return self._once(("recent", seen, length, device), compute)

    def windowed_length(self, seen: int, query_length: int) -> int:
        return query_length * self.num_sink_tokens + self.windowed_recent(seen) + query_length

    def windowed_mask(self, seen: int, query_length: int, device: torch.device) -> Callable[[Any, Any, Any, Any], Any]:
        """Which keys of a windowed update a query sees, as the mask functions of `transformers` say it."""

        def visible(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
            num_sinks, pads = self.num_sink_tokens, self.pads_on(device)
            padding = 0 if pads is None else pads[batch_idx]
            own_copy = kv_idx // max(num_sinks, 1) == q_idx
            query = seen + q_idx - padding
            copies = query_length * num_sinks
            column = seen - self.windowed_recent(seen) + kv_idx - copies
            token = column - padding
            evicted = (query + 1 - self.window_length).clamp(min=0)
            in_window = (token >= num_sinks + evicted) & (token <= query)
            # A pad must see something, or its state is no number; it sees itself.
            in_window = in_window | ((query < 0) & (token == query))
            is_copy = kv_idx < copies
            return (is_copy & own_copy & (kv_idx % max(num_sinks, 1) <= query)) | (~is_copy & in_window)

        return visible


class Group:
    """Rings on one device whose sinks turn alike: what one step does for all of them.

    Args:
        rows: what the layers of the cache share.
        rotation: how the sinks turn; None if they carry no position.
        device: where they lie.
    """

    def __init__(self, rows: Rows, rotation: Rotation | None, device: torch.device) -> None:
        self.rows = rows
        self.rings: list[Any] = []
        self._device = device
        no_sinks = rows.num_sink_tokens == 0
        self._rotation = None if rotation is None or no_sinks else rotation.to(_where_float64(device))
        # How many tokens were seen. Compiled steps count here, all others in Python, and bring it up to date.
        self.count = torch.zeros((), dtype=torch.long, device=device)
        # The same as that of the rows, where compiled steps need not be compiled anew for another one.
        self.base = torch.full((), rows.base, dtype=torch.long, device=device)
        rows.fix_address(self.count, self.base)
        if self._rotation is not None:
            rows.fix_address(self._rotation.inv_freq)
        # How many tokens had been seen before the last step, if that is all that happened since.
        self.begun: int | None = None
        self._slot = torch.zeros(1, dtype=torch.long, device=device)
        # The pristine sinks of all rings, and the slots in which they are turned, once gathered.
        self._sinks: Any = None
        self._turning: list[Tensor] = []

    def forget_sinks(self) -> None:
        """To be called when the sinks of a ring, or its slots, were replaced."""
        self._sinks = None
        self._turning = []

    def begin(self, seen: int) -> None:
        """Turn the sinks of all rings to where they act after one more token than the `seen` ones."""
        rows, rotation, compiling = self.rows, self._rotation, torch.compiler.is_compiling()
        if compiling:
            self.count.add_(1)
            rows.stale, rows.eager_tokens = True, 0
            shift: Any = (self.count - rows.window_length).clamp(min=0)
            base: Any = self.base
        else:
            self.count.fill_(seen + 1)
            self.begun = seen
            self._slot = self._slot.fill_(rows.slot(seen)) if rows.pads is None else rows.new_slots(seen, self._device)
            shift, base = max(seen + 1 - rows.window_length, 0), rows.base
        if rotation is None:
            return
        pads = rows.pads_on(rotation.inv_freq.device)
        phase = rotation.cos_sin(turns(shift, base, pads), self.rings[0].sinks.dtype).to(self._device)
        if compiling:
            slots = [ring.turning(ring.keys, ring.values) for ring in self.rings]
            turned = [rotation.rotate_by(phase, ring.sinks).to(ring.keys.dtype) for ring in self.rings]
        else:
            if self._sinks is None:
                self._gather()
            slots, dtype = self._turning, self._turning[0].dtype
            turned = list(rotation.rotate_by(phase, self._sinks).to(dtype).unbind())
        index = rows.sink_slots(self._device)
        for ring_slots, sinks in zip(slots, turned, strict=True):
            put(ring_slots, index, sinks)

    def _gather(self) -> None:
        """Put the sinks of all rings into one tensor."""
        with torch.inference_mode(False):
            self._sinks = torch.stack([ring.sinks for ring in self.rings])
            for ring, sinks in zip(self.rings, self._sinks.unbind(), strict=True):
                ring.sinks = sinks  # what they held is not held twice
        self._turning = [ring.turning(ring.keys, ring.values) for ring in self.rings]

    def slot(self) -> Tensor:
        """Where the token of the step goes, `[1]` or `[batch_size, 1]`."""
        if torch.compiler.is_compiling():
            return self.rows.slots_after(self.count[None] - 1, self.rows.pads_on(self._device))
        return self._slot


def _where_float64(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device  # MPS has no float64


def turns(shift: Any, base: Any, pads: Tensor | None) -> Any:
    """By how many positions states act further on after `shift` evictions, counted from `base`.

    For all rows, or `[batch_size, 1, 1, 1]` of a padded batch.
    """
    if pads is None:
        return shift - base
    evicted: Tensor = (shift - pads).clamp(min=0) - (base - pads).clamp(min=0)
    return evicted[:, None, None, None]


def spread(index: Tensor, states: Tensor) -> Tensor:
    """An index `[batch_size, k]` of tokens for `gather` and `scatter` on states `[batch_size, heads, tokens, dim]`."""
    return index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])


def put(slots: Tensor, index: Tensor, states: Tensor) -> Tensor:
    """Write the states of tokens into slots `[k]`, the same for all rows, or `[batch_size, k]`."""
    return slots.index_copy_(2, index, states) if index.ndim == 1 else slots.scatter_(2, spread(index, states), states)


def take(states: Tensor, index: Tensor) -> Tensor:
    """A copy of the tokens at an index `[k]`, the same for all rows, or `[batch_size, k]`."""
    return states.index_select(2, index) if index.ndim == 1 else states.gather(2, spread(index, states))
