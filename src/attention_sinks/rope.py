"""Which rotation a model's cached keys carry, and turning keys by a shift. Knows no sink cache.

The rotation is not looked up in a table of model types, it is measured: a small random twin of the model, built by the
model's own code from the same config, sees one token at several positions, and its cached keys show how they turn. Only
a rotation that explains every key is accepted, and only a model that then behaves at any position, after any eviction,
as it did at the start; whatever is not understood is refused.
"""

import contextlib
import copy
import importlib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer

from .compat import with_cache


class Rotation:
    """A rotary position embedding with fixed frequencies: how some dimensions of a key turn with its position.

    Pair `i` of the rotating dimensions is a complex number that turns by `inv_freq[i]` radians per position
    (RoFormer, arXiv 2104.09864). The scale that YaRN puts on cos and sin is a property of the key and no part of this.

    Args:
        inv_freq: radians per position, shape `[rotary_dim / 2]`.
        start: index of the first rotating dimension; the rotating ones are contiguous.
        interleaved: whether pairs are neighbours (`0, 1`) as in GPT-J, or lie half the block apart
            (`0, rotary_dim / 2`) as in Llama.
        in_values: whether the rotating dimensions are cached as values, as those of multi-head latent attention are.
    """

    def __init__(self, inv_freq: Tensor, start: int = 0, interleaved: bool = False, in_values: bool = False) -> None:
        # float64 holds the model's own float32 frequencies exactly, and their angles at any position.
        self.inv_freq = inv_freq.double()
        self.start = start
        self.interleaved = interleaved
        self.in_values = in_values

    @property
    def rotary_dim(self) -> int:
        return 2 * self.inv_freq.numel()

    def __repr__(self) -> str:
        pairing = "interleaved" if self.interleaved else "halves"
        where = "values" if self.in_values else "keys"
        return f"Rotation({where}, dims {self.start} to {self.start + self.rotary_dim - 1}, {pairing})"

    def pairs(self, key_states: Tensor) -> Tensor:
        """The rotating dimensions of keys `[..., head_dim]`, as a view of shape `[..., rotary_dim / 2, 2]`."""
        rotating = key_states.narrow(-1, self.start, self.rotary_dim)
        num_pairs = self.inv_freq.numel()
        if self.interleaved:
            return rotating.view(*rotating.shape[:-1], num_pairs, 2)
        return rotating.view(*rotating.shape[:-1], 2, num_pairs).transpose(-1, -2)

    def phase(self, shift: int | Tensor, dtype: torch.dtype) -> Tensor:
        """Cosine and sine of the angles by which pairs turn in `shift` positions, shape `[2, rotary_dim / 2]`.

        Shifts `[..., 1]` give `[2, ..., rotary_dim / 2]`. The angles are float64, computed where `inv_freq` lies.
        """
        angles = self.inv_freq * shift
        return torch.stack([angles.cos(), angles.sin()]).to(dtype)

    def to(self, device: torch.device) -> "Rotation":
        """The same rotation with its frequencies on `device`."""
        return Rotation(self.inv_freq.to(device), self.start, self.interleaved, self.in_values)

    def turned(self, key_states: Tensor, shift: int) -> Tensor:
        """Keys `[..., head_dim]` moved forward by `shift` positions, as a new tensor."""
        return self.turned_by(self.phase(shift, torch.promote_types(key_states.dtype, torch.float32)), key_states)

    def turned_by(self, phase: Tensor, key_states: Tensor) -> Tensor:
        """Keys `[..., head_dim]` turned by what `phase` gave; half precision is rounded once, at the end."""
        states = key_states.to(phase.dtype)
        cos, sin = phase
        x, y = self.pairs(states).unbind(-1)
        turned = states.clone()
        turned_x, turned_y = self.pairs(turned).unbind(-1)
        turned_x.mul_(cos).addcmul_(y, sin, value=-1)
        turned_y.mul_(cos).addcmul_(x, sin)
        return turned.to(key_states.dtype)


# Models compute positions in float32, which tells neighbours apart up to here.
LAST_POSITION = 2**24


@dataclass(frozen=True)
class Positions:
    """How a model tells positions apart.

    Args:
        rotations: by layer, the rotation of its cached states; None if they carry no position.
        indexers: the same of the keys that the indexer of a layer caches (DeepSeek sparse attention).
        in_order: whether attention counts distances by the order of the cached tokens (ALiBi).
        limit: how many positions there are before the model ends or changes its behaviour.
        masked: whether the model runs with a mask over all tokens seen, as padded batches need it.
        rebasable: whether lower `position_ids` bring the behaviour back, however many tokens were seen.
    """

    rotations: dict[int, Rotation | None]
    indexers: dict[int, Rotation | None] = field(default_factory=dict)
    in_order: bool = False
    limit: int = LAST_POSITION
    masked: bool = True
    rebasable: bool = True


