"""Modes that count what torch does inside of them."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Counts operations by name, views apart, and finds the largest allocation in bytes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = set(storages((args, kwargs)))
        output = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.names[func.overloadpacket.__name__] += 1
        new = [nbytes for address, nbytes in storages(output).items() if address not in known]
        self.largest = max([self.largest, *new])
        return output


class Widest(TorchDispatchMode):
    """Finds the number of elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(tensor.numel() for tensor in tensors_in(output))])
        return output


class Transfers(TorchDispatchMode):
    """Lists the operations that take tensors on several devices, or that return one on another device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        devices = {str(tensor.device) for tensor in tensors_in((args, kwargs, output))}
        if len(devices) > 1:
            self.found.append(f"{func}: {sorted(devices)}")
        return output


def tensors_in(values: Any) -> list[Tensor]:
    return [value for value in torch.utils._pytree.tree_leaves(values) if isinstance(value, Tensor)]


def storages(values: Any) -> dict[int, int]:
    """The memory of all tensors in some values: bytes by address."""
    memory = [tensor.untyped_storage() for tensor in tensors_in(values)]
    return {storage.data_ptr(): storage.nbytes() for storage in memory}
