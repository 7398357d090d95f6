"""Which rotation a model's cached keys carry, and turning keys by a shift. Knows no cache.

The rotation is not looked up in a table of model types, it is measured: a small random twin of the model, built by the
model's own code from the same config, sees one token at several positions, and its cached keys show how they turn. Only
a rotation that explains every key is accepted; whatever is not understood is refused.
"""

import json
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer


class Rotation:
    """A rotary position embedding with fixed frequencies: how some dimensions of a key turn with its position.

    Pair `i` of the rotating dimensions is a complex number that turns by `inv_freq[i]` radians per position
    (RoFormer, arXiv 2104.09864). The scale that YaRN puts on cos and sin is a property of the key and no part of this.

    Args:
        inv_freq: radians per position, shape `[rotary_dim / 2]`.
        start: index of the first rotating dimension; the rotating ones are contiguous.
        interleaved: whether pairs are neighbours (`0, 1`) as in GPT-J, or lie half the block apart
            (`0, rotary_dim / 2`) as in Llama.
    """

    def __init__(self, inv_freq: Tensor, start: int, interleaved: bool) -> None:
        # float64 holds the model's own float32 frequencies exactly, and their angles at any position.
        self.inv_freq = inv_freq.double()
        self.start = start
        self.interleaved = interleaved

    @property
    def rotary_dim(self) -> int:
        return 2 * self.inv_freq.numel()

    def __repr__(self) -> str:
        pairing = "interleaved" if self.interleaved else "halves"
        return f"Rotation(dims {self.start} to {self.start + self.rotary_dim - 1}, {pairing})"

    def pairs(self, key_states: Tensor) -> Tensor:
        """The rotating dimensions of keys `[..., head_dim]`, as a view of shape `[..., rotary_dim / 2, 2]`."""
        rotating = key_states.narrow(-1, self.start, self.rotary_dim)
        num_pairs = self.inv_freq.numel()
        if self.interleaved:
            return rotating.view(*rotating.shape[:-1], num_pairs, 2)
        return rotating.view(*rotating.shape[:-1], 2, num_pairs).transpose(-1, -2)

    def complex_pairs(self, key_states: Tensor) -> Tensor:
        """A copy of the rotating dimensions of keys `[..., head_dim]` as complex numbers `[..., rotary_dim / 2]`.

        At least complex64, so that turning half-precision keys rounds once, on the way back.
        """
        precision = torch.promote_types(key_states.dtype, torch.float32)
        return torch.complex(*self.pairs(key_states).to(precision).unbind(-1))

    def phase(self, shift: int, dtype: torch.dtype) -> Tensor:
        """The complex factors, shape `[rotary_dim / 2]`, that turn `complex_pairs` forward by `shift` positions.

        The angles are float64. They are computed where `inv_freq` lies.
        """
        angles = self.inv_freq * shift
        return torch.polar(torch.ones_like(angles), angles).to(dtype)

    def to(self, device: torch.device) -> "Rotation":
        """The same rotation with its frequencies on `device`."""
        return Rotation(self.inv_freq.to(device), self.start, self.interleaved)

    def turned(self, key_states: Tensor, shift: int) -> Tensor:
        """Keys `[..., head_dim]` moved forward by `shift` positions, as a new tensor."""
        rotated = self.complex_pairs(key_states)
        turned = key_states.clone()
        self.pairs(turned).copy_(torch.view_as_real(rotated * self.phase(shift, rotated.dtype)))
        return turned


def derive_rotations(config: PreTrainedConfig, layers: Iterable[int]) -> dict[int, Rotation | None]:
    """The rotation of each of `layers` of the model that `config` describes; None for a layer without position.

    Raises:
        NotImplementedError: naming the model type and the reason, if the keys of a layer do not turn by one fixed
            rotation, or if attention depends on more than the distance of two tokens.
    """
    measured = _measure(type(config), config.to_json_string(use_diff=False))  # type: ignore[arg-type]  # classes hash
    if isinstance(measured, str):
        raise NotImplementedError(f"SinkCache does not support the model type {config.model_type!r}: {measured}.")
    rotations = {}
    for layer in layers:
        rotation = measured.get(layer, "its keys are not cached")
        if isinstance(rotation, str):
            raise NotImplementedError(
                f"SinkCache does not support the model type {config.model_type!r}: in layer {layer} {rotation}."
            )
        rotations[layer] = rotation
    if not any(rotations.values()):
        raise NotImplementedError(
            f"SinkCache does not support the model type {config.model_type!r}: none of its cached keys carries a "
            "position, so its positions lie outside the cache (ALiBi, for instance)."
        )
    return rotations


# Measured on the twin's keys in float32: errors of rounding stay below 1e-4 at these positions, other frequencies or
# another pairing give errors near 1.
_TOLERANCE = 1e-3
_NEAR = 1024


@lru_cache(maxsize=32)
def _measure(config_class: type[PreTrainedConfig], config_json: str) -> dict[int, Rotation | str | None] | str:
    """Per layer with keys: its rotation, None without one, or why it is refused. A str refuses the whole model."""
    # Nothing of the caller's is used or changed: random state, default device, autocast, gradient and inference mode.
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        return _measure_twin(config_class, json.loads(config_json))


