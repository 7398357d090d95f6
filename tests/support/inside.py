"""What the tests know about the inside of the library. No other file of the tests uses a private or internal name.

A change of the core is followed here alone: each function is small and named after what it does or returns.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch
from torch import Tensor

import attention_sinks
import attention_sinks.files
import attention_sinks.generate
import attention_sinks.rows
from attention_sinks import Rotation, SinkCache, SinkSession
from attention_sinks.cache import HybridSinkLayer, IndexedSinkLayer, SinkLayer
from attention_sinks.compat import PassWatch
from attention_sinks.files import FORMAT
from attention_sinks.rope import LAST_POSITION, derive_positions
from attention_sinks.session import Detokenizer

__all__ = [
    "FORMAT", "LAST_POSITION", "Detokenizer", "HybridSinkLayer", "IndexedSinkLayer", "SinkLayer", "derive_positions",
]  # fmt: skip

# --- a cache


def sink_layers(cache: SinkCache) -> list[Any]:
    """All layers with a ring, the indexers' among them."""
    return list(cache._rings())


def buffers(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors that a layer holds: keys and values in their slots, and the sinks as they were before rotation."""
    return layer.keys, layer.values, layer.sinks


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
    padding: Tensor | None = cache.rows.pads
    return padding


def config_of(cache: SinkCache) -> Any:
    return cache._config


def make_layers_disagree(cache: SinkCache) -> None:
    """Let the second layer have stored one token less than the first."""
    cache.layers[1].seen -= 1


# --- positions


def position_offset_of(cache: SinkCache) -> int:
    """By how many positions a row without padding was rebased; 0 if it never was."""
    return int(cache.rows.base)


def position_offsets(cache: SinkCache) -> list[int]:
    """By how many positions each row was rebased; one number if it is the same for all rows."""
    offsets = cache.position_offsets
    return offsets.tolist() if isinstance(offsets, Tensor) else [offsets]


def rebased_positions(cache: SinkCache) -> contextlib.AbstractContextManager[None]:
    """Inside, the caller gives the model positions that are lower by `position_offsets`."""
    return cache.lowers_positions()


def set_position_limit(cache: SinkCache, limit: int) -> None:
    """Let the positions of the model end at `limit`."""
    cache.position_limit = limit


def rebase_every(monkeypatch: pytest.MonkeyPatch, positions: int) -> None:
    """Let `sink_generate` and `sink_prefill` rebase positions once they have grown by `positions`."""
    monkeypatch.setattr(attention_sinks.generate, "_ACCURATE_POSITIONS", positions)


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
            rotating = layer.turning(layer.keys, layer.values)
            recent = rotating[:, :, cache.num_sink_tokens :]
            recent.copy_(layer.rotation.turned(recent, older))
        layer.seen += older
    if rebased:
        cache.rows.set_base(cache.rows.base + older)
    return older


# --- chunks in which each token sees exactly its own window

Mask = Callable[[Any, Any, Any, Any], Any]


def windowed_sizes(cache: SinkCache, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
    """What the cache announces for a windowed chunk: the number of keys, and the column of the first one."""
    with cache.windows(True):
        sizes: tuple[int, int] = cache.layers[layer_idx].get_mask_sizes(query_length)
    return sizes


@contextlib.contextmanager
def windowed_chunk(cache: SinkCache, query_length: int) -> Iterator[Mask]:
    """Inside, the layers take one chunk for which each query has its own window; yields the mask function for it."""
    mask = cache.rows.windowed_mask(cache.get_seq_length(), query_length, torch.device("cpu"))
    with cache.windows(True):
        yield mask


def read_windowed(model: Any, cache: SinkCache, ids: Tensor) -> None:
    """Read a text as one windowed chunk."""
    for _ in attention_sinks.generate._read(model, ids, cache, ids.shape[1], {}):
        pass


# --- compilation


def force_static(monkeypatch: pytest.MonkeyPatch, compiles: bool = True) -> None:
    """Let `generate` compile by itself on every device, as on CUDA, or on none."""
    monkeypatch.setattr(attention_sinks.rows, "generate_compiles", lambda device: compiles)


def count_rotations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record by how many positions each cosine and sine that is computed from now on rotates."""
    shifts: list[int] = []
    phase = Rotation.phase

    def counted(self: Rotation, shift: int, dtype: torch.dtype) -> Tensor:
        shifts.append(shift)
        return phase(self, shift, dtype)

    monkeypatch.setattr(Rotation, "phase", counted)
    return shifts


# --- interrupts


def library_files() -> set[str]:
    """The paths of all modules of the library."""
    return {str(path) for path in Path(attention_sinks.__file__).parent.rglob("*.py")}


def restoring_functions() -> set[CodeType]:
    """Context managers that restore a flag. Python cannot be interrupted on their lines that call nothing."""
    functions: list[Any] = [SinkCache.windows, SinkCache.lowers_positions, PassWatch.watching]
    return {function.__wrapped__.__code__ for function in functions}


# --- files

# The module that writes files, by a function `save_file`.
FILES = attention_sinks.files


# --- a session


def ids_of(session: SinkSession) -> list[int]:
    """The tokens that the cache counts, and those that it has still to read."""
    return session._ids


def age_session(session: SinkSession, tokens: int) -> None:
    """Let a session have forgotten `tokens` more tokens."""
    session._forgotten += tokens


def pending_length(detokenizer: Detokenizer) -> int:
    """How many tokens a detokenizer holds back."""
    return len(detokenizer._ids)
