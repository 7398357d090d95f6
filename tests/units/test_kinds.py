"""Laws of the layers of a twin that are left out: only layers whose kind is shown by another one, noticed if not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Cohere2Config,
    DeepseekV3Config,
    Gemma3TextConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    SmolLM3Config,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from ..support.inside import LeftOut, derive_positions, shown_by_twin

NUM_LAYERS = 4
# How much attention prefers each key to the one in the slot before.
SLOPE = 1e-5


class Layer(nn.Module):
    """A layer that adds to the hidden states, and stores them in its place of the cache."""

    def __init__(self, layer_idx: Any, **settings: Any) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.linear = nn.Linear(3, 3)
        for name, value in settings.items():
            setattr(self, name, value)

    def forward(self, hidden_states: Tensor, cache: Any, shift: Any = 0) -> Tensor:
        cache[self.layer_idx].keys = hidden_states
        after: Tensor = hidden_states + self.linear(hidden_states) + shift
        return after


class InTuple(Layer):
    more: tuple[Any, ...] = ()

    def forward(self, hidden_states: Tensor, cache: Any, shift: Any = 0) -> Any:
        return (super().forward(hidden_states, cache, shift), *self.more)


class ByIndex(Layer):
    def forward(self, hidden_states: Tensor, cache: Any, shift: Any = 0) -> Tensor:
        return super().forward(hidden_states, cache, shift + self.layer_idx % 2)


class StoringByIndex(Layer):
    def forward(self, hidden_states: Tensor, cache: Any, shift: Any = 0) -> Tensor:
        after = super().forward(hidden_states, cache, shift)
        cache[self.layer_idx].keys = hidden_states * (1 + self.layer_idx % 2)
        return after


class WithOffset(Layer):
    def forward(self, hidden_states: Tensor, cache: Any, shift: Any = 0) -> Tensor:
        return super().forward(hidden_states, cache[NUM_LAYERS:], shift)


class Elsewhere(Layer):
    def forward(self, hidden_states: Tensor, cache: Any, shift: Any = 0) -> Tensor:
        cache[NUM_LAYERS - 1].keys = hidden_states
        return hidden_states


class Place:
    """A layer of a cache."""

    keys: Tensor | None = None


class TwoStacks(nn.Module):
    """A model whose second stack stores its states behind those of the first, with the same indices."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Model(layers_of()), Model(layers_of(WithOffset))

    def forward(self, hidden_states: Tensor, cache: Any) -> Tensor:
        after: Tensor = self.second(self.first(hidden_states, cache), cache)
        return after


