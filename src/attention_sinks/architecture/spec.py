"""What each layer of a config becomes in a `SinkCache`, decided before anything is stored."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from ..compat import (
    DynamicIndexedLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)
from ..rope import Rotation
from .positions import LAST_POSITION, Positions, derive_positions

# The layers that a forward pass over text updates.
TEXT_LAYER_TYPES = (CacheLayerMixin, LinearAttentionLayer)
# Those that hold keys and values and nothing else.
PLAIN_LAYER_TYPES = (DynamicLayer, DynamicSlidingWindowLayer)


@dataclass(frozen=True)
class CacheSpec:
    """How the states of a model are cached.

    Args:
        config: the config of the text model.
        window_length, num_sink_tokens: the window, and how many of its tokens are sinks.
        layers: those of a `DynamicCache` for the config; `sink_layers` of them are replaced.
        positions: how the model tells positions apart; its `rotations` name the layers that become sink layers.
        is_measured: True if the positions were measured, False if the rotation was given.
        text_layers: the indices of the layers that text reaches, in order.
        sliding_window: the narrowest sliding window of a mask that a sink layer gets, or infinity.
    """

    config: PreTrainedConfig
    window_length: int
    num_sink_tokens: int
    layers: list[Any]
    positions: Positions
    is_measured: bool
    text_layers: tuple[int, ...]
    sliding_window: float

    @property
    def model_type(self) -> str:
        """The model type, for messages."""
        return str(self.config.model_type)

    @property
    def sink_layers(self) -> tuple[int, ...]:
        """The indices of the layers that keep sinks."""
        return tuple(self.positions.rotations)

    @property
    def longest_window(self) -> int:
        """The most tokens that a layer of any kind holds."""
        windows = (each.sliding_window for each in self.layers if isinstance(each, DynamicSlidingWindowLayer))
        return max(self.window_length, *windows, 1)

    @property
    def accepts_padding(self) -> bool:
        """True if the model runs with the mask of a padded batch."""
        # An indexer that pools the keys of neighbours is given positions that know no padding.
        return self.positions.masked and not (self.positions.indexers and self.positions.needs_temporal_order)

    @property
    def has_plain_layers(self) -> bool:
        """True if each layer of the model has a sink layer of its own, with keys and values and nothing else."""
        return len(self.sink_layers) == len(self.layers) and all(
            type(layer) in PLAIN_LAYER_TYPES for layer in self.layers
        )

    @property
    def has_separate_layers(self) -> bool:
        """True if no layer can read the states of another one: each layer of the model updates one of its own."""
        return self.has_plain_layers and len(self.layers) == getattr(self.config, "num_hidden_layers", None)

    @property
    def supports_windowed_chunks(self) -> bool:
        """True if a chunk can be read with a window for each of its tokens."""
        return self.has_plain_layers and not self.positions.needs_temporal_order

    @property
    def can_rebase(self) -> bool:
        """True if positions can be rebased: the model reads them from `position_ids`, all attention is in sink layers.

        An indexer that pools the keys of neighbours is given positions by the cache.
        """
        if self.positions.indexers and self.positions.needs_temporal_order:
            return False
        others = (each for i, each in enumerate(self.layers) if i not in self.positions.rotations)
        return self.positions.rebasable and not any(hasattr(each, "keys") for each in others)

    @property
    def supports_static(self) -> bool:
        """True if a single token can be taken by tensors alone, for `torch.compile`.

        A model with a position limit is asked at every step, in Python, and flash attention takes no mask that would
        hide empty slots.
        """
        attention = self.config._attn_implementation
        if self.positions.limit < LAST_POSITION or self.positions.needs_temporal_order:
            return False
        if attention not in (None, "eager", "sdpa", "flex_attention"):
            return False
        return all(
            type(layer) in PLAIN_LAYER_TYPES if i in self.positions.rotations else layer.is_compileable
            for i, layer in enumerate(self.layers)
        )


def cache_spec(
    config: PreTrainedConfig, window_length: int, num_sink_tokens: int, rotation: Rotation | None
) -> CacheSpec:
    """Return how a `SinkCache` caches the states of the model that `config` describes.

    Args:
        config: the config of a model, or of its text model.
        window_length, num_sink_tokens: the window.
        rotation: the rotation of all sink layers, if it is not to be measured.

    Raises:
        ValueError: if no layer would keep a sink, or the window reaches the end of the positions.
        NotImplementedError: naming the model type and the reason, for a model that cannot be supported exactly.
    """
    if config.is_encoder_decoder:
        raise _refusal(config, "it is an encoder-decoder model.")
    config = config.get_text_config(decoder=True)
    try:
        layers: list[Any] = DynamicCache(config=config).layers
    except Exception as error:
        reason = f"not even a DynamicCache can be made from its config ({type(error).__name__}: {error})."
        raise _refusal(config, reason) from error
    replaced = [i for i in range(len(layers)) if _keeps_sinks(layers[i], i, config, window_length)]
    if not any(isinstance(layer, DynamicLayer) for layer in layers):
        raise _refusal(config, "it has no attention layers, and its memory is constant without a SinkCache.")
    if not replaced:
        raise ValueError(
            f"`window_length` must be smaller than the sliding window of the model; with {window_length} no layer of "
            f"this {config.model_type!r} model would keep a sink. Choose a smaller one, or use a `DynamicCache`."
        )
    positions = derive_positions(config, replaced) if rotation is None else _given(config, layers, replaced, rotation)
    if positions.limit <= window_length:
        raise ValueError(
            f"`window_length` must be below {positions.limit}, where this {config.model_type!r} model ends or changes "
            f"its behaviour, got {window_length}."
        )
    # The measured layers are those that text reaches. The others are cross-attention to images, or no attention.
    not_text = {*replaced} - positions.rotations.keys()
    text = [i for i, layer in enumerate(layers) if isinstance(layer, TEXT_LAYER_TYPES) and i not in not_text]
    # A sink layer in the place of a sliding one still gets the mask of the sliding window.
    sliding_window = min(getattr(layers[i], "sliding_window", torch.inf) for i in positions.rotations)
    return CacheSpec(
        config, window_length, num_sink_tokens, layers, positions, rotation is None, tuple(text), sliding_window
    )


def _refusal(config: PreTrainedConfig, reason: str) -> NotImplementedError:
    return NotImplementedError(f"SinkCache does not support the model type {config.model_type!r}: {reason}")


def _given(config: PreTrainedConfig, layers: list[Any], replaced: list[int], rotation: Rotation) -> Positions:
    """Return the positions of a model whose rotation was given."""
    if any(isinstance(layers[i], DynamicIndexedLayer) for i in replaced):
        raise NotImplementedError(
            f"`rotation` cannot say how the indexers of this {config.model_type!r} model rotate their keys; leave it "
            "out."
        )
    return Positions(dict.fromkeys(replaced, rotation), first_rotating_layer=replaced[0])


def _keeps_sinks(layer: Any, layer_idx: int, config: PreTrainedConfig, window_length: int) -> bool:
    """Return True if a layer of `DynamicCache(config=config)` attends further back than `window_length` tokens."""
    if type(layer) in (DynamicLayer, DynamicIndexedLayer, LinearAttentionAndFullAttentionLayer):
        return True
    if type(layer) in (DynamicSlidingWindowLayer, LinearAttentionAndSlidingWindowAttentionLayer):
        layer_types = getattr(config, "layer_types", None)
        # Chunked layers share the class; their chunks start at absolute positions.
        chunked = layer_types is not None and layer_types[layer_idx] == "chunked_attention"
        chunked |= layer_types is None and getattr(config, "sliding_window", None) is None
        wider: bool = layer.sliding_window > window_length
        return wider and not chunked
    if isinstance(layer, DynamicLayer):
        raise _refusal(
            config,
            f"layer {layer_idx} keeps its tokens in a {type(layer).__name__}, a form of its own, from which single "
            "tokens cannot be evicted.",
        )
    return False


def check_arguments(config: Any, window_length: Any, num_sink_tokens: Any, rotation: Any) -> None:
    """Check the arguments of a `SinkCache`.

    Raises:
        TypeError, ValueError: naming the argument and its value.
    """
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(
            f"`config` must be the config of the model, got {config!r:.80}: the rotation of the cached keys is derived "
            "from it. Call `SinkCache(model.config, window_length=256, num_sink_tokens=4)`."
        )
    check_int("window_length", window_length, at_least=1)
    check_int("num_sink_tokens", num_sink_tokens, at_least=0)
    if num_sink_tokens >= window_length:
        raise ValueError(
            "`num_sink_tokens` must be smaller than `window_length`, which counts them and at least one recent token; "
            f"got num_sink_tokens={num_sink_tokens} and window_length={window_length}."
        )
    if not isinstance(rotation, Rotation | None):
        raise TypeError(f"`rotation` must be a Rotation, got {rotation!r:.80}.")


def check_int(name: str, value: object, at_least: int) -> None:
    """Check a number.

    Raises:
        TypeError, ValueError: naming the argument and its value.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be an int, got {value!r}.")
    if value < at_least:
        raise ValueError(f"`{name}` must be at least {at_least}, got {value}.")
