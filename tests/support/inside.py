"""What the tests know about the inside of the library. No other file of the tests uses a private or internal name.

A change of the core is followed here alone: each function is small and named after what it does or returns.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedConfig

import attention_sinks
import attention_sinks.compat
import attention_sinks.files
import attention_sinks.storage.static
import attention_sinks.storage.stream
from attention_sinks import Rotation, SinkCache, SinkSession
from attention_sinks.architecture import positions as positions_module
from attention_sinks.architecture import twin as twin_module
from attention_sinks.architecture.kinds import LeftOut
from attention_sinks.architecture.positions import LAST_POSITION, derive_positions
from attention_sinks.architecture.twin import RESIZES, LostCache, OwnRandomness, Twin, build_twin, isolated, shrink
from attention_sinks.compat import PassWatch
from attention_sinks.files import FORMAT
from attention_sinks.openmp import gnu_openmp
from attention_sinks.prefill import read_in_chunks
from attention_sinks.storage.guard import PassGuard
from attention_sinks.storage.layers import SinkLayer
from attention_sinks.storage.layout import Layout, compute, layout_of, num_recent_in_window, write_slots
from attention_sinks.storage.mixed import HybridSinkLayer, IndexedSinkLayer
from attention_sinks.storage.plan import UpdatePlan, WindowedPlan
from attention_sinks.storage.positions import token_positions
from attention_sinks.storage.static import StaticPlan
from attention_sinks.streaming import Detokenizer, Worker

__all__ = [
    "FORMAT",
    "LAST_POSITION",
    "RESIZES",
    "Detokenizer",
    "HybridSinkLayer",
    "IndexedSinkLayer",
    "Layout",
    "LeftOut",
    "LostCache",
    "OwnRandomness",
    "PassGuard",
    "SinkLayer",
    "StaticPlan",
    "Twin",
    "UpdatePlan",
    "WindowedPlan",
    "Worker",
    "build_twin",
    "compute",
    "derive_positions",
    "gnu_openmp",
    "isolated",
    "layout_of",
    "num_recent_in_window",
    "shrink",
    "token_positions",
    "twin_module",
    "write_slots",
]  # fmt: skip

# --- a cache


def sink_layers(cache: SinkCache) -> list[Any]:
    """All layers with a ring, the indexers' among them."""
    return list(cache._stream.sink_layers())


