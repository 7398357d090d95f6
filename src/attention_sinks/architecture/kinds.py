"""Layers of a twin that are alike: the first of each kind runs and stands for the others.

A model of a hundred layers has one or two kinds of them, and what a kind does at a position is measured once.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

T = TypeVar("T")


class LeftOut:
    """The layers of a model that return their input, since an earlier layer of their kind stands for them.

    Two layers are alike if they differ in nothing but their index and the values of their weights, if each forward pass
    calls both with the same arguments, the hidden states apart, and if both compute and cache the same, once they share
    their weights. The arguments are compared in each pass, the results in a pass that asks for it.

    Attributes:
        layers: the layers that are left out.
        stand_ins: by the index of each of them that a pass reached, the index of the layer that stands for it.
        differ: True if a forward pass showed that layers which were taken to be alike are not.
    """

    def __init__(self) -> None:
        self.layers: list[nn.Module] = []
        self.stand_ins: dict[int, int] = {}
        self.differ = False
        self._compares_results = False
        self._stored: set[int] = set()  # the layers of the cache that the pass which compared results stored keys in
        # The calls of the current pass, by the layer that stands for others: that of the model, also in its copies.
        self._calls: dict[nn.Module, _Call] = {}

    def leave_out_of(self, model: PreTrainedModel) -> None:
        """Let all layers of `model` return their input, but for the first of each kind, whose weights they share."""
        for stack in [each for each in model.modules() if isinstance(each, nn.ModuleList)]:
            for first, *others in _kinds(stack):
                if others:
                    first.register_forward_hook(self._recorder(first), with_kwargs=True)
                for layer in others:
                    self.layers.append(layer)
                    for part, of_first in zip(layer.modules(), first.modules(), strict=True):
                        part._parameters = of_first._parameters
                    layer.forward = self._passing_on(layer, first)

    def begin_pass(self, compare_results: bool) -> None:
        """Begin a pass that compares the arguments of layers and, with `compare_results`, their results."""
        self._calls.clear()
        self._compares_results = compare_results

    def end_pass(self, cached: list[Any]) -> None:
        """Check what a pass stored in the layers `cached` of its cache."""
        stored = {i for i, layer in enumerate(cached) if getattr(layer, "keys", None) is not None}
        if self._compares_results:
            self._stored = stored
            for i, first in self.stand_ins.items():
                self.differ |= not _same([type(cached[i]), vars(cached[i])], [type(cached[first]), vars(cached[first])])
        elif self.layers:  # a layer may store its states elsewhere than its index says
            left_out = {i for i, first in self.stand_ins.items() if first in stored}
            self.differ |= not stored.isdisjoint(left_out) or stored | left_out != self._stored

    def for_all(self, by_layer: dict[int, T]) -> dict[int, T]:
        """Return what was measured by layer, also for the layers that are left out."""
        return by_layer | {i: by_layer[first] for i, first in self.stand_ins.items() if first in by_layer}

    # Functions, which the copies of a model share.
    def _recorder(self, first: nn.Module) -> Callable[..., None]:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.differ |= first in self._calls  # a layer that runs twice has two places in the cache
            call = _Call(*_split(args, kwargs), output)
            self.differ |= (output[0] if isinstance(output, tuple) else output).shape != call.hidden_states.shape
            self._calls[first] = call

        return record

    def _passing_on(self, layer: nn.Module, first: nn.Module) -> Callable[..., Any]:
        compute, index, index_of_first = layer.forward, _index(layer), _index(first)

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = self._calls[first]
            hidden_states, *others = _split(args, kwargs)
            self.differ |= not _same(others, [call.args, call.kwargs])
            self.differ |= self.stand_ins.setdefault(index, index_of_first) != index_of_first
            if self._compares_results:
                self.differ |= not _same(compute(call.hidden_states, *call.args, **call.kwargs), call.output)
            return (hidden_states, *call.output[1:]) if isinstance(call.output, tuple) else hidden_states

        return forward


class _Call(NamedTuple):
    """A call of a layer."""

    hidden_states: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Return the hidden states that a layer is called with, and its other arguments."""
    if args:
        return args[0], args[1:], kwargs
    kwargs = dict(kwargs)
    return kwargs.pop("hidden_states"), args, kwargs


def _kinds(stack: nn.ModuleList) -> list[list[nn.Module]]:
    """Return the layers of a stack by their kinds. Those that have no index of their own are left away."""
    kinds: list[tuple[Any, list[nn.Module]]] = []
    indices = {-1}
    for layer in stack:
        if _index(layer) in indices:
            continue
        indices.add(_index(layer))
        parts = _parts(layer)
        layers = next((layers for others, layers in kinds if _same(others, parts)), None)
        if layers is None:
            kinds.append((parts, layers := []))
        layers.append(layer)
    return [layers for _, layers in kinds]


def _index(layer: nn.Module) -> int:
    """Return the index by which a layer and its parts address the cache, -1 if there is not one."""
    indices = {vars(part)["layer_idx"] for part in layer.modules() if "layer_idx" in vars(part)}
    index = indices.pop() if len(indices) == 1 else None
    return -1 if index is None else index


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
        learns = isinstance(value, nn.Parameter) and value.requires_grad and other.requires_grad
        return learns or torch.equal(value, other)
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
