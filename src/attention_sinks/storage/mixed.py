"""Layers that hold more than keys and values: states of a linear attention, or the keys of an indexer."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..architecture.spec import CacheSpec
from ..compat import DynamicIndexedLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer
from ..fields import Device, NoneType, checked, copied, placed
from ..rope import Rotation
from .groups import Plan, SinkGroups
from .layers import SinkLayer
from .layout import Layout

# The states of a linear attention or a convolution, and of which types the versions of transformers make them.
LINEAR_FIELDS: dict[str, tuple[type, ...]] = {
    "number_of_states": (int,),
    "conv_states": (dict,),
    "recurrent_states": (dict,),
    "is_conv_states_initialized": (dict,),
    "is_recurrent_states_initialized": (dict,),
    "has_previous_state": (dict,),
    "conv_kernel_size": (dict,),
    "dtype": (torch.dtype, NoneType),
    "device": (torch.device, NoneType),
    "record_past": (bool,),
}
# The types of what those of them hold that have an entry for each state.
_STATE_TYPES: dict[str, tuple[type, ...]] = {
    "conv_states": (Tensor, NoneType),
    "recurrent_states": (Tensor, NoneType),
    "is_conv_states_initialized": (bool,),
    "is_recurrent_states_initialized": (bool,),
    "has_previous_state": (bool,),
    "conv_kernel_size": (int, NoneType),
}


class HybridSinkLayer(SinkLayer, LinearAttentionAndFullAttentionLayer):
    """A `SinkLayer` beside the states of a linear attention or a convolution, whose size is constant by itself."""

    dtype: Any = None  # those of the linear attention, which sets them
    device: Any = None

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        # Called with keys and values by position for the slots, and with states by name for the rest.
        (SinkLayer if args else LinearAttentionLayer).lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        SinkLayer.reset(self)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """True while the past is recorded, unless there is a recurrent state, which has no way back."""
        return self.record_past and not any(self.is_recurrent_states_initialized.values())

    def crop(self, tokens_to_remove: int, layout: Layout) -> None:  # type: ignore[override]
        LinearAttentionLayer.crop(self, tokens_to_remove)
        SinkLayer.crop(self, tokens_to_remove, layout)

    def state(self) -> dict[str, Any]:
        linear = {name: getattr(self, name) for name in LINEAR_FIELDS if hasattr(self, name)}
        return {"linear": copied(linear), "slots": super().state()}

    def restore(self, state: dict[str, Any], device: Device) -> None:
        state = checked(state, {"linear": (dict,), "slots": (dict,)}, "a HybridSinkLayer")
        restore_linear(self, state["linear"], device)
        super().restore(state["slots"], device)

    def stop_recording(self, layout: Layout) -> None:
        if self.record_past and self.is_initialized:
            LinearAttentionLayer.crop(self, 0)  # cuts what was recorded
        super().stop_recording(layout)

    def select_rows(self, index: Tensor, layout: Layout) -> None:
        super().select_rows(index, layout)
        select_linear_rows(self, index)


class IndexedSinkLayer(SinkLayer):
    """A `SinkLayer` with a second one for the keys by which an indexer selects tokens (DeepSeek sparse attention).

    Args:
        indexer_rotation: the rotation of the indexer's keys; None if they carry no position.
    """

    def __init__(
        self,
        window_length: int,
        num_sink_tokens: int,
        rotation: Rotation | None,
        groups: SinkGroups,
        indexer_rotation: Rotation | None,
    ) -> None:
        self.indexer = SinkLayer(window_length, num_sink_tokens, indexer_rotation, groups)
        self._position_shape: torch.Size | None = None
        super().__init__(window_length, num_sink_tokens, rotation, groups)

    def sink_layers(self) -> Iterator[SinkLayer]:
        yield self
        yield self.indexer

    def update_indexer(self, indexer_key_states: Tensor, plan: Plan) -> Tensor:
        """Store the indexer's keys `[batch_size, query_length, index_head_dim]`; return those of all kept tokens."""
        states = indexer_key_states[:, None]
        return self.indexer.update(states, states[..., :0], plan)[0][:, 0]

    @property
    def indexer_position_ids(self) -> Tensor | None:
        """Positions of the kept tokens before the coming update, `[position_dims, batch_size, kept]`: contiguous."""
        seen = self.get_seq_length()
        if self._position_shape is None or seen == 0:
            return None
        positions = torch.arange(self.evicted_after(seen + 1), seen, device=self.device)
        position_dims, batch_size = self._position_shape
        return positions.expand(position_dims, batch_size if batch_size == 1 else self.keys.shape[0], -1)

    @indexer_position_ids.setter
    def indexer_position_ids(self, position_ids: Tensor) -> None:
        # The positions are known; how the model shapes them is not.
        self._position_shape = position_ids.shape[:-1]

    def state(self) -> dict[str, Any]:
        shape = None if self._position_shape is None else [*self._position_shape]
        return {"attention": super().state(), "indexer": self.indexer.state(), "position_shape": shape}

    def restore(self, state: dict[str, Any], device: Device) -> None:
        fields = {"attention": (dict,), "indexer": (dict,), "position_shape": (list, NoneType)}
        state = checked(state, fields, "an IndexedSinkLayer")
        super().restore(state["attention"], device)
        self.indexer.restore(state["indexer"], device)
        shape = state["position_shape"]
        self._position_shape = None if shape is None else torch.Size(shape)

    def reset(self) -> None:
        self.indexer.reset()
        super().reset()

    def activate_past_recording(self) -> None:
        self.indexer.activate_past_recording()
        super().activate_past_recording()

    def stop_recording(self, layout: Layout) -> None:
        self.indexer.stop_recording(layout)
        super().stop_recording(layout)

    def crop(self, tokens_to_remove: int, layout: Layout) -> None:
        if self.indexer.is_initialized:  # some layers share the indexer of another
            self.indexer.crop(tokens_to_remove, layout)
        super().crop(tokens_to_remove, layout)

    def select_rows(self, index: Tensor, layout: Layout) -> None:
        self.indexer.select_rows(index, layout)
        super().select_rows(index, layout)