def buffers(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors that a layer holds: keys and values in their slots, and the sinks as they were before rotation."""
    return layer.keys, layer.values, layer.sinks


def tensors(cache: SinkCache) -> dict[str, Tensor]:
    """All tensors that the layers of a cache hold, and their sinks as they were before rotation, by name."""
    found: dict[str, Tensor] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, dict | list | tuple):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, each in items:
                add(f"{name}.{key}", each)

    rings = sink_layers(cache)
    for i, layer in enumerate([*rings, *(layer for layer in cache.layers if not isinstance(layer, SinkLayer))]):
        for name, value in vars(layer).items():
            add(f"{i}.{name}", value)
        if layer in rings and layer.is_initialized and layer.rotation is not None:
            found |= {f"{i}.sinks": layer.sinks, f"{i}.count": layer.group.count, f"{i}.offset": layer.group.offset}
    return found


def rotation_of(layer: Any) -> Rotation | None:
    rotation: Rotation | None = layer.rotation
    return rotation


def seen_of(layer: Any) -> int:
    """How many tokens a layer has stored."""
    seen: int = layer.seen
    return seen


def num_rows(cache: SinkCache) -> int:
    """The batch size; 0 before the first update."""
    return cache.num_rows


def left_padding(cache: SinkCache) -> Tensor | None:
    """The number of pads that each row begins with, `[batch_size]`; None without padding."""
    return cache.token_positions.left_padding


def config_of(cache: SinkCache) -> Any:
    return cache._spec.config


def make_layers_disagree(cache: SinkCache) -> None:
    """Let the second layer have stored one token less than the first."""
    cache.layers[1].seen -= 1


# --- how a model tells positions apart


def forget_measurements() -> None:
    """Let the next cache of every config be the first one."""
    positions_module._measure.cache_clear()


def shown_by_twin(config: PreTrainedConfig, every_layer: bool) -> tuple[dict[str, Any], int]:
    """What a twin shows, in comparable form, and how many of its layers are left out."""

    def plain(rotation: Any) -> Any:
        return rotation if rotation is None else (repr(rotation), rotation.inv_freq.tolist())

    with isolated():
        twin = build_twin(config, RESIZES[0], every_layer)
        if not every_layer:
            twin.copied().compare_layers([0, 1])
        measured: Any = positions_module._measure_twin(twin, twin_module.PROBE_LENGTH)
    assert not twin.left_out.differ
    shown = dict(vars(measured))
    for name in ("rotations", "indexers"):
        shown[name] = {i: plain(rotation) for i, rotation in sorted(shown[name].items())}
    return shown, len(twin.left_out.layers)


# --- positions of a cache


def position_offset_of(cache: SinkCache) -> int:
    """By how many positions a row without padding was rebased; 0 if it never was."""
    return cache.token_positions.offset


def position_offsets(cache: SinkCache) -> list[int]:
    """By how many positions each row was rebased; one number if it is the same for all rows."""
    offsets = cache.position_offsets
    return offsets.tolist() if isinstance(offsets, Tensor) else [offsets]


def announced(
    cache: SinkCache, query_length: int, positions: Tensor | None = None
) -> contextlib.AbstractContextManager[Any]:
    """Inside, the caller gives the next pass positions as the cache counts them, or these, see `SinkCache.announce`."""
    return cache.announced(query_length, positions=positions)


def set_position_limit(cache: SinkCache, limit: int) -> None:
    """Let the positions of the model end at `limit`."""
    spec = cache._spec
    cache._spec = dataclasses.replace(spec, positions=dataclasses.replace(spec.positions, limit=limit))
    cache._stream.spec = cache._spec


def rebase_every(monkeypatch: pytest.MonkeyPatch, positions: int) -> None:
    """Let `sink_generate` and `sink_prefill` rebase positions once they have grown by `positions`."""
    monkeypatch.setattr(attention_sinks.storage.changes, "ACCURATE_POSITIONS", positions)


def age(cache: SinkCache, offset: int, rebased: bool) -> int:
    """Make a stream about `offset` tokens long, and return by how many tokens it is longer than before.

    A stream that was rebased differs from a longer one in its counts alone. In a stream that never was, the recent keys
    are rotated by the difference; the sinks are kept unrotated.
    """
    if rebased:
        cache.rebase()
    ring_length = cache.window_length - cache.num_sink_tokens
    older = max(offset - cache.get_seq_length(), 0) // ring_length * ring_length  # the next slot stays the same
    for layer in sink_layers(cache):
        if not rebased and layer.rotation is not None:
            rotating = layer.rotating(layer.keys, layer.values)
            recent = rotating[:, :, cache.num_sink_tokens :]
            recent.copy_(layer.rotation.rotate(recent, older))
        layer.seen += older
    if rebased:
        positions = cache.token_positions
        cache._stream.set_positions(positions.rebased(positions.offset + older))
    return older


# --- chunks in which each token sees exactly its own window

Mask = Callable[[Any, Any, Any, Any], Any]


def windowed_sizes(cache: SinkCache, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
    """What the cache announces for a windowed chunk: the number of keys, and the column of the first one."""
    with cache.announced(query_length, windowed=True):
        return cache.get_mask_sizes(query_length, layer_idx)


@contextlib.contextmanager
def windowed_chunk(cache: SinkCache, query_length: int, positions: Tensor | None = None) -> Iterator[Mask]:
    """Inside, the layers take one chunk for which each query has its own window; yields the mask function for it."""
    with cache.announced(query_length, windowed=True, positions=positions) as plan:
        assert isinstance(plan, WindowedPlan)
        yield plan.visible(torch.device("cpu"))


def read_windowed(model: Any, cache: SinkCache, ids: Tensor) -> None:
    """Read a text as one windowed chunk."""
    for _ in read_in_chunks(model, ids, cache, ids.shape[1], {}):
        pass


# --- compilation


def force_static(monkeypatch: pytest.MonkeyPatch, compiles: bool = True) -> None:
    """Let `generate` compile by itself on every device, as on CUDA, or on none."""
    for module in (attention_sinks.compat, attention_sinks.storage.static):
        monkeypatch.setattr(module, "compiles_by_itself", lambda device: compiles)


def count_rotations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record by how many positions each cosine and sine that is computed from now on rotates."""
    shifts: list[int] = []
    cos_sin = Rotation.cos_sin

    def counted(self: Rotation, shift: int, dtype: torch.dtype) -> Tensor:
        shifts.append(shift)
        return cos_sin(self, shift, dtype)

    monkeypatch.setattr(Rotation, "cos_sin", counted)
    return shifts


# --- interrupts


def library_files() -> set[str]:
    """The paths of all modules of the library."""
    return {str(path) for path in Path(attention_sinks.__file__).parent.rglob("*.py")}


def restoring_functions() -> set[CodeType]:
    """Context managers that restore a flag. Python cannot be interrupted on their lines that call nothing."""
    functions: list[Any] = [SinkCache.announced, PassWatch.watching]
    return {function.__wrapped__.__code__ for function in functions}


# --- files

# The module that writes files, by a function `save_file`.
FILES = attention_sinks.files


# --- a session


def ids_of(session: SinkSession) -> list[int]:
    """The tokens that the cache counts, and those that it has still to read."""
    return session._transcript.ids


def thread_of(session: SinkSession) -> Any:
    """The thread that computes for a session; None before its first forward pass."""
    return session._worker._thread


def age_session(session: SinkSession, tokens: int) -> None:
    """Let a session have forgotten `tokens` more tokens."""
    session._transcript.forgotten += tokens


def pending_length(detokenizer: Detokenizer) -> int:
    """How many tokens a detokenizer holds back."""
    return len(detokenizer._ids)


# --- versions of transformers


def let_checkpointing_drop_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let layers that checkpoint activations drop the cache, as those of earlier versions do."""
    monkeypatch.setattr(attention_sinks.compat, "_drops_cache_without_gradients", lambda: True)
