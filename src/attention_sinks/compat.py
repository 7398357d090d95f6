"""How the installed version of transformers names a cache, and the error if it differs from the tested versions."""

import contextlib
import functools
import inspect
import os
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin
from transformers.generation.streamers import BaseStreamer

try:
    from transformers.cache_utils import (
        DynamicIndexedLayer,
        LinearAttentionAndFullAttentionLayer,
        LinearAttentionAndSlidingWindowAttentionLayer,
        LinearAttentionLayer,
    )
except ImportError:  # early transformers 5 has no such layers

    class _Absent(CacheLayerMixin): ...

    DynamicIndexedLayer = LinearAttentionLayer = _Absent  # type: ignore[misc,assignment]
    LinearAttentionAndFullAttentionLayer = _Absent  # type: ignore[misc,assignment]
    LinearAttentionAndSlidingWindowAttentionLayer = _Absent  # type: ignore[misc,assignment]

__all__ = [
    "CACHE_NAMES", "LAST_TESTED", "CheckedStreamer", "DriftError", "DynamicIndexedLayer",
    "LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer", "LinearAttentionLayer",
    "PassWatch", "cache_name", "chosen_cache", "compiles_by_itself", "with_cache",
]  # fmt: skip

# The newest version of transformers that all tests ran with.
LAST_TESTED = "5.24.0"
# How transformers names the argument and the output field that is the cache: from 5.24 on, and before.
CACHE_NAMES = ("cache", "past_key_values")


class DriftError(RuntimeError):
    """The installed version of transformers does not do what this library relies on."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"transformers {transformers.__version__} works differently from the versions that attention-sinks was "
            f"tested with, up to {LAST_TESTED}: {what}. Install transformers=={LAST_TESTED} or a newer attention-sinks."
        )


def cache_name(function: Callable[..., Any] | None = None) -> str:
    """Return the name by which `function` takes a cache; by default, the name that `generate` uses.

    Raises:
        RuntimeError: if it takes none by a known name.
    """
    default = GenerationMixin.prepare_inputs_for_generation
    function = default if function is None else function
    parameters = inspect.signature(function).parameters
    known = [name for name in CACHE_NAMES if name in parameters]
    if known:
        return known[0]
    if function is not default and any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return cache_name()
    raise DriftError(f"`{function.__qualname__}` takes no argument {' or '.join(CACHE_NAMES)}")


def with_cache(function: Callable[..., Any], cache: Any) -> dict[str, Any]:
    """Return the keyword argument by which `function` takes `cache`."""
    return {cache_name(function): cache}


def chosen_cache(cache: Any, past_key_values: Any) -> Any:
    """Return the cache that was given by one of its two names.

    Raises:
        TypeError: if it was given by both.
    """
    if cache is not None and past_key_values is not None:
        raise TypeError("`cache` and `past_key_values` must not both be given: they are two names of one argument.")
    return past_key_values if cache is None else cache


class PassWatch:
    """Checks that each forward pass of a call goes the way that this library relies on.

    The caller announces a pass, the model asks the cache for the sizes of its mask, the layers update the cache. The
    cache reports the latter two; of a compiled pass, only that it took place.
    """

    def __init__(self) -> None:
        # Compiled code only writes `moved`, so that no compiled graph depends on a watch.
        self.active = self.moved = False
        self._begin()

    def _begin(self) -> None:
        self.passes = 0
        self._announced: int | None = None
        self._asks_mask = self.mask_asked = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, every pass must be announced.

        Raises:
            RuntimeError: at the end, if none was, or if the last one did not update the cache.
        """
        self._begin()
        self.active = True
        try:
            yield
            self.check()
        except DriftError:
            raise
        except RuntimeError as error:
            if self._announced is not None and not self.moved and not isinstance(error, torch.OutOfMemoryError):
                # A mask that was made for the cache does not fit a model that does not use it.
                error.add_note(f"The model may be at fault. If it is not: {DriftError('it lost the cache')}")
            raise
        finally:
            self.active = False

    def announce(self, query_length: int, asks_mask: bool) -> None:
        """Expect a pass of `query_length` tokens; `asks_mask`: the cache is asked for the sizes of its mask."""
        self._check_moved()
        self._announced, self._asks_mask, self.moved = query_length, asks_mask, False
        self.passes += 1

    def begin_pass(self, query_length: int) -> None:
        """Check a pass that is about to update the cache.

        Raises:
            RuntimeError: if nobody announced it, or if it differs from what was announced.
        """
        if not self.active:
            return
        if self._announced is None or self.moved:
            raise DriftError(
                "the model was called without `prepare_inputs_for_generation`, where positions are prepared for the "
                "cache (a decoding loop given as `custom_generate` must call it too)"
            )
        if query_length != self._announced:
            raise DriftError(f"the model reads {query_length} tokens where {self._announced} were announced")
        if self._asks_mask and not self.mask_asked:
            raise DriftError("the model did not ask the cache for the sizes of its attention mask")
        self.mask_asked = False
        self.moved = True

    def check(self) -> None:
        """Check that a token may be handed out.

        Raises:
            RuntimeError: if the cache took no part in making it.
        """
        if self.passes == 0:
            raise DriftError("`generate` did not call `prepare_inputs_for_generation` with the cache")
        self._check_moved()

    def _check_moved(self) -> None:
        if self._announced is not None and not self.moved:
            raise DriftError("a forward pass did not update the cache")


class CheckedStreamer(BaseStreamer):
    """Hands tokens on to a streamer once the passes that made them have been checked."""

    def __init__(self, streamer: Any, watch: PassWatch) -> None:
        self._streamer = streamer
        self._watch = watch
        self._prompt = True

    def put(self, value: Tensor) -> None:
        if not self._prompt:
            self._watch.check()
        self._prompt = False
        self._streamer.put(value)

    def end(self) -> None:
        self._watch.check()
        self._streamer.end()


class _CompileableCache(Cache):
    """A cache that `generate` may compile a model for."""

    is_compileable = True  # type: ignore[assignment]


@functools.lru_cache
def compiles_by_itself(device: torch.device | None) -> bool:
    """Return True if `generate` compiles a model by itself on a device, for a cache that allows it.

    Asks `transformers`. A `device` of None stands for the accelerator at hand, if there is one.
    """
    if device is None:
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = types.SimpleNamespace(device=device, config=PreTrainedConfig())
    arguments = {cache_name(): _CompileableCache(layers=[])}
    before = os.environ.get("TOKENIZERS_PARALLELISM")  # set by transformers where it compiles
    try:
        return bool(GenerationMixin._valid_auto_compile_criteria(model, arguments, GenerationConfig()))  # type: ignore[arg-type]
    except AttributeError:  # transformers asks the model, or itself, something else: not compiled is slower, not wrong
        return False
    finally:
        if before is None:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