class Model(nn.Module):
    def __init__(self, layers: list[nn.Module], shifts: list[Any] | None = None, loops: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.shifts = [0] * len(layers) if shifts is None else shifts
        self.loops = loops

    def forward(self, hidden_states: Tensor, cache: Any) -> Tensor:
        for _ in range(self.loops):
            for layer, shift in zip(self.layers, self.shifts, strict=True):
                hidden_states = layer(hidden_states, cache=cache, shift=shift)
                hidden_states = hidden_states[0] if isinstance(hidden_states, tuple) else hidden_states
        return hidden_states


def layers_of(kind: Callable[..., nn.Module] = Layer, **settings: Any) -> list[nn.Module]:
    """Layers of which each has a setting of its own."""
    return [kind(i, **{name: values[i] for name, values in settings.items()}) for i in range(NUM_LAYERS)]


def fixed(value: float) -> nn.Parameter:
    return nn.Parameter(torch.full((2,), float(value)), requires_grad=False)


def run(model: Any) -> LeftOut:
    left_out = LeftOut()
    left_out.leave_out_of(model)
    for compare_results in (True, False):
        cache: list[Any] = [Place() for _ in range(2 * NUM_LAYERS)]
        left_out.begin_pass(compare_results)
        model(torch.ones(1, 2, 3), cache)
        left_out.end_pass(cache)
    return left_out


ALIKE: dict[str, tuple[Callable[[], Model], dict[int, int]]] = {
    "one kind": (lambda: Model(layers_of()), {1: 0, 2: 0, 3: 0}),
    "in a tuple": (lambda: Model(layers_of(InTuple)), {1: 0, 2: 0, 3: 0}),
    "in a tuple with more": (lambda: Model(layers_of(InTuple, more=[(1, torch.ones(2))] * 4)), {1: 0, 2: 0, 3: 0}),
    "equal tensors as arguments": (
        lambda: Model(layers_of(), shifts=[torch.ones(3) for _ in range(NUM_LAYERS)]), {1: 0, 2: 0, 3: 0}),
    "two kinds": (lambda: Model(layers_of(sliding=[True, False, True, False])), {2: 0, 3: 1}),
    "tables": (lambda: Model(layers_of(table=[torch.full((2,), i // 2) for i in range(NUM_LAYERS)])), {1: 0, 3: 2}),
    "fixed weights": (lambda: Model(layers_of(table=[fixed(i // 2) for i in range(NUM_LAYERS)])), {1: 0, 3: 2}),
    "other parts": (lambda: Model(layers_of(norm=[nn.Identity(), nn.Identity(), nn.ReLU(), nn.ReLU()])), {1: 0, 3: 2}),
    "other shapes": (lambda: Model(layers_of(up=[nn.Linear(3, 3 + i % 2) for i in range(NUM_LAYERS)])), {2: 0, 3: 1}),
}  # fmt: skip


@pytest.mark.parametrize(("make", "stand_ins"), ALIKE.values(), ids=ALIKE)
def test_a_layer_is_left_out_if_an_earlier_one_differs_in_index_and_weights_alone(
    make: Callable[[], Model], stand_ins: dict[int, int]
) -> None:
    left_out = run(make())
    assert not left_out.differ
    assert left_out.stand_ins == stand_ins


def test_layers_without_an_index_of_their_own_are_not_left_out() -> None:
    model = Model(layers_of(sliding=[True, False, True, False]))
    model.encoder = nn.ModuleList([Layer(None), Layer(None)])
    model.experts = nn.ModuleList([Layer(0), Layer(0)])
    left_out = run(model)
    assert left_out.layers == [model.layers[2], model.layers[3]]


def test_layers_of_another_stack_that_no_pass_reaches_stand_for_nothing() -> None:
    model = Model(layers_of(sliding=[True, False, True, False]))
    model.tower = nn.ModuleList(layers_of())
    left_out = run(model)
    assert not left_out.differ
    assert left_out.stand_ins == {2: 0, 3: 1}


NOTICED: dict[str, Callable[[], nn.Module]] = {
    "other arguments": lambda: Model(layers_of(), shifts=[0, 1, 0, 1]),
    "other tensors as arguments": lambda: Model(layers_of(), [torch.full((3,), i % 2) for i in range(NUM_LAYERS)]),
    "a computation by index": lambda: Model(layers_of(ByIndex)),
    "other states by index": lambda: Model(layers_of(StoringByIndex)),
    "states in another place": lambda: Model(layers_of(Elsewhere)),
    "layers that run twice": lambda: Model(layers_of(), loops=2),
    "stacks with the same indices": TwoStacks,
}


@pytest.mark.parametrize("make", NOTICED.values(), ids=NOTICED)
def test_a_pass_notices_layers_that_are_not_alike(make: Callable[[], nn.Module]) -> None:
    assert run(make()).differ


class ByIndexConfig(LlamaConfig):
    model_type = "rotates by index"


class ByIndexAttention(LlamaAttention):
    def forward(self, hidden_states: Tensor, position_embeddings: Any, *args: Any, **kwargs: Any) -> Any:
        cos, sin = position_embeddings
        if self.layer_idx % 2:
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
        return super().forward(hidden_states, (cos, sin), *args, **kwargs)


class ByIndexModel(LlamaForCausalLM):
    config_class = ByIndexConfig

    def __init__(self, config: ByIndexConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.__class__ = ByIndexAttention


def test_a_model_whose_layers_decide_by_their_index_is_measured_layer_by_layer() -> None:
    rotations = derive_positions(ByIndexConfig(num_hidden_layers=4, hidden_size=64, num_attention_heads=4), range(4))
    assert [rotation is None for rotation in rotations.rotations.values()] == [False, True, False, True]


class ByOrderConfig(LlamaConfig):
    model_type = "attends by order"


class ByOrderAttention(LlamaAttention):
    def forward(self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any, **kwargs: Any) -> Any:
        attention_mask = attention_mask + SLOPE * torch.arange(attention_mask.shape[-1])
        return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)


class ByOrderModel(LlamaForCausalLM):
    config_class = ByOrderConfig

    def __init__(self, config: ByOrderConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.__class__ = ByOrderAttention


def test_few_layers_are_judged_more_strictly_than_all_and_all_count_in_doubt() -> None:
    config = ByOrderConfig(num_hidden_layers=12, hidden_size=64, num_attention_heads=4)
    few, _ = shown_by_twin(config, every_layer=False)
    every, _ = shown_by_twin(config, every_layer=True)
    assert few["needs_temporal_order"]
    assert not every["needs_temporal_order"]
    assert not derive_positions(config, range(12)).needs_temporal_order


# Layers of several kinds, in an order that tells a wrong stand-in apart.
SEVERAL: dict[str, Any] = {
    "llama": LlamaConfig(num_hidden_layers=5),
    "gemma3": Gemma3TextConfig(num_hidden_layers=8, sliding_window=512),
    "gpt_oss": GptOssConfig(num_hidden_layers=5),
    "smollm3": SmolLM3Config(num_hidden_layers=9),
    "llama4": Llama4TextConfig(num_hidden_layers=9),
    "cohere2": Cohere2Config(num_hidden_layers=9),
    "deepseek_v3": DeepseekV3Config(num_hidden_layers=6),
}


@pytest.mark.parametrize("config", SEVERAL.values(), ids=SEVERAL)
def test_one_layer_of_each_kind_shows_what_all_layers_show(config: Any) -> None:
    one_of_each, num_left_out = shown_by_twin(config, every_layer=False)
    every_layer, _ = shown_by_twin(config, every_layer=True)
    assert num_left_out > 0
    assert one_of_each == every_layer