def derive_positions(config: PreTrainedConfig, layers: Iterable[int]) -> Positions:
    """How the model that `config` describes tells positions apart, as far as its `layers` are concerned.

    Layers that no text reaches, those with cross-attention to images for instance, are left out.

    Raises:
        NotImplementedError: naming the model type and the reason, if the cached states of a layer do not turn by a
            rotation of fixed frequencies, or if attention depends on more than the distances of the cached tokens.
    """
    names = {*config.to_dict(), *config.attribute_map}
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and "num_attention_heads" not in names:
        raise NotImplementedError(
            f"SinkCache does not support the model type {config.model_type!r}: it has no attention heads."
        )
    measured = _measure(_Key(type(config), str(config.to_dict()), config))
    if isinstance(measured, str):
        raise NotImplementedError(f"SinkCache does not support the model type {config.model_type!r}: {measured}")
    rotations: dict[int, Rotation | None] = {}
    indexers: dict[int, Rotation | None] = {}
    for layer in measured.rotations.keys() & layers:
        for known, found in ((rotations, measured.rotations), (indexers, measured.indexers)):
            rotation = found.get(layer)
            if isinstance(rotation, str):
                raise NotImplementedError(
                    f"SinkCache does not support the model type {config.model_type!r}: in layer {layer} {rotation}"
                )
            if layer in found:
                known[layer] = rotation
    return Positions(rotations, indexers, measured.in_order, measured.limit, measured.masked, measured.rebasable)


_BY_HAND = (
    "If its keys do turn with their position by a rotary embedding of fixed frequencies, say how: "
    "SinkCache(config, rotation=Rotation(inv_freq, start=0, interleaved=False))."
)
_ABSOLUTE = (
    "its cached states depend on absolute positions, added to the tokens before they are cached, and cannot be moved."
)
_LENGTH = "its attention depends on absolute positions or on the number of tokens seen, not on distances alone."
_WHOLE_STREAM = "it needs a key for every token seen: with a cache that holds fewer it fails ({error})."

# Errors of rounding stay below 1e-4 of the twin's float32 states at these positions; other frequencies or another
# pairing give errors near 1.
_TOLERANCE = 1e-3
_NEAR = 1024
# Logits of tokens in other slots differ by 4e-5 at most, with the gentlest slope of ALiBi by 1e-4 at least. At another
# position they differ by 1e-4 at most, and with a query scaled by its position by 1e-1.
_ORDER_TOLERANCE = 5e-5
_MOVED_TOLERANCE = 5e-4
# Some models (Gemma 3n) make a hundredth of a rounding in their first layer, on some processors. A twin is told from
# itself by so many times what one rounding does to it, but never by as much as a scaled query would show.
_NOISE_MARGIN = 8
_LARGEST_TOLERANCE = 3e-2
_LARGEST_TWIN = 300_000_000


@dataclass(frozen=True)
class _Key:
    config_class: type[PreTrainedConfig]
    settings: str
    config: PreTrainedConfig = field(compare=False)


@dataclass(frozen=True)
class _Measured:
    rotations: dict[int, Rotation | str | None]
    indexers: dict[int, Rotation | str | None]
    in_order: bool
    limit: int
    masked: bool
    rebasable: bool


@lru_cache(maxsize=32)
def _measure(key: _Key) -> _Measured | str:
    """What a twin shows. A str says why the whole model is refused, in `rotations` why a layer is."""
    # Nothing of the caller's is used or changed: random state, default device, autocast, gradient and inference mode.
    on_cpu = torch.get_default_device().type == "cpu"  # the context costs time on every call of torch
    with (
        contextlib.nullcontext() if on_cpu else torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        failures: list[str] = []
        for shrink in (_to_one_head, _to_four_heads, _to_one_group, _to_one_head_each):
            outcomes: list[_Measured | str] = []
            # Far positions tell frequencies apart best, but a model may not have them.
            for longest in sorted({_NEAR, _shortest_length(key.config)}, reverse=True):
                try:
                    config = copy.deepcopy(key.config)
                    _shrink(config)
                    measured = _measure_twin(_build_twin(shrink(config)), longest)
                except Exception as error:  # whatever the code of a model raises on sizes it was not made for
                    failures.append(_one_line(error))
                    continue
                if isinstance(measured, _Measured) and not any(isinstance(r, str) for r in measured.rotations.values()):
                    return measured
                outcomes.append(measured)
            if outcomes:
                return outcomes[-1]
        return f"its positions could not be measured on a small twin ({failures[0]}). {_BY_HAND}"


def _one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:200]


