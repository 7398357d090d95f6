"""Which layers of a cache do not belong together any more, after a forward pass that did not end."""

from collections.abc import Iterable
from typing import Any

from transformers.cache_utils import CacheLayerMixin

from ..compat import LinearAttentionLayer
from .guard import Part
from .layers import SinkLayer
from .mixed import IndexedSinkLayer


class DamageFinder:
    """Compares what the layers of a cache have seen.

    Args:
        layers: the layers of the cache.
        text_layers: the indices of those that text reaches, in order.
    """

    def __init__(self, layers: list[Any], text_layers: tuple[int, ...]) -> None:
        self.last = text_layers[-1]
        self.last_is_linear = isinstance(layers[self.last], LinearAttentionLayer)
        attention = {i for i, layer in enumerate(layers) if isinstance(layer, CacheLayerMixin)}
        self.text_layers = [layers[i] for i in text_layers if i in attention]
        # Layers of cross-attention to an image: a pass updates all of them, or none.
        self.image_layers = [layers[i] for i in attention.difference(text_layers)]
        self.indexers = [layer.indexer for layer in self.text_layers if isinstance(layer, IndexedSinkLayer)]

    def __call__(self, parts: Iterable[Part]) -> str | None:
        """Return where the layers do not belong together, given the parts of the last pass, or None."""
        if self.last_is_linear:
            with_recurrent_state = {layer_idx for name, layer_idx, _ in parts if name == "update_recurrent_state"}
            if with_recurrent_state and self.last not in with_recurrent_state:
                return f"in layer {self.last}"
        if len({layer.get_seq_length() for layer in self.image_layers}) > 1:
            return "before the last layer that attends to an image"
        lengths = {
            layer.known_length if isinstance(layer, SinkLayer) else layer.get_seq_length() for layer in self.text_layers
        }
        # Some layers share the indexer of another; their own one is never initialized.
        lengths |= {indexer.get_seq_length() for indexer in self.indexers if indexer.is_initialized}
        if len(lengths) > 1:
            return f"between two layers: they have seen {' and '.join(map(str, sorted(lengths)))} tokens"
        return None
