"""Layers of a twin that are alike: the first of each kind runs and stands for the others.

A model of a hundred layers has one or two kinds of them, and what a kind does at a position is measured once.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

T = TypeVar("T")


class LeftOut:
    """The layers of a model that return their input, since an earlier layer of their kind stands for them.

    Two layers are alike if they differ in nothing but their index and the values of their weights, and if each forward
    pass calls both with the same arguments, the hidden states apart. The arguments are compared in every pass.

    Attributes:
        layers: the layers that are left out. They keep their attributes and lose their parts.
        stand_ins: by the index of each of them, the index of the layer that stands for it.
        differ: True if a forward pass showed that layers which were taken to be alike are not.
    """

    def __init__(self) -> None:
        self.layers: list[nn.Module] = []
        self.stand_ins: dict[int, int] = {}
        self.differ = False
        # Of the current pass, by the index of a layer that stands for others: its arguments, and if it returns a tuple.
        self._calls: dict[int, tuple[list[Any], bool]] = {}

    def leave_out_of(self, model: PreTrainedModel) -> None:
        """Let all layers of `model` return their input, but for the first of each kind."""
        for stack in [each for each in model.modules() if isinstance(each, nn.ModuleList)]:
            stand_ins = _stand_ins(model, stack)
            for i in set(stand_ins.values()):
                stack[i].register_forward_hook(self._recorder(_index(stack[i])), with_kwargs=True)
            for i, first in stand_ins.items():
                layer: Any = stack[i]
                self.layers.append(layer)
                self.stand_ins[_index(layer)] = _index(stack[first])
                layer.forward = self._passing_on(_index(stack[first]))
                layer._modules.clear()
                layer._parameters.clear()

    def begin_pass(self) -> None:
        """Forget the calls of the pass before."""
        self._calls.clear()

    def end_pass(self, stored: Iterable[int]) -> None:
        """Check a pass that stored states in the layers `stored` of its cache."""
        self.differ |= not self.stand_ins.keys().isdisjoint(stored)

    def for_all(self, by_layer: dict[int, T]) -> dict[int, T]:
        """Return what was measured by layer, also for the layers that are left out."""
        return by_layer | {i: by_layer[first] for i, first in self.stand_ins.items() if first in by_layer}

    # Functions, which the copies of a model share.
    def _recorder(self, index: int) -> Callable[..., None]:
        def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            hidden_states, *others = _split(args, kwargs)
            in_tuple = isinstance(output, tuple) and len(output) == 1
            changed = output[0] if in_tuple else output
            self.differ |= index in self._calls  # a layer that runs twice has two places in the cache
            self.differ |= not isinstance(changed, Tensor) or changed.shape != hidden_states.shape
            self._calls[index] = others, in_tuple

        return record

    def _passing_on(self, index: int) -> Callable[..., Tensor | tuple[Tensor]]:
        def forward(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
            hidden_states, *others = _split(args, kwargs)
            expected, in_tuple = self._calls[index]
            self.differ |= not _same(others, expected)
            return (hidden_states,) if in_tuple else hidden_states

        return forward


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Return the hidden states that a layer is called with, and its other arguments."""
    if args:
        return args[0], args[1:], kwargs
    kwargs = dict(kwargs)
    return kwargs.pop("hidden_states"), args, kwargs


def _stand_ins(model: PreTrainedModel, stack: nn.ModuleList) -> dict[int, int]:
    """Return for each layer of a stack that is like an earlier one the place of the first that it is like."""
    # What the config says of each layer, since a layer may read it in a forward pass.
    entries = [value for value in model.config.to_dict().values() if isinstance(value, list | tuple)]
    entries = [value for value in entries if len(value) >= len(stack)]
    layers = list(stack)
    kinds: dict[int, Any] = {}
    stand_ins: dict[int, int] = {}
    for i, layer in enumerate(layers):
        if _index(layer) < 0 or layers.index(layer) < i:  # one layer may stand at several places
            continue
        kind = [value[i] for value in entries], _parts(layer)
        first = next((each for each in kinds if _same(kinds[each], kind)), None)
        if first is None:
            kinds[i] = kind
        else:
            stand_ins[i] = first
    return stand_ins


def _index(layer: nn.Module) -> int:
    """Return the index by which a layer and its parts address the cache, -1 if there is not one."""
    indices = {vars(part)["layer_idx"] for part in layer.modules() if "layer_idx" in vars(part)}
    return indices.pop() if len(indices) == 1 else -1


def _parts(layer: nn.Module) -> dict[str, Any]:
    """Return the parts of a layer by name: their class, and all that they hold but their index."""
    return {
        name: (type(part), {key: value for key, value in vars(part).items() if key not in ("layer_idx", "_modules")})
        for name, part in layer.named_modules()
    }


def _same(value: Any, other: Any) -> bool:
    """Return True if two values are equal, or two weights that learn have the same form."""
    if value is other:
        return True
    if type(value) is not type(other):
        return False
    if isinstance(value, Tensor):
        if value.shape != other.shape or value.dtype != other.dtype:
            return False
        return (value.requires_grad and other.requires_grad) or torch.equal(value, other)
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(_same(value[name], other[name]) for name in value)
    if isinstance(value, list | tuple):
        return len(value) == len(other) and all(map(_same, value, other))
    if isinstance(value, functools.partial):
        return all(_same(getattr(value, name), getattr(other, name)) for name in ("func", "args", "keywords"))
    try:
        return bool(value == other)
    except Exception:  # whatever the `==` of a class raises
        return False