def select_linear_rows(layer: Any, index: Tensor) -> None:
    """Keep the rows at `index` in the states of a linear attention or a convolution."""
    for states in (layer.conv_states, layer.recurrent_states):
        for i, state in states.items():
            if state is not None:
                states[i] = state.index_select(0, index.to(state.device))


def check_linear_states(layer: Any, state: dict[str, Any]) -> None:
    """Check that a saved linear attention or convolution has the states of a layer.

    Raises:
        ValueError: naming the first entry that is unknown, missing or of another type.
    """
    for name in _STATE_TYPES.keys() & state.keys():
        checked(state[name], dict.fromkeys(range(layer.number_of_states), _STATE_TYPES[name]), name)


def restore_linear(layer: Any, state: Any, device: Device) -> None:
    """Give a layer the saved states of a linear attention or a convolution."""
    fields = {name: types for name, types in LINEAR_FIELDS.items() if hasattr(layer, name)}
    state = checked(state, fields, f"the linear attention of a {type(layer).__name__}")
    check_linear_states(layer, state)
    saved_on = state["device"]
    for name in fields:
        setattr(layer, name, placed(state[name], saved_on, device))
    layer.device = saved_on if device is None or saved_on is None else torch.device(device)


def build_layers(spec: CacheSpec, groups: SinkGroups) -> list[Any]:
    """Return the layers of a cache: those of a `DynamicCache`, with sink layers in the place of some."""
    layers: list[Any] = list(spec.layers)
    window = spec.window_length, spec.num_sink_tokens
    for i in spec.sink_layers:
        rotation = spec.positions.rotations[i]
        if isinstance(layers[i], LinearAttentionLayer):
            layers[i] = HybridSinkLayer(*window, rotation, groups, number_of_states=layers[i].number_of_states)
        elif isinstance(layers[i], DynamicIndexedLayer):
            layers[i] = IndexedSinkLayer(*window, rotation, groups, spec.positions.indexers.get(i))
        else:
            layers[i] = SinkLayer(*window, rotation, groups)
    return layers


def drop_states(layer: Any) -> None:
    """Drop the states of a layer of any kind, also those that its own `reset` would keep."""
    if isinstance(layer, LinearAttentionLayer):  # it would keep tensors of the old batch
        LinearAttentionLayer.__init__(layer, number_of_states=layer.number_of_states)
    # Dropped before they would be zeroed: states of inference mode cannot be, outside of it. A layer without
    # sinks would go on recording.
    if isinstance(layer, DynamicLayer):
        layer.keys = layer.values = None
        layer.is_initialized = layer.record_past = False  # type: ignore[attr-defined]
    layer.reset()
