"""Which token stands in which column: of the keys that a layer holds, and of the attention weights of a pass."""

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from .layers import SinkLayer
from .plan import UpdatePlan, WindowedPlan
from .stream import Stream


def token_indices(
    stream: Stream, layer_idx: int, attentions: Tensor | None, seen: int | None, prefilled: bool
) -> Tensor:
    """Return the indices of the tokens in the columns of a layer, see `SinkCache.token_indices`."""
    stream.sync()
    layer = stream.layers[layer_idx] if layer_idx in stream.spec.text_layers else None
    if not isinstance(layer, SinkLayer | DynamicSlidingWindowLayer):
        raise ValueError(f"`layer_idx` must be that of a layer with keys of the text, got {layer_idx}.")
    held = _held(stream, layer) if attentions is None else _attended(stream, layer, attentions, seen, prefilled)
    num_rows = layer.keys.shape[0] if layer.is_initialized else len(held)  # type: ignore[union-attr]
    return held.expand(num_rows, -1)


def _held(stream: Stream, layer: SinkLayer | DynamicSlidingWindowLayer) -> Tensor:
    layout, device = stream.layout, torch.device("cpu") if layer.keys is None else layer.keys.device
    if isinstance(layer, SinkLayer):
        tokens = layout.tokens_in_slots(layer.seen, layer.evicted_after(layer.seen), device)
    else:
        end, length = layer.get_seq_length(), 0 if layer.keys is None else layer.keys.shape[2]
        tokens = layout.tokens_between(end - length, end, device)
    return layout.columns_of(tokens)


def _attended(
    stream: Stream,
    layer: SinkLayer | DynamicSlidingWindowLayer,
    attentions: Tensor,
    seen: int | None,
    prefilled: bool,
) -> Tensor:
    layout, (query_length, num_columns), device = stream.layout, attentions.shape[-2:], attentions.device
    end = layer.get_seq_length() if seen is None else seen
    start = max(end - query_length, 0)
    if isinstance(layer, DynamicSlidingWindowLayer):
        length = min(start, layer.sliding_window - 1) + query_length
        indices = layout.columns_of(layout.tokens_between(end - length, end, device))
    elif prefilled and stream.spec.supports_windowed_chunks and (query_length > 1 or layout.positions.num_rows > 0):
        indices = WindowedPlan(layout, start, query_length, layer.num_evicted).token_indices(device)
    else:
        in_order = stream.spec.positions.needs_temporal_order or layer.record_past
        # A compiled step returns all slots, full or not.
        all_slots = query_length == 1 and num_columns == layer.window_length
        plan = UpdatePlan(layout, start, query_length, layer.num_evicted, in_order, all_slots)
        indices = plan.token_indices(device)
    if indices.shape[1] != num_columns or query_length > end:
        raise ValueError(
            f"`attentions` must have the {indices.shape[1]} columns of a pass after which {end} tokens were seen, got "
            f"{num_columns}. Say how many tokens were seen after their pass, `seen=...`, and if it was one of "
            "`sink_prefill`, `prefilled=True`."
        )
    return indices
