"""One decode step in tensors, for `torch.compile` and CUDA graphs; and when a step is announced in this form."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..compat import compiles_by_itself
from .layout import Layout


class StaticPlan:
    """The plan of every compiled decode step: one object whose numbers are tensors, which the groups of layers hold.

    A compiled step cannot read numbers of Python that change, or it would be compiled again; it can read flags. A step
    writes one token, rotates the sinks (by zero until the window is full) and returns all W slots, with a mask that
    hides the empty ones.

    Args:
        layout: the slots and positions of the batch.
        is_sliding: True if a mask is that of a sliding window of the model.

    Attributes:
        needs_count: True if the mask depends on the number of tokens seen: it hides pads, or what is further back than
            a sliding window. Otherwise causality hides empty slots, which come last, and a full ring has none.
        stores_sinks: True if the new token may be a sink.
        steps_announced: number of steps that were announced since Python last knew the number of tokens.
    """

    all_slots = rotates_sinks = True
    rebased = False
    coordinates = None
    kv_offset = 0

    def __init__(self, layout: Layout, is_sliding: bool) -> None:
        self.layout = layout
        self.stores_sinks = True
        self.steps_announced = 0
        self.kv_length = layout.window_length
        self.needs_count = is_sliding or not layout.evicts_together

    def set(self, seen: int) -> None:
        """Bring the flags up to date: `seen` tokens were fed."""
        self.stores_sinks = not self.layout.has_all_sinks(seen)
        self.steps_announced = 0

    def announce(self) -> None:
        """Note that a step was announced."""
        self.steps_announced += 1

    def offset_after(self, seen: Any) -> Any:
        """Return the position of the first slot as a mask counts it, after `seen` tokens, an int or a tensor."""
        offset = seen + 1 - self.layout.window_length
        return offset.clamp(min=0) if isinstance(offset, Tensor) else max(offset, 0)

    def once(self, _: object, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """Return `function(*arguments)`: the compiler sees what layers have in common."""
        return function(*arguments)

    def slot_mapping(self, count: Tensor) -> Tensor:
        """Return the slot of the new token, `[1]` or `[batch_size, 1]`; `count` includes it."""
        return self.layout.next_slots(count[None] - 1)

    def step_slots(self, count: Tensor) -> tuple[Tensor, Tensor]:
        """Return the slots of the sinks and the new token, `[S + 1]` or `[batch_size, S + 1]`, and its own slot."""
        slot = self.slot_mapping(count)
        return torch.cat([self.layout.sink_slots(count.device), slot], dim=-1), slot

    def shift(self, count: Tensor, offset: Tensor) -> Any:
        """Return by how many positions the sinks are rotated; `count` includes the new token."""
        num_evicted = (count - self.layout.window_length).clamp(min=0)
        return self.layout.positions.shift(num_evicted, offset, count.device)


class CompilePolicy:
    """When a single token is announced as a compiled step takes it.

    In a compiled model always. In an eager one where `generate` would compile by itself, until single tokens turn out
    not to be compiled.

    Args:
        supported: True if single tokens can be taken by tensors alone.

    Attributes:
        uncompiled_steps: number of single tokens in a row that were not compiled, since the last chunk, the last
            compiled token, or the beginning of a call or a stream.
    """

    def __init__(self, supported: bool) -> None:
        self.supported = supported
        self.uncompiled_steps = 0

    @property
    def is_compiling(self) -> bool:
        """True inside of a model that is being compiled."""
        return torch.compiler.is_compiling()

    def expects_static(self, device: torch.device | None) -> bool:
        """Return True if the next single token is expected to be compiled; None is a device not known yet."""
        return self.supported and (self.is_compiling or (self.uncompiled_steps < 2 and compiles_by_itself(device)))

    def note_pass(self, query_length: int) -> None:
        """Note a pass of `query_length` tokens that was not compiled."""
        self.uncompiled_steps = self.uncompiled_steps + 1 if query_length == 1 else 0

    def expect_compiled_steps(self) -> None:
        """Expect single tokens to be compiled: one was, or a new stream or call begins."""
        self.uncompiled_steps = 0

    def mark_static(self, *tensors: Tensor | None) -> None:
        """Let CUDA graphs write to tensors where they are; another cache is no reason to compile again."""
        for tensor in tensors:
            if tensor is not None and not self.is_compiling and compiles_by_itself(tensor.device):
                torch._dynamo.mark_static_address(tensor, guard=False)


def replaced(old: Tensor, new: Tensor) -> Tensor:
    """Return `new`, at the address of `old` if compiled steps may know it."""
    return old.copy_(new) if new.shape == old.shape and compiles_by_itself(old.device) else new