def _measure_twin(twin: PreTrainedModel, longest: int, masked: bool = True) -> _Measured | str:
    near = sorted({0, min(1, longest - 1), longest // 2, longest - 1})
    # Read now: a model whose frequencies depend on the length replaces them on the way.
    frequencies: list[Tensor] = []
    for inv_freq in _frequencies(twin):
        if not any(torch.equal(inv_freq, other) for other in frequencies):
            frequencies.append(inv_freq)
    start, rows = _logits_at(twin, 0, masked), _cached_at(twin, near)
    again = _cached_at(twin, near)
    if not all(_same(*both) for i in rows for both in zip(again[i], rows[i], strict=True) if both[0].numel() > 0):
        return "it keeps a state in the model itself, where no cache can hold or bound it."

    def later(position: int) -> tuple[Tensor, dict[int, list[Tensor]]]:
        """What the model does at `position`, with nothing before it in the cache."""
        # A copy, but for its weights: frequencies that depend on the length are changed in place.
        copied = copy.deepcopy(twin, {id(weight): weight for weight in twin.parameters()})
        rows_later = _cached_at(copied, [*near, position])
        return _logits_at(copied, position, masked), rows_later

    moved = min(max(_MOVED_TOLERANCE, _NOISE_MARGIN * _noise(twin, start, masked)), _LARGEST_TOLERANCE)

    def unchanged(logits: Tensor, rows_later: dict[int, list[Tensor]], tolerance: float = moved) -> bool:
        """Whether that is what it does at the start."""
        return _same(logits, start, tolerance) and all(
            _same(later[:-1], states)
            for i in rows
            for later, states in zip(rows_later[i], rows[i], strict=True)
            if states.numel() > 0
        )

    def unchanged_at(position: int, tolerance: float = moved) -> bool:
        try:
            return unchanged(*later(position), tolerance)
        except Exception:  # the end of a table of positions, by whatever name
            return False

    try:
        at_once = later(1)
    except Exception as error:
        # `generate` gives no mask to a batch without padding.
        return _measure_twin(twin, longest, masked=False) if masked else _WHOLE_STREAM.format(error=_one_line(error))

    # One by one, as `generate` comes to a position: a model may read it from the cache and not from `position_ids`.
    each = [_cached_at(twin, [position], lost=position) for position in near]
    cached = {i: [torch.cat(states) for states in zip(*(one[i] for one in each), strict=True)] for i in each[0]}
    if not cached:
        return "no keys reach the cache."
    head_dims = {states.shape[-1] for layer in cached.values() for states in layer}
    # Made once, so that layers with the same rotation share one object.
    of_keys, of_values = (_candidates(frequencies, head_dims, in_values) for in_values in (False, True))
    rotations: dict[int, Rotation | str | None] = {}
    indexers: dict[int, Rotation | str | None] = {}
    for layer, (keys, values, *indexed) in cached.items():
        if _constant(values):
            rotations[layer] = None if _constant(keys) else _explain(keys, near, of_keys)
        elif _constant(keys):
            rotations[layer] = _explain(values, near, of_values)
        else:
            return _ABSOLUTE
        for keys in indexed:
            indexers[layer] = None if _constant(keys) else _explain(keys, near, of_keys)
    if not unchanged(*at_once):
        return _LENGTH
    limit = LAST_POSITION
    if not unchanged_at(LAST_POSITION - 1):
        limit = _first_change(unchanged_at)
        # A change must be a jump, or a slope that begins late; one that shows halfway was there from the start.
        if not unchanged_at(limit - 1, moved / 2):
            if not unchanged_at(limit // 2, moved / 5):
                return _LENGTH
            # It shows a little after it begins: that of Inkling 2, a logarithm from 128,000 on, at 135,000.
            limit = limit * 9 // 10
    in_order = not _same(_logits_at(twin, 0, masked, reverse=True), start, _ORDER_TOLERANCE)
    # An indexer that keeps positions pools the keys of neighbours.
    in_order |= any(getattr(layer, "indexer_position_ids", None) is not None for layer in _run_at(twin, [0]).layers)
    rebasable = True
    try:
        rebasable = _same(_logits_at(twin, 0, masked, lost=LAST_POSITION), start, moved)
    except Exception:  # a table that is read at the number of tokens seen
        rebasable = False
    return _Measured(rotations, indexers, in_order, limit, masked, rebasable)


def _noise(twin: PreTrainedModel, start: Tensor, masked: bool) -> float:
    """By how much the logits change, on their scale, if every embedding is rounded otherwise."""
    embeddings: Any = twin.get_input_embeddings().weight
    before = embeddings.clone()
    signs = torch.arange(embeddings.numel()).view_as(embeddings) % 2 * 2 - 1
    embeddings.mul_(1 + signs * torch.finfo(embeddings.dtype).eps)
    try:
        return float((_logits_at(twin, 0, masked) - start).norm() / start.norm())
    finally:
        embeddings.copy_(before)


def _first_change(unchanged_at: Callable[[int], bool]) -> int:
    """The first position of a changed behaviour, by bisection: unchanged at 1, changed at the last."""
    unchanged, changed = 1, LAST_POSITION - 1
    while changed - unchanged > 1:
        middle = (unchanged + changed) // 2
        if unchanged_at(middle):
            unchanged = middle
        else:
            changed = middle
    return changed


def _explain(states: Tensor, positions: list[int], candidates: list[Rotation]) -> Rotation | str:
    """The rotation that turns `states[0]`, at position 0, into every `states[i]`, which stand at `positions`."""

    def error(rotation: Rotation) -> float:
        turned = torch.stack([rotation.turned(states[0], position) for position in positions])
        return float((turned - states).norm() / states.norm())

    # The best and not the first: two kinds of layers may have frequencies that differ by little.
    fitting = [rotation for rotation in candidates if rotation.start + rotation.rotary_dim <= states.shape[-1]]
    best = min(fitting, key=error, default=None)
    if best is not None and error(best) < _TOLERANCE:
        return best
    return f"the cached states do not turn by a rotary embedding of fixed frequencies alone. {_BY_HAND}"


def _candidates(frequencies: list[Tensor], head_dims: set[int], in_values: bool) -> list[Rotation]:
    """Every rotation that states of `head_dims` dimensions could have: whole or partial, at the head or at the tail."""
    return [
        Rotation(signed, start, interleaved, in_values)
        for inv_freq in frequencies
        for signed in (inv_freq, -inv_freq)
        for start in sorted({0} | {head_dim - 2 * inv_freq.numel() for head_dim in head_dims})
        for interleaved in (False, True)
        if start >= 0
    ]


def _frequencies(twin: PreTrainedModel) -> Iterator[Tensor]:
    """What may be frequencies of a rotation: every vector among the buffers, and every table of sines and cosines."""
    for buffer in (*twin.buffers(), *(weight for weight in twin.parameters() if not weight.requires_grad)):
        if buffer.is_floating_point() and buffer.ndim == 1:
            yield buffer.clone()
        elif buffer.is_floating_point() and buffer.ndim == 2 and buffer.shape[0] > 1 and buffer.shape[1] % 2 == 0:
            sin, cos = buffer.double().chunk(2, dim=1)
            angles = torch.atan2(sin, cos)
            # Each row at twice the position gives one more digit, once its full turns are known from the last one.
            inv_freq, position = angles[1], 1
            while 2 * position < len(angles):
                position *= 2
                turns = ((inv_freq * position - angles[position]) / math.tau).round()
                inv_freq = (angles[position] + math.tau * turns) / position
            yield inv_freq


def _shortest_length(config: PreTrainedConfig) -> int:
    """The shortest length that the config names, at most `_NEAR`."""
    lengths = re.findall(r"'\w*(?:max_position|n_positions|max_seq|n_ctx)\w*': (\d+)", str(config.to_dict()))
    return min([_NEAR, *(int(length) for length in lengths if int(length) > 1)])


def _constant(states: Tensor) -> bool:
    return states.numel() == 0 or _same(states, states[:1].expand_as(states))


def _same(a: Tensor, b: Tensor, tolerance: float = _TOLERANCE) -> bool:
    # Not `allclose`: NaN and infinity must count as different, and zero states would hide any rotation.
    return bool((a - b).norm() < tolerance * b.norm())


def _shrink(config: PreTrainedConfig) -> None:
    """Make everything small that positions cannot depend on."""
    for name, value in config.to_dict().items():
        if name.endswith("_token_id") and value is not None:
            setattr(config, name, [0] if isinstance(value, list) else 0)
        elif "vocab_size" in name and isinstance(value, int):
            setattr(config, name, 8)
        elif name == "n_inner" or (re.search(r"(intermediate|ffn|ffn_hidden|expert)_(size|dim)$", name) and value):
            setattr(config, name, [32] * len(value) if isinstance(value, list) else 32)
        elif isinstance(value, int) and not isinstance(value, bool):
            if re.search(r"hidden_size_per_layer_input$|^laurel_rank$", name):
                setattr(config, name, min(value, 32))
            elif re.search(r"num_(local_|routed_)?experts$|^n_routed_experts$|^moe_num_experts$", name):
                setattr(config, name, min(value, 4))
            elif re.search(r"^linear_num_.*heads$", name):
                setattr(config, name, 1)
            elif re.search(r"experts?_per_tok(en)?$|^(moe_)?(top_?)?k(_experts)?$", name):
                setattr(config, name, min(value, 2))
            elif re.search(r"^(mamba_)?chunk_size$", name):
                setattr(config, name, min(value, 8))
            elif re.search(r"^(n|num|num_expert|topk)_groups?$", name):
                setattr(config, name, 1)
        elif isinstance(value, dict) and isinstance(tower := getattr(config, name), PreTrainedConfig):
            # For images or sound, which the twin gets none of.
            for depth in ("num_hidden_layers", "num_blocks", "depth"):
                if isinstance(getattr(tower, depth, None), int):
                    setattr(tower, depth, 1)
    if hasattr(config, "quantization_config"):
        del config.quantization_config


def _to_heads(config: PreTrainedConfig, num_heads: int) -> PreTrainedConfig:
    head_dim = getattr(config, "head_dim", None)
    derived = config.hidden_size // config.num_attention_heads
    # A head dimension of its own is kept by itself. Other widths may be tied to the hidden size.
    hidden_size, before = num_heads * (derived if head_dim in (None, derived) else 64), config.hidden_size
    for name, value in config.to_dict().items():
        if (name.endswith(("width", "hidden_size")) and value and value % before == 0) or name == "mamba_headdim":
            setattr(config, name, hidden_size * value // before)
    config.hidden_size = hidden_size  # by whatever name
    config.num_attention_heads = num_heads
    for name in ("num_key_value_heads", "num_kv_heads"):
        if getattr(config, name, None) is not None:
            setattr(config, name, num_heads)
    return config


def _to_one_head(config: PreTrainedConfig) -> PreTrainedConfig:
    return _to_heads(config, 1)


def _to_four_heads(config: PreTrainedConfig) -> PreTrainedConfig:
    return _to_heads(config, 4)


def _to_one_head_each(config: PreTrainedConfig) -> PreTrainedConfig:
    """For configs whose layers differ in their numbers of heads; these can only be made anew."""
    settings = config.to_dict()
    for values in (settings, *settings["per_layer_config"].values()):
        values.update(dict.fromkeys(values.keys() & {"num_attention_heads", "num_key_value_heads"}, 1))
    return type(config)(**{**settings, "hidden_size": 64})


def _to_one_group(config: PreTrainedConfig) -> PreTrainedConfig:
    """Divide the width and every number of heads by the same, for models that tie other sizes to these."""
    heads = {
        name: value
        for name, value in config.to_dict().items()
        if re.search(r"(^|_)(num|n)_.*heads$|_n_heads$", name) and isinstance(value, int) and value > 0
    }
    divisor = math.gcd(config.hidden_size, config.num_attention_heads, *heads.values())
    for name, value in heads.items():
        setattr(config, name, value // divisor)
    config.num_attention_heads = heads.get("num_attention_heads", config.num_attention_heads) // divisor
    config.hidden_size //= divisor
    return config


def _build_twin(config: PreTrainedConfig) -> PreTrainedModel:
    """The model's own class for `config`, with random weights."""

    model_class = _model_class(config)

    def build() -> PreTrainedModel:
        model: PreTrainedModel = model_class._from_config(config, dtype=torch.float32, attn_implementation="eager")
        return model

    with torch.device("meta"):
        size = sum(weight.numel() for weight in build().parameters())
    if size > _LARGEST_TWIN:
        raise ValueError(f"the twin would have {size / 1e6:,.0f} million weights")
    with _OwnRandomness():
        twin = build()
        for weight in twin.parameters():
            if not weight.requires_grad:  # a table of fixed sines and cosines
                continue
            # Vectors as well, norms among them: a norm after the rotation commutes with it only while all its weights
            # are equal, as they are in a fresh model and never in a trained one.
            if weight.ndim == 1:
                weight.uniform_(0.5, 1.5)
            else:
                weight.normal_(std=weight.shape[-1] ** -0.5)
    twin.eval()
    return twin


def _model_class(config: PreTrainedConfig) -> Any:
    """The causal language model of a config: the registered one, or that of the module beside the config's own."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    module = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    for value in vars(module).values():
        generates = isinstance(value, type) and issubclass(value, GenerationMixin)
        if generates and getattr(value, "config_class", None) is type(config):
            return value
    raise TypeError(f"no model that generates is known for {type(config).__name__}")


class _OwnRandomness(TorchFunctionMode):
    """Draws all random numbers from a generator of its own, so that neither the caller nor other threads notice."""

    # By name: transformers puts functions of its own in the place of those of `torch.nn.init`.
    _DRAWS = frozenset({
        "bernoulli", "bernoulli_", "exponential_", "kaiming_normal_", "kaiming_uniform_", "multinomial", "normal",
        "normal_", "orthogonal_", "rand", "randint", "randn", "random_", "randperm", "trunc_normal_", "uniform_",
        "xavier_normal_", "xavier_uniform_",
    })  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator(device="cpu").manual_seed(0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self._DRAWS and kwargs.get("generator") is None:
            kwargs = {**kwargs, "generator": self.generator}
        return func(*args, **kwargs)


def _run_at(twin: PreTrainedModel, positions: list[int], lost: int = 0) -> DynamicCache:
    """A cache, one that had seen and lost `lost` tokens, in which the twin left one token at each of `positions`.

    Each position is a sequence of its own with nothing before it, so that position alone tells the rows apart.
    """
    cache = _LostCache(twin.config, lost)
    twin(
        input_ids=torch.ones(len(positions), 1, dtype=torch.long),
        position_ids=torch.tensor(positions)[:, None],
        use_cache=True,
        **with_cache(twin.forward, cache),
    )
    return cache


def _cached_at(twin: PreTrainedModel, positions: list[int], lost: int = 0) -> dict[int, list[Tensor]]:
    """By layer, the states `[positions, heads, 1, head_dim]` that `_run_at` leaves: keys, values, an indexer's keys."""
    return {
        i: [layer.keys, layer.values, *([layer.indexer_keys[:, None]] if _has_indexer(layer) else [])]
        for i, layer in _attention_layers(_run_at(twin, positions, lost)).items()
    }


def _attention_layers(cache: DynamicCache) -> dict[int, Any]:
    layers: dict[int, Any] = {i: layer for i, layer in enumerate(cache.layers) if isinstance(layer, DynamicLayer)}
    return {i: layer for i, layer in layers.items() if layer.keys is not None}


def _has_indexer(layer: Any) -> bool:
    return getattr(layer, "indexer_keys", None) is not None


def _logits_at(
    twin: PreTrainedModel, position: int, masked: bool = True, reverse: bool = False, lost: int | None = None
) -> Tensor:
    """Logits of the last of six tokens that all stand at `position`, with a cache that has seen and lost as many.

    Or it has `lost` another number of them. With `reverse`, the cached tokens change places before the last one is
    read: no key moves, only its slot.
    """
    cache = _LostCache(twin.config, position if lost is None else lost)
    for tokens in torch.arange(1, 7)[None].split(5, dim=1):
        seen = cache.get_seq_length() + tokens.shape[1]
        output = twin(
            input_ids=tokens,
            # As `generate` gives it, over all that was ever seen; a model that reads it shows so early.
            attention_mask=tokens.new_ones(1, seen) if masked and seen < _NEAR else None,
            position_ids=torch.full_like(tokens, position),
            use_cache=True,
            **with_cache(twin.forward, cache),
        )
        if reverse:
            for layer in _attention_layers(cache).values():
                layer.keys, layer.values = layer.keys.flip(2), layer.values.flip(2)
                if _has_indexer(layer):
                    layer.indexer_keys = layer.indexer_keys.flip(1)
    logits: Tensor = output.logits[:, -1]
    return logits


class _LostCache(DynamicCache):
    """A cache that has seen `lost` tokens more than it holds: what a sink cache is to a model, in the extreme."""

    def __init__(self, config: PreTrainedConfig, lost: int) -> None:
        super().__init__(config=config)
        self.lost = lost

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.lost + super().get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        kv_length, kv_offset = super().get_mask_sizes(query_length, layer_idx)
        return kv_length, self.lost + kv_offset
