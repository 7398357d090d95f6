"""How a model tells positions apart, measured on a twin.

No table of model types is looked up. A twin reads one token at several positions, and its cached keys show how they
rotate. A model is accepted only if one rotation explains every key, and if it then behaves at any position and after
any eviction as it does at the start. Every other model is refused, with the reason.
"""

import contextlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from ..compat import cache_name
from ..openmp import on_one_cpu
from ..rope import Rotation
from .twin import PROBE_LENGTH, RESIZES, LostCache, Twin, build_twin, find_model_class, isolated, names_cache

# Models compute positions in float32, which tells neighbours apart up to here.
LAST_POSITION = 2**24

# Cached states, relative to their norm. Rounding errors stay below 1e-4 at these positions.
# Other frequencies or another pairing give errors near 1.
STATES_TOLERANCE = 1e-3
# Logits, relative to their norm, when cached tokens swap slots: rounding errors stay below 4e-5, and the gentlest slope
# of ALiBi gives 1e-4.
ORDER_TOLERANCE = 5e-5
# Logits at another position: rounding errors stay below 1e-4, and a query scaled by its position gives 1e-1.
LOGITS_TOLERANCE = 5e-4
# Some models (Gemma 3n) amplify a rounding error to a hundredth of the logits. The tolerance of a twin is this multiple
# of the change that one rounding of its embeddings causes, up to a bound that a scaled query still exceeds.
NOISE_MARGIN = 8
MAX_LOGITS_TOLERANCE = 3e-2

REASON_HOW_TO_STATE = (
    "If its keys do rotate by a rotary embedding with fixed frequencies, describe it: "
    "SinkCache(config, rotation=Rotation(inv_freq, start=0, interleaved=False))."
)
REASON_ABSOLUTE = (
    "its cached keys and values depend on absolute positions, as with learned position embeddings, so they cannot be "
    "re-positioned."
)
REASON_FREQUENCIES = (
    f"the cached states do not rotate by a rotary embedding with fixed frequencies alone. {REASON_HOW_TO_STATE}"
)
REASON_LENGTH = "its attention depends on absolute positions or on the number of tokens seen, not only on distances."
REASON_NO_CACHE = "it takes no KV cache."
REASON_NO_HEADS = "its config names no attention heads."
REASON_OWN_CACHE = "it accepts only a cache class of its own."
REASON_OWN_STATE = "it keeps a state in the model itself, where no cache can store or bound it."
REASON_POOLS = "its indexer pools the keys of neighbours, and tokens become others' neighbours when one is evicted."
REASON_WHOLE_STREAM = "it needs a key for every token seen, and fails with a cache that holds fewer."
REASON_UNMEASURED = f"its positions could not be measured on a small random twin ({{error}}). {REASON_HOW_TO_STATE}"


@dataclass(frozen=True)
class Positions:
    """How a model tells positions apart.

    Args:
        rotations: by layer, the rotation of its cached states, or None if they carry no position.
        indexers: by layer, the rotation of the keys that its indexer caches (DeepSeek sparse attention).
        needs_temporal_order: True if attention counts distances by the order of the cached tokens (ALiBi).
        limit: the number of positions before the model ends or changes its behaviour.
        masked: True if the model runs with a mask over all tokens seen, as padded batches need it.
        rebasable: True if lower `position_ids` bring the behaviour back, whatever number of tokens was seen.
        first_rotating_layer: the first layer of any kind whose cached states rotate.
    """

    rotations: dict[int, Rotation | None]
    indexers: dict[int, Rotation | None] = field(default_factory=dict)
    needs_temporal_order: bool = False
    limit: int = LAST_POSITION
    masked: bool = True
    rebasable: bool = True
    first_rotating_layer: int | None = None