def _measure_twin(
    config_class: type[PreTrainedConfig], config_dict: dict[str, Any]
) -> dict[int, Rotation | str | None] | str:
    limit = config_dict.get("max_position_embeddings") or _NEAR
    near = [0, 1, 2, min(_NEAR, limit) // 2, min(_NEAR, limit) - 1]
    far = 4 * max(limit, _NEAR)
    try:
        twin = _build_twin(config_class.from_dict(config_dict))
        # Read now: a model whose frequencies depend on the length replaces them on the way.
        frequencies = [b.clone() for b in twin.buffers() if b.ndim == 1 and b.is_floating_point()]
        keys, values = _cached_at(twin, near)
    except Exception as error:
        return f"its attention could not be measured on a small twin ({type(error).__name__}: {error})"

    # Made once, so that layers with the same rotation share one object.
    candidates = _candidates(frequencies, {layer_keys.shape[-1] for layer_keys in keys.values()})
    measured: dict[int, Rotation | str | None] = {}
    for layer, layer_keys in keys.items():
        if not _same(values[layer], values[layer][:1].expand_as(values[layer])):
            return "its tokens carry their absolute position before they are cached"
        measured[layer] = _explain(layer_keys, near, candidates)

    try:
        far_keys, _ = _cached_at(twin, [*near, far])
        start, later = _logits_at(twin, 0), _logits_at(twin, far)
    except Exception as error:
        return f"its positions are limited ({type(error).__name__}: {error})"
    for layer, layer_keys in keys.items():
        if not _same(far_keys[layer][:-1], layer_keys):
            return "its rotary frequencies depend on the length of the sequence"
    if not _same(start, later):
        return "its attention depends on absolute positions, not on distances alone"
    return measured


def _explain(keys: Tensor, positions: list[int], candidates: list[Rotation]) -> Rotation | str | None:
    """The rotation that turns `keys[0]` into every `keys[i]`; they stand at `positions`, of which the first is 0."""
    if _same(keys, keys[:1].expand_as(keys)):
        return None
    for rotation in candidates:
        if rotation.start + rotation.rotary_dim <= keys.shape[-1] and all(
            _same(keys[i], rotation.turned(keys[0], position)) for i, position in enumerate(positions)
        ):
            return rotation
    return "the cached keys do not turn by a rotary embedding of fixed frequencies alone"


def _candidates(frequencies: list[Tensor], head_dims: set[int]) -> list[Rotation]:
    """Every rotation that keys of `head_dims` dimensions could have: whole or partial, at the head or at the tail."""
    return [
        Rotation(signed, start, interleaved)
        for inv_freq in frequencies
        for signed in (inv_freq, -inv_freq)
        for start in sorted({0} | {head_dim - 2 * inv_freq.numel() for head_dim in head_dims})
        for interleaved in (False, True)
        if start >= 0
    ]


def _same(a: Tensor, b: Tensor) -> bool:
    # Not `allclose`: NaN and infinity must count as different, and zero keys would hide any rotation.
    return bool((a - b).norm() < _TOLERANCE * b.norm())


def _build_twin(config: PreTrainedConfig) -> PreTrainedModel:
    """The model's own class with every layer in place and the size of one attention head; random weights.

    What the rotation depends on, the head dimension and all rotary settings, is kept.
    """
    for name, value in config.to_dict().items():
        if name.endswith("intermediate_size") and isinstance(value, int):
            setattr(config, name, min(value, 16))
        elif name.endswith("_token_id"):
            setattr(config, name, None)  # it would lie outside the small vocabulary
    config.hidden_size //= config.num_attention_heads
    config.num_attention_heads = 1
    if getattr(config, "num_key_value_heads", None) is not None:
        config.num_key_value_heads = 1
    config.vocab_size = 8
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    twin: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    for weight in twin.parameters():
        # Vectors as well, norms among them: a norm after the rotation commutes with it only while all its weights are
        # equal, as they are in a fresh model and never in a trained one.
        if weight.ndim == 1:
            weight.uniform_(0.5, 1.5, generator=generator)
        else:
            weight.normal_(std=weight.shape[-1] ** -0.5, generator=generator)
    twin.eval()
    return twin


def _cached_at(twin: PreTrainedModel, positions: list[int]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Keys and values, `[positions, heads, 1, head_dim]` by layer, that one token leaves in the cache at `positions`.

    Each position is a sequence of its own with nothing before it, so that position alone tells the rows apart.
    """
    cache = DynamicCache(config=twin.config)
    twin(
        input_ids=torch.ones(len(positions), 1, dtype=torch.long),
        position_ids=torch.tensor(positions)[:, None],
        past_key_values=cache,
        use_cache=True,
    )
    layers: dict[int, Any] = {i: layer for i, layer in enumerate(cache.layers) if isinstance(layer, DynamicLayer)}
    cached = {i: layer for i, layer in layers.items() if layer.keys is not None}
    return {i: layer.keys for i, layer in cached.items()}, {i: layer.values for i, layer in cached.items()}


def _logits_at(twin: PreTrainedModel, position: int) -> Tensor:
    """Logits `[1, 6, vocab]` of tokens that all stand at `position`, after a cache that has seen and lost as many."""
    tokens = torch.arange(1, 7)[None]
    cache = _LostCache(twin.config, position)
    output = twin(
        input_ids=tokens, position_ids=torch.full_like(tokens, position), past_key_values=cache, use_cache=True
    )
    logits: Tensor = output.logits
    return logits


class _LostCache(DynamicCache):
    """An empty cache that counts `seen` tokens as seen: what a sink cache is to a model, in the extreme."""

    def __init__(self, config: PreTrainedConfig, seen: int) -> None:
        super().__init__(config=config)
        self.seen = seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen + super().get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        kv_length, kv_offset = super().get_mask_sizes(query_length, layer_idx)
        return kv_length, self.seen + kv_offset
