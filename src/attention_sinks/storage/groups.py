"""The sinks of the layers that rotate alike, and the count of tokens on their device."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..rope import Rotation
from .layout import Layout
from .plan import UpdatePlan
from .static import CompilePolicy, StaticPlan, replaced

Plan = UpdatePlan | StaticPlan


class SinkGroup:
    """The pristine sinks of layers on one device with one rotation: one rotation moves the sinks of all.

    Sinks are rotated from pristine copies at each step, so that no rounding accumulates.

    Args:
        rotation: the rotation of the sinks, with its frequencies where float64 is; None if sinks carry no position.
        device, dtype: those of the cached states.

    Attributes:
        count: number of tokens seen, a tensor: compiled steps count here, Python brings it up to date.
        offset: the position offset, a tensor, so that a rebase is no reason to compile again.
    """

    def __init__(self, rotation: Rotation | None, device: torch.device, dtype: torch.dtype) -> None:
        self.rotation = rotation
        self.device = device
        self.dtype = dtype
        self.count = torch.zeros((), dtype=torch.long, device=device)
        self.offset = torch.zeros((), dtype=torch.long, device=device)
        # The sinks of each layer, one by one or, once they were rotated, in one tensor `[num_layers, batch_size, ...]`.
        self._sinks: list[Tensor] | Tensor = []

    def add(self, sinks: Tensor) -> int:
        """Take over the pristine sinks of a layer, `[batch_size, num_heads, S, head_dim]`; return their index."""
        self._sinks = [*self._sinks, sinks]
        return len(self._sinks) - 1

    def sinks(self, index: int) -> Tensor:
        """Return the pristine sinks of a layer."""
        return self._sinks[index]

    def select_rows(self, index: Tensor) -> None:
        """Keep the rows at `index`, in that order."""
        index = index.to(self.device)
        if isinstance(self._sinks, Tensor):
            self._sinks = replaced(self._sinks, self._sinks.index_select(1, index))
        else:
            self._sinks = [replaced(sinks, sinks.index_select(0, index)) for sinks in self._sinks]

    def rotated_sinks(self, plan: Plan, index: int) -> Tensor:
        """Return the sinks of a layer where they act in a pass, `[batch_size, num_heads, S, head_dim]`."""
        if isinstance(plan, StaticPlan):  # the compiler sees what layers have in common
            assert self.rotation is not None
            sinks = self._sinks[index]
            cos_sin = self.rotation.cos_sin(plan.shift(self.count, self.offset), sinks.dtype)
            return self.rotation.rotate_by(cos_sin, sinks).to(self.dtype)
        return plan.once(self, self._rotate_all, plan)[index]

    def _rotate_all(self, plan: UpdatePlan) -> tuple[Tensor, ...]:
        assert self.rotation is not None
        if not isinstance(self._sinks, Tensor):
            with torch.inference_mode(False):
                self._sinks = torch.stack(self._sinks)
        cos_sin = plan.cos_sin(self.rotation, self._sinks.dtype, self.device)
        return self.rotation.rotate_by(cos_sin, self._sinks).to(self.dtype).unbind()

    def step(self, plan: Plan, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return what a step writes to a layer beside the new token.

        The slots of sinks and token, `[S + 1]` or `[batch_size, S + 1]`, the slot of the token alone, and the
        sinks where they act, see `rotated_sinks`.
        """
        if isinstance(plan, StaticPlan):
            return *plan.step_slots(self.count), self.rotated_sinks(plan, index)
        slots, slot, sinks = plan.once((self, "step"), self._step, plan)
        return slots, slot, sinks[index]

    def _step(self, plan: UpdatePlan) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        return *plan.step_slots(self.device), plan.once(self, self._rotate_all, plan)

    def slot_mapping(self, plan: Plan) -> Tensor:
        """Return the slot of the single new token of a pass."""
        return plan.slot_mapping(self.count) if isinstance(plan, StaticPlan) else plan.slot_mapping(self.device)


class SinkGroups:
    """The groups of a cache. A layer joins one when it gets its buffers.

    Args:
        policy: when single tokens are compiled.

    Attributes:
        layout: the slots and positions of the batch.
        is_stale: True if compiled steps have counted tokens that Python does not know of.
        has_gap: True if fewer tokens are held than fit, after a `crop`.
    """

    def __init__(self, policy: CompilePolicy) -> None:
        self.policy = policy
        self.layout: Layout = None  # type: ignore[assignment]  # `Stream` sets it
        self.is_stale = self.has_gap = False
        self._groups: dict[object, SinkGroup] = {}

    def __iter__(self) -> Iterator[SinkGroup]:
        return iter(self._groups.values())

    def join(self, rotation: Rotation | None, like: Tensor, sinks_shape: torch.Size | None) -> SinkGroup:
        """Return the group for a layer with such a rotation and states `like` these."""
        key = rotation, like.device, like.dtype, sinks_shape
        if key not in self._groups:
            on_device = None if rotation is None else rotation.to(_float64_device(like.device))
            group = self._groups[key] = SinkGroup(on_device, like.device, like.dtype)
            group.offset.fill_(self.layout.positions.offset)
            self.policy.mark_static(group.count, group.offset, None if on_device is None else on_device.inv_freq)
        return self._groups[key]

    def clear(self) -> None:
        """Forget all groups: the layers have dropped their buffers."""
        self._groups = {}
        self.is_stale = self.has_gap = False

    def count_step(self) -> None:
        """Count the token of a compiled step."""
        for group in self:
            group.count.add_(1)
        self.is_stale = True

    def set_count(self, seen: int, has_gap: bool) -> None:
        """Tell compiled steps how many tokens were seen."""
        for group in self._groups.values():
            group.count.fill_(seen)
        self.is_stale, self.has_gap = False, has_gap

    def set_layout(self, layout: Layout) -> None:
        """Let the tokens of the batch have other slots or positions; tell compiled steps the position offset."""
        self.layout = layout
        for group in self:
            group.offset.fill_(layout.positions.offset)

    def select_rows(self, index: Tensor) -> None:
        """Keep the rows at `index` of all sinks, in that order."""
        for group in self:
            group.select_rows(index)


def _float64_device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