def derive_positions(config: PreTrainedConfig, layers: Iterable[int]) -> Positions:
    """Return how the model that `config` describes tells positions apart in its `layers`.

    The result leaves out layers that no text reaches, such as cross-attention to images. Layers with the same rotation
    share one object.

    Raises:
        NotImplementedError: if the cached states of a layer do not rotate with fixed frequencies, or if attention
            depends on more than the distances between cached tokens. The error names the model type and the reason.
        RuntimeError: if the installed version of transformers takes no cache by a known name.
    """
    cache_name()
    measured = _measure(_ConfigKey(type(config), str(config.to_dict()), config))
    if isinstance(measured, Refusal):
        raise _refused(config, measured.reason)
    reached = sorted(measured.rotations.keys() & set(layers))
    return Positions(
        rotations=_accepted(config, measured.rotations, reached),
        indexers=_accepted(config, measured.indexers, reached),
        needs_temporal_order=measured.needs_temporal_order,
        limit=measured.limit,
        masked=measured.masked,
        rebasable=measured.rebasable,
        first_rotating_layer=min((i for i, x in measured.rotations.items() if isinstance(x, Rotation)), default=None),
    )


@dataclass(frozen=True)
class Refusal:
    """Why a model, or a layer of it, is not supported."""

    reason: str


_ByLayer = dict[int, Rotation | Refusal | None]


@dataclass(frozen=True)
class _Measured:
    """`Positions` of all layers, with the reason where a layer is not supported."""

    rotations: _ByLayer
    indexers: _ByLayer
    needs_temporal_order: bool
    limit: int
    masked: bool
    rebasable: bool


def _accepted(config: PreTrainedConfig, rotations: _ByLayer, layers: list[int]) -> dict[int, Rotation | None]:
    accepted: dict[int, Rotation | None] = {}
    for i in layers:
        rotation = rotations.get(i)
        if isinstance(rotation, Refusal):
            raise _refused(config, f"in layer {i} {rotation.reason}")
        if i in rotations:
            accepted[i] = rotation
    return accepted


def _refused(config: PreTrainedConfig, reason: str) -> NotImplementedError:
    return NotImplementedError(f"SinkCache does not support the model type {config.model_type!r}: {reason}")


@dataclass(frozen=True)
class _ConfigKey:
    """A config as a key: equal if its settings are equal."""

    config_class: type[PreTrainedConfig]
    settings: str
    config: PreTrainedConfig = field(compare=False)


@lru_cache(maxsize=32)
def _measure(key: _ConfigKey) -> _Measured | Refusal:
    """Return what a twin shows: the first one whose layers are all explained, or else the first one that runs."""
    config = key.config
    names = {*config.to_dict(), *config.attribute_map}
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and "num_attention_heads" not in names:
        return Refusal(REASON_NO_HEADS if names_cache(find_model_class(config)) else REASON_NO_CACHE)
    if getattr(config, "index_kpool", None):
        return Refusal(REASON_POOLS)
    return on_one_cpu(lambda: _measure_twins(config))


def _measure_twins(config: PreTrainedConfig) -> _Measured | Refusal:
    failures: list[str] = []
    with isolated():
        for resize in RESIZES:
            outcomes: list[_Measured | Refusal] = []
            # Far positions tell frequencies apart best, but a model may not have them.
            for length in sorted({PROBE_LENGTH, min([PROBE_LENGTH, *_lengths(config)])}, reverse=True):
                try:
                    measured = _measure_smallest(config, resize, length)
                except Exception as error:  # the code of a model may raise anything on sizes that it does not support
                    failures.append(re.sub(r"\s+", " ", f"{type(error).__name__}: {error}"))
                    continue
                if isinstance(measured, _Measured) and _explains_all_layers(measured):
                    return measured
                outcomes.append(measured)
            if outcomes:
                return outcomes[-1]
    return _explain_failure(config, failures[0])


