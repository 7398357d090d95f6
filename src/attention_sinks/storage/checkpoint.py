"""A cache as plain values and tensors, for a file; and whose model it was."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..architecture.settings import config_state
from ..compat import LinearAttentionLayer
from ..fields import Device, NoneType, checked, copied, placed
from ..rope import Rotation
from .coordinates import Coordinates
from .layers import SinkLayer
from .mixed import LINEAR_FIELDS, check_linear_states, restore_linear
from .positions import token_positions
from .stream import Stream

_ROTATION_FIELDS: dict[str, tuple[type, ...]] = {
    "inv_freq": (Tensor,),
    "start": (int,),
    "interleaved": (bool,),
    "in_values": (bool,),
}
# What is saved of a cache besides its layers, and of which types.
FIELDS: dict[str, tuple[type, ...]] = {
    "config": (dict,),
    "window_length": (int,),
    "num_sink_tokens": (int,),
    "rotations": (list,),
    "measured": (bool,),
    "left_padding": (Tensor, NoneType),
    "position_offset": (int,),
    "layers": (list,),
    "process": (list, NoneType),
}
# Beside them, if positions are not token counts.
_COORDINATE_FIELDS: dict[str, tuple[type, ...]] = {
    "low": (Tensor,),
    "following": (Tensor,),
    "end_of_sinks": (Tensor,),
    "end": (int,),
}
# The same of the layers of transformers that keep their own class. `dtype` and `device` come with the first states.
_DYNAMIC_FIELDS: dict[str, tuple[type, ...]] = {
    "keys": (Tensor, NoneType),
    "values": (Tensor, NoneType),
    "is_initialized": (bool,),
    "dtype": (torch.dtype, NoneType),
    "device": (torch.device, NoneType),
}
_SLIDING_FIELDS = {**_DYNAMIC_FIELDS, "sliding_window": (int,), "cumulative_length": (int,), "record_past": (bool,)}
_DERIVED = {"_sliding_window_tensor"}


def layer_state(layer: Any) -> dict[str, Any]:
    """Return what a file holds of a layer of any kind.

    Raises:
        NotImplementedError: if a layer of `transformers` has states that this version of the library does not know.
    """
    if isinstance(layer, SinkLayer):
        return {"kind": type(layer).__name__, **layer.state()}
    fields, held = _fields_of(layer), vars(layer)
    unknown = held.keys() - fields.keys() - _DERIVED
    if unknown:
        raise NotImplementedError(
            f"This version of transformers gives its {type(layer).__name__} the state {min(unknown)!r}, which this "
            "version of attention-sinks cannot save."
        )
    return {"kind": type(layer).__name__, **copied({name: held.get(name) for name in fields if name in held})}


def restore_layer(layer: Any, state: dict[str, Any], device: Device) -> None:
    """Give a new layer the saved state of another one of its kind.

    Raises:
        ValueError: if it is not such a state, or its device is not at hand.
    """
    state = {name: value for name, value in state.items() if name != "kind"}
    if isinstance(layer, SinkLayer):
        layer.restore(state, device)
    elif isinstance(layer, LinearAttentionLayer) and not isinstance(layer, DynamicLayer):
        restore_linear(layer, state, device)
    else:
        # A new layer has no `dtype` and no `device` yet, and one without states is saved without them.
        fields, first = _fields_of(layer), {"dtype", "device"}
        # Early transformers 5 cannot record the past.
        if "record_past" in vars(layer):
            state.setdefault("record_past", False)
        elif state.get("record_past") is False:
            del state["record_past"]
        fields = {name: fields[name] for name in fields if name in vars(layer) or (name in first and name in state)}
        state = checked(state, fields, f"a {type(layer).__name__}")
        if isinstance(layer, LinearAttentionLayer):
            check_linear_states(layer, state)
        saved_on = state.get("device")
        for name, value in state.items():
            setattr(layer, name, placed(value, saved_on, device))
        if saved_on is not None and device is not None:
            layer.device = torch.device(device)
        if isinstance(layer, DynamicSlidingWindowLayer) and saved_on is not None:
            layer._sliding_window_tensor = layer._sliding_window_tensor.to(layer.device)


def _fields_of(layer: Any) -> dict[str, tuple[type, ...]]:
    fields: dict[str, tuple[type, ...]] = {}
    if isinstance(layer, LinearAttentionLayer):
        fields |= LINEAR_FIELDS
    if isinstance(layer, DynamicSlidingWindowLayer):
        return fields | _SLIDING_FIELDS
    return fields if isinstance(layer, LinearAttentionLayer) else _DYNAMIC_FIELDS


def rotations_of(layers: Iterable[SinkLayer]) -> list[dict[str, Any] | None]:
    """Return the rotations of sink layers as plain values and tensors."""
    return [
        None if layer.rotation is None else {name: getattr(layer.rotation, name) for name in _ROTATION_FIELDS}
        for layer in layers
    ]


def rotations_from(saved: list[dict[str, Any] | None]) -> list[Rotation | None]:
    """Return the rotations that `rotations_of` described."""
    return [None if each is None else Rotation(**checked(each, _ROTATION_FIELDS, "a rotation")) for each in saved]


def same_rotation(rotation: Rotation | None, other: Rotation | None) -> bool:
    """Return True if two rotations are the same, but for what frequencies differ by between machines."""
    if rotation is None or other is None or repr(rotation) != repr(other):
        return rotation is other
    return torch.allclose(rotation.inv_freq.cpu(), other.inv_freq, rtol=1e-5, atol=0)


def process_of_heads(config: PreTrainedConfig, layer: SinkLayer) -> list[int] | None:
    """Return which process this is, and of how many, if each holds some of the heads (tensor parallelism)."""
    heads = getattr(config, "num_key_value_heads", None)
    shared = layer.is_initialized and isinstance(heads, int) and 1 <= layer.keys.shape[1] < heads
    if not (shared and torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    return [torch.distributed.get_rank(), torch.distributed.get_world_size()]


def checked_state(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a cache in the current format, with its entries checked; those of layers are checked later.

    Raises:
        ValueError: naming the first entry that is unknown, missing or of another type.
    """
    try:
        upgraded = _upgraded(state)
    except (KeyError, TypeError, AttributeError) as error:  # of format 1
        raise ValueError(f"`path` must be a file that `save` wrote: an entry is missing or wrong ({error}).") from error
    optional = {"coordinates": (dict,)} if "coordinates" in upgraded else {}
    checked(upgraded, {**FIELDS, **optional}, "a cache")
    for layer in upgraded["layers"]:
        if not isinstance(layer, dict):
            raise ValueError(f"`path` must be a file that `save` wrote: the state of a layer is {layer!r:.80}.")
    return upgraded


