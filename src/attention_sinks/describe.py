"""Descriptions of the cache of a model, for `attention-sinks info`. They need only the config."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from .cache import SinkCache
from .compat import with_cache
from .storage.layers import SinkLayer


def position_encodings(cache: SinkCache) -> dict[str, list[int]]:
    """Return a description of each position encoding, and the indices of its layers."""
    encodings: dict[str, list[int]] = {}
    for i, layer in enumerate(cache.layers):
        if not isinstance(layer, SinkLayer):
            continue
        rotation = layer.rotation
        if rotation is None:
            encoding = "bias by distance (ALiBi)" if cache.needs_temporal_order else "none in the keys"
        else:
            wavelengths = 2 * torch.pi / rotation.inv_freq[rotation.inv_freq > 0].double()
            encoding = (
                f"RoPE: {rotation.rotary_dim} rotary dimensions from dimension {rotation.start}, "
                f"{'interleaved' if rotation.interleaved else 'rotate-half'} layout, "
                f"wavelengths {float(wavelengths.min()):,.1f} to {float(wavelengths.max()):,.0f} tokens"
            )
        encodings.setdefault(encoding, []).append(i)
    return encodings


def ranges(numbers: list[int]) -> str:
    """Return increasing numbers as ranges, for example `0-3, 5` for 0, 1, 2, 3, 5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def layer_memory(layer: Any) -> str:
    """Return a description of what a layer without sinks stores."""
    window = getattr(layer, "sliding_window", None)
    return f"sliding window of {window:,} tokens, without sinks" if window else "state of constant size, or no state"


def cache_bytes(config: Any, cache: SinkCache, dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes of the layers with sinks, and of the other layers after one token.

    Run a forward pass on the meta device, which allocates nothing.
    """
    with torch.device("meta"), torch.no_grad():
        # bfloat16, because transformers implements every kernel for it. The sizes are computed for `dtype`.
        meta_model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        meta_model(torch.zeros(1, 1, dtype=torch.long), use_cache=True, **with_cache(meta_model.forward, cache))
    sink_bytes = other_bytes = 0
    for layer in cache.layers:
        for part in (layer, getattr(layer, "indexer", None)):
            if part is None or getattr(part, "keys", None) is None:
                continue
            num_bytes = (part.keys.numel() + part.values.numel()) * dtype.itemsize
            if isinstance(layer, SinkLayer):
                sink_bytes += num_bytes
            else:
                other_bytes += num_bytes
    return sink_bytes, other_bytes