def _measure_smallest(config: PreTrainedConfig, resize: Any, length: int) -> _Measured | Refusal:
    """Measure a twin with one layer of each kind, or one with all layers if that leaves a doubt."""
    twin = build_twin(config, resize)
    if twin.left_out.layers:
        with contextlib.suppress(Exception):  # the code of a model may not run without some of its layers
            twin.copied().compare_layers([0, length // 2, length - 1])
            measured = _measure_twin(twin, length)
            if _is_plain(measured) and not twin.left_out.differ:
                return measured
        twin = build_twin(config, resize, every_layer=True)
    return _measure_twin(twin, length)


def _is_plain(measured: _Measured | Refusal) -> bool:
    """Return True if nothing was found that is judged by its size, which more layers would show better."""
    return isinstance(measured, _Measured) and _explains_all_layers(measured) and not measured.needs_temporal_order


def _lengths(config: PreTrainedConfig) -> list[int]:
    """Return the lengths that a config names."""
    lengths = re.findall(r"'\w*(?:max_position|n_positions|max_seq|n_ctx)\w*': (\d+)", str(config.to_dict()))
    return [int(length) for length in lengths if int(length) > 1]


def _explains_all_layers(measured: _Measured) -> bool:
    return not any(isinstance(rotation, Refusal) for rotation in measured.rotations.values())


def _explain_failure(config: PreTrainedConfig, error: str) -> Refusal:
    """Return why no twin could be measured, where `error` is what the first twin raised."""
    with contextlib.suppress(ImportError, TypeError):
        if not names_cache(find_model_class(config)):
            return Refusal(REASON_NO_CACHE)
    if f"{LostCache.__name__}'" in error:  # "'LostCache' object has no attribute", or the like
        return Refusal(REASON_OWN_CACHE)
    return Refusal(REASON_UNMEASURED.format(error=error[:200]))


def _measure_twin(twin: Twin, length: int) -> _Measured | Refusal:
    """Measure a twin at positions below `length` and, if it is supported there, beyond."""
    positions = sorted({0, min(1, length - 1), length // 2, length - 1})
    # Read first: a forward pass may replace frequencies that depend on the length.
    frequencies = _frequencies(twin.model)
    start = _Behavior(twin.logits_at(0), twin.states_at(positions))
    if not _same_states(twin.states_at(positions), start.states):
        return Refusal(REASON_OWN_STATE)
    probe = _Probe(twin, positions, start)
    try:
        second = probe.behavior_at(1)
    except Exception:
        # `generate` gives no mask to a batch without padding.
        return _measure_twin(twin.unmasked(), length) if twin.masked else Refusal(REASON_WHOLE_STREAM)
    fitted = _fit_layers(twin, positions, frequencies)
    if isinstance(fitted, Refusal):
        return fitted
    rotations, indexers = fitted
    limit = probe.find_limit() if probe.is_unchanged(second) else None
    if limit is None:
        return Refusal(REASON_LENGTH)
    return _Measured(
        rotations=twin.left_out.for_all(rotations),
        indexers=twin.left_out.for_all(indexers),
        needs_temporal_order=_needs_temporal_order(twin, start.logits),
        limit=limit,
        masked=twin.masked,
        rebasable=probe.is_rebasable(),
    )


@dataclass(frozen=True)
class _Behavior:
    """What a twin computes: logits after a few tokens, and by layer the cached states of single tokens."""

    logits: Tensor
    states: dict[int, list[Tensor]]


class _Probe:
    """Compares the behaviour of a twin at a position with its behaviour at the start."""

    def __init__(self, twin: Twin, positions: list[int], start: _Behavior) -> None:
        self.twin = twin
        self.positions = positions
        self.start = start
        noise = NOISE_MARGIN * _rounding_noise(twin, start.logits)
        self.tolerance = min(max(LOGITS_TOLERANCE * twin.strictness, noise), MAX_LOGITS_TOLERANCE)

    def behavior_at(self, position: int) -> _Behavior:
        """Return what the twin does at `position`, after single tokens up to there, with an empty cache."""
        twin = self.twin.copied()  # frequencies that depend on the length are changed in place
        states = twin.states_at([*self.positions, position])
        return _Behavior(twin.logits_at(position), {i: [each[:-1] for each in states[i]] for i in states})

    def is_unchanged(self, behavior: _Behavior, tolerance: float | None = None) -> bool:
        """Return True if `behavior` is that of the start."""
        tolerance = self.tolerance if tolerance is None else tolerance
        return _same(behavior.logits, self.start.logits, tolerance) and _same_states(behavior.states, self.start.states)

    def is_unchanged_at(self, position: int, tolerance: float | None = None) -> bool:
        """Return True if the twin runs at `position` and behaves as at the start."""
        try:
            return self.is_unchanged(self.behavior_at(position), tolerance)
        except Exception:  # the end of a table of positions, by whatever name
            return False

    def find_limit(self) -> int | None:
        """Return the first position of a changed behaviour, or None if the behaviour changes from the start on."""
        if self.is_unchanged_at(LAST_POSITION - 1):
            return LAST_POSITION
        limit = self._first_change()
        # A change must be a jump, or a slope that begins late. A slope that shows halfway begins at the start.
        if self.is_unchanged_at(limit - 1, self.tolerance / 2):
            return limit
        if not self.is_unchanged_at(limit // 2, self.tolerance / 5):
            return None
        # A slope shows a little after it begins: that of Inkling 2, a logarithm from 128,000 on, shows at 135,000.
        return limit * 9 // 10

    def _first_change(self) -> int:
        """Return the first position of a changed behaviour by bisection: unchanged at 1, changed at the last one."""
        unchanged, changed = 1, LAST_POSITION - 1
        # Most often it is a length that the config names.
        guesses = [guess for length in _lengths(self.twin.model.config) for guess in (length - 1, length)]
        while changed - unchanged > 1:
            middle = guesses.pop() if guesses else (unchanged + changed) // 2
            if not unchanged < middle < changed:
                continue
            if self.is_unchanged_at(middle):
                unchanged = middle
            else:
                changed = middle
        return changed

    def is_rebasable(self) -> bool:
        """Return True if low positions bring the behaviour of the start back after `LAST_POSITION` tokens."""
        try:
            return _same(self.twin.logits_at(0, num_lost=LAST_POSITION), self.start.logits, self.tolerance)
        except Exception:  # a table that is read at the number of tokens seen
            return False


def _rounding_noise(twin: Twin, logits: Tensor) -> float:
    """Return the change of `logits`, relative to their norm, if every embedding is rounded to a neighbour."""
    embeddings: Any = twin.model.get_input_embeddings().weight
    before = embeddings.clone()
    signs = torch.arange(embeddings.numel()).view_as(embeddings) % 2 * 2 - 1
    embeddings.mul_(1 + signs * torch.finfo(embeddings.dtype).eps)
    try:
        return float((twin.logits_at(0) - logits).norm() / logits.norm())
    finally:
        embeddings.copy_(before)


def _needs_temporal_order(twin: Twin, logits: Tensor) -> bool:
    if not _same(twin.logits_at(0, reverse=True), logits, ORDER_TOLERANCE * twin.strictness):
        return True
    # An indexer that keeps positions pools the keys of neighbours.
    return any(getattr(layer, "indexer_position_ids", None) is not None for layer in twin.run_at([0]).layers)


def _fit_layers(twin: Twin, positions: list[int], frequencies: list[Tensor]) -> tuple[_ByLayer, _ByLayer] | Refusal:
    """Return by layer the rotation that explains its cached states at `positions`, and that of its indexer keys."""
    # One by one, as `generate` reaches a position: a model may read it from the cache and not from `position_ids`.
    each = [twin.states_at([position], num_lost=position) for position in positions]
    cached = {i: [torch.cat(states) for states in zip(*(one[i] for one in each), strict=True)] for i in each[0]}
    if not cached:
        return Refusal(REASON_NO_CACHE)
    head_dims = {states.shape[-1] for layer in cached.values() for states in layer}
    # Made once, so that layers with the same rotation share one object.
    of_keys, of_values = (_candidates(frequencies, head_dims, in_values) for in_values in (False, True))
    rotations: _ByLayer = {}
    indexers: _ByLayer = {}
    for i, (keys, values, *indexer_keys) in cached.items():
        if _is_constant(values):
            rotations[i] = fit_rotation(keys, positions, of_keys)
        elif _is_constant(keys):
            rotations[i] = fit_rotation(values, positions, of_values)
        else:
            return Refusal(REASON_ABSOLUTE)
        for states in indexer_keys:
            indexers[i] = fit_rotation(states, positions, of_keys)
    return rotations, indexers


def fit_rotation(states: Tensor, positions: list[int], candidates: list[Rotation]) -> Rotation | Refusal | None:
    """Return the candidate that rotates `states[0]`, at position 0, into each `states[i]`, at `positions[i]`.

    Return None if the states carry no position.
    """
    if _is_constant(states):
        return None

    def error(rotation: Rotation) -> float:
        rotated = torch.stack([rotation.rotate(states[0], position) for position in positions])
        return float((rotated - states).norm() / states.norm())

    # The best and not the first: two kinds of layers may have frequencies that differ by little.
    fitting = [rotation for rotation in candidates if rotation.head_dim == states.shape[-1]]
    best = min(fitting, key=error, default=None)
    return best if best is not None and error(best) < STATES_TOLERANCE else Refusal(REASON_FREQUENCIES)


def _candidates(frequencies: list[Tensor], head_dims: set[int], in_values: bool) -> list[Rotation]:
    """Return every rotation that states of `head_dims` dimensions could have: whole, or partial at either end."""
    return [
        Rotation(signed, start, interleaved, in_values, head_dim)
        for inv_freq in frequencies
        for signed in (inv_freq, -inv_freq)
        for head_dim in head_dims
        for start in sorted({0, head_dim - 2 * inv_freq.numel()})
        for interleaved in (False, True)
        if head_dim >= 2 * inv_freq.numel()
    ]


def _frequencies(model: PreTrainedModel) -> list[Tensor]:
    """Return all that may be frequencies of a rotation: vectors among the buffers, and tables of sines and cosines."""
    frequencies: list[Tensor] = []
    for buffer in (*model.buffers(), *(weight for weight in model.parameters() if not weight.requires_grad)):
        if not buffer.is_floating_point():
            continue
        if buffer.ndim == 1:
            inv_freq = buffer.clone()
        elif buffer.ndim == 2 and buffer.shape[0] > 1 and buffer.shape[1] % 2 == 0:
            inv_freq = _frequencies_of_table(buffer)
        else:
            continue
        # ERNIE 4.5 VL keeps them in another order, and brings them in that of their size where they are used.
        for ordered in (inv_freq, inv_freq.sort(descending=True).values):
            if not any(torch.equal(ordered, other) for other in frequencies):
                frequencies.append(ordered)
    return frequencies


def _frequencies_of_table(table: Tensor) -> Tensor:
    """Return the frequencies of a table `[num_positions, rotary_dim]` of sines, then cosines."""
    sin, cos = table.double().chunk(2, dim=1)
    angles = torch.atan2(sin, cos)
    # A row at twice the position gives one more digit, since the row before tells the number of its full circles.
    inv_freq, position = angles[1], 1
    while 2 * position < len(angles):
        position *= 2
        circles = ((inv_freq * position - angles[position]) / math.tau).round()
        inv_freq = (angles[position] + math.tau * circles) / position
    return inv_freq


def _is_constant(states: Tensor) -> bool:
    """Return True if states `[len(positions), ...]` are the same at every position."""
    return states.numel() == 0 or _same(states, states[:1].expand_as(states))


def _same_states(actual: dict[int, list[Tensor]], expected: dict[int, list[Tensor]]) -> bool:
    return all(
        _same(*both) for i in expected for both in zip(actual[i], expected[i], strict=True) if both[1].numel() > 0
    )


def _same(actual: Tensor, expected: Tensor, tolerance: float = STATES_TOLERANCE) -> bool:
    # Not `allclose`: NaN and infinity must count as different, and states of zero would hide any rotation.
    return bool((actual - expected).norm() < tolerance * expected.norm())