def _upgraded(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state of the current format, also from one of format 1, which held the attributes of version 1.4."""
    if "base" not in state:
        return state
    state = {name: value for name, value in state.items() if name != "eager_tokens"}
    state["left_padding"], state["position_offset"] = state.pop("pads"), state.pop("base")
    state["layers"] = [_upgraded_layer(layer) for layer in state["layers"]]
    return state


def _upgraded_layer(old: dict[str, Any]) -> dict[str, Any]:
    if not old["kind"].endswith("SinkLayer"):
        return {name: value for name, value in old.items() if name not in _DERIVED}
    slots = {name: old[name] for name in ("is_initialized", "record_past", "keys", "values", "sinks")}
    slots |= {"seen": old["_seen"], "num_evicted": old["_cropped"], "pending": old["_recorded"]}
    slots["device"] = old.get("device")
    if old["kind"] == "HybridSinkLayer":
        return {"kind": old["kind"], "linear": {n: old[n] for n in LINEAR_FIELDS if n in old}, "slots": slots}
    if old["kind"] == "IndexedSinkLayer":
        indexer = {name: value for name, value in _upgraded_layer(old["indexer"]).items() if name != "kind"}
        shape = old["_position_shape"]
        return {"kind": old["kind"], "attention": slots, "indexer": indexer, "position_shape": shape}
    return {"kind": old["kind"], **slots}


def stream_state(stream: Stream) -> dict[str, Any]:
    """Return a stream as plain values and tensors; what layers hold is copied to the CPU.

    Raises:
        RuntimeError: if a forward pass was interrupted half-way, or runs now.
    """
    stream.check()
    for layer in stream.sink_layers():
        layer.bring_back()
    spec, seen = stream.spec, stream.first.get_seq_length()
    state = {
        "config": config_state(spec.config),
        "window_length": spec.window_length,
        "num_sink_tokens": spec.num_sink_tokens,
        "rotations": rotations_of(stream.sink_layers()),
        "measured": spec.is_measured,
        "left_padding": stream.layout.positions.left_padding,
        "position_offset": stream.layout.positions.offset,
        "layers": [layer_state(layer) for layer in stream.layers],
        "process": process_of_heads(spec.config, stream.first),
    }
    if stream.coordinates is not None:
        state["coordinates"] = vars(stream.coordinates)
    stream.check()
    if stream.first.get_seq_length() != seen:
        raise RuntimeError("A forward pass ran while the stream was saved. Save it between two of them.")
    return state


def restore_stream(stream: Stream, state: dict[str, Any], device: Device) -> None:
    """Give a new stream the saved state of another one; a `device` takes the place of those it was on.

    Raises:
        ValueError: if the stream belongs to another model, version or process, or a device is not at hand.
    """
    layers, rotations = list(stream.sink_layers()), rotations_from(state["rotations"])
    kinds = [layer.get("kind") for layer in state["layers"]]
    if (
        kinds != [type(layer).__name__ for layer in stream.layers]
        or len(layers) != len(rotations)
        or not all(same_rotation(a.rotation, b) for a, b in zip(layers, rotations, strict=True))
    ):
        raise ValueError(
            f"`config` is that of the {stream.spec.model_type!r} model whose stream was saved, but this version of "
            "transformers caches its states in another form. Load the stream with the version that it was saved with, "
            f"{state['config'].get('transformers_version')}."
        )
    with torch.inference_mode(False):
        stream.restart(token_positions(state["left_padding"], state["position_offset"]))
        if "coordinates" in state:
            coordinates = checked(state["coordinates"], _COORDINATE_FIELDS, "the positions of images")
            stream.set_positions(stream.layout.positions, Coordinates(**coordinates))
        for layer, saved in zip(stream.layers, state["layers"], strict=True):
            restore_layer(layer, saved, device)
            for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
                stream.policy.mark_static(*states.values())
        stream.update_compiled_count()
    if state["process"] not in (None, process_of_heads(stream.spec.config, stream.first)):
        rank, processes = state["process"]
        raise ValueError(
            f"`path` must be a file that this process saved: it has the heads of process {rank} of {processes}. Save a "
            "file for each process."
        )
