"""What changes a stream between two forward passes: taken back tokens, other rows, other positions."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..compat import LinearAttentionLayer
from ..fields import Device
from .checks import ACCURATE_POSITIONS
from .layers import SinkLayer
from .mixed import select_linear_rows
from .plan import UpdatePlan
from .stream import Stream


def crop(stream: Stream, tokens_to_remove: int) -> None:
    """Take back tokens, see `SinkCache.crop`."""
    stream.sync()
    seen = stream.first.get_seq_length()
    removed = seen - stream.first.length_after_crop(tokens_to_remove, stream.layout)
    for i, layer in enumerate(stream.layers):
        if removed > 0 and not _can_take_back(layer, removed):
            raise ValueError(
                f"`tokens_to_remove` cannot be {tokens_to_remove}: layer {i}, a {type(layer).__name__}, does not hold "
                f"what it would need with {removed} tokens less. Call `activate_past_recording()` before tokens that "
                "may be taken back; a linear attention has no way back."
            )
    with stream.changing():
        for layer in stream.layers:
            # Others read 0 as a length in early 5.x, and as a call to forget what they recorded later.
            if removed == 0 and not (seen > 0 and getattr(layer, "record_past", False)):
                continue
            if isinstance(layer, SinkLayer):
                layer.crop(-removed, stream.layout)
            else:
                layer.crop(-removed)


def _can_take_back(layer: Any, removed: int) -> bool:
    """Return True if the states beside sink layers suffice with `removed` tokens less."""
    recording: bool = getattr(layer, "record_past", False)
    if isinstance(layer, LinearAttentionLayer):
        kernels: dict[int, Any] = layer.conv_kernel_size
        states = layer.conv_states.items()
        kept = all(state is None or state.shape[-1] - removed >= kernels[i] for i, state in states)
        if not (recording and kept) or any(layer.is_recurrent_states_initialized.values()):
            return False
    if isinstance(layer, DynamicSlidingWindowLayer) and (seen := layer.get_seq_length()) >= layer.sliding_window:
        held: int = layer.keys.shape[2]  # type: ignore[union-attr]
        return recording and held - removed >= min(seen - removed, layer.sliding_window - 1)
    return True


def stop_recording(stream: Stream) -> None:
    """Store updates at once again, see `SinkCache.deactivate_past_recording`."""
    with stream.changing():
        for layer in stream.layers:
            if isinstance(layer, SinkLayer):
                layer.stop_recording(stream.layout)
            elif getattr(layer, "record_past", False):
                if stream.first.get_seq_length() > 0:
                    layer.crop(0)  # cuts what was recorded
                layer.record_past = False


def move(stream: Stream, device: Device | int, dtype: torch.dtype | None) -> None:
    """Move all states to another device or dtype, see `SinkCache.to`."""
    with stream.changing(ValueError), torch.inference_mode(False):
        sink_layers = list(stream.sink_layers())
        layers = [*sink_layers, *(layer for layer in stream.layers if not isinstance(layer, SinkLayer))]
        filled = [layer for layer in sink_layers if layer.is_initialized]
        # Sinks and recurrent states are float32 beside those of half precision.
        wide = None if dtype is None else torch.promote_types(dtype, torch.float32)
        try:  # all of them, before any is put in place: a device may have no room
            device = None if device is None else torch.empty(0, device=device).device
            moved = [
                {name: _moved(x, device, wide if name == "recurrent_states" else dtype) for name, x in each.items()}
                for each in map(vars, layers)
            ]
            sinks = [_moved(None if layer.rotation is None else layer.sinks, device, wide) for layer in filled]
        except (TypeError, RuntimeError, AssertionError) as error:
            raise ValueError(f"`device` and `dtype` must be at hand, got {device} and {dtype}: {error}") from error
        for layer, states in zip(layers, moved, strict=True):
            vars(layer).update(states)
        stream.groups.clear()
        for layer, each in zip(filled, sinks, strict=True):
            layer.join_group(each)
        for layer in layers:
            for each in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
                stream.policy.mark_static(*each.values())


def _moved(value: Any, device: torch.device | None, dtype: torch.dtype | None) -> Any:
    """Return an attribute of a layer with its tensors, and what it says of them, on a device or in a dtype."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, torch.device | torch.dtype):
        return (device if isinstance(value, torch.device) else dtype) or value
    if type(value) is tuple:
        return tuple(_moved(each, device, dtype) for each in value)
    return {key: _moved(each, device, dtype) for key, each in value.items()} if type(value) is dict else value


def select_rows(stream: Stream, name: str, argument: Any, index: Tensor) -> None:
    """Keep the rows at `index`, in that order; layers of `transformers` have the method `name` for that."""
    for layer in stream.layers:
        if isinstance(layer, SinkLayer):
            layer.select_rows(index, stream.layout)
            continue
        if isinstance(layer, DynamicLayer):
            kind = DynamicSlidingWindowLayer if isinstance(layer, DynamicSlidingWindowLayer) else DynamicLayer
            getattr(kind, name)(layer, argument)
        if isinstance(layer, LinearAttentionLayer):
            select_linear_rows(layer, index)
    stream.groups.select_rows(index)
    positions = stream.layout.positions
    coordinates = stream.coordinates and stream.coordinates.select_rows(index)
    stream.set_positions(positions.select_rows(lambda rows: rows.index_select(0, index.to(rows.device))), coordinates)


def row_index(stream: Stream) -> Tensor:
    """Return the indices of the rows that are stored, or that the padding of the first prompt describes."""
    first = stream.first
    num_stored = first.keys.shape[0] if first.is_initialized else 0
    return torch.arange(stream.layout.positions.num_rows or num_stored)


def needs_rebase(stream: Stream, query_length: int) -> bool:
    """Return True if new tokens would reach the end of the positions, or where they are less accurate."""
    left, limit = stream.positions_left(), stream.spec.positions.limit
    accurate = max(ACCURATE_POSITIONS, 2 * stream.spec.window_length)
    return stream.spec.can_rebase and (query_length > left or limit - left >= accurate)


def rebase(stream: Stream) -> int:
    """Lower the positions of all kept tokens by the number of evicted ones, and return it, see `SinkCache.rebase`."""
    num_evicted = stream.first.evicted_after(stream.first.get_seq_length())
    coordinates, positions = stream.coordinates, stream.layout.positions
    now = UpdatePlan(stream.layout, stream.first.known_length, 0, num_evicted, coordinates=coordinates)
    shift = now.shift(torch.device("cpu"))
    for layer in stream.sink_layers():
        layer.rebase(shift, stream.layout)
    if coordinates is None:
        positions = positions.rebased(num_evicted)
    else:
        coordinates = coordinates.lowered(shift.flatten())
    stream.set_positions(positions, coordinates)
    return num_evicted


def compact(stream: Stream) -> None:
    """Restart positions at the kept tokens, see `SinkCache.compact`."""
    num_evicted = rebase(stream)
    seen, coordinates = stream.first.seen, stream.coordinates
    plan = UpdatePlan(stream.layout, seen, 0, stream.first.num_evicted, coordinates=coordinates)
    for layer in stream.sink_layers():
        layer.move_kept_to_front(plan)
    for layer in stream.sink_layers():
        layer.drop_evicted_from_count(num_evicted)
    coordinates = coordinates and coordinates.compacted(stream.layout, num_evicted)
    stream.set_positions(stream.layout.positions.compacted(num_evicted), coordinates)
