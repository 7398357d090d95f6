"""Differences between versions of transformers: the name of the cache argument, and checks of what we rely on."""

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
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_layers import GradientCheckpointingLayer

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
    "PassWatch", "cache_name", "checkpointing_drops_cache", "chosen_cache", "compiles_by_itself", "with_cache",
]  # fmt: skip

# Newest version of transformers with which all tests passed.
LAST_TESTED = "5.24.0"
# Names of the cache argument and of the cache field of an output: since transformers 5.24, and before.
CACHE_NAMES = ("cache", "past_key_values")


class DriftError(RuntimeError):
    """Raised if the installed version of transformers does not behave as this library requires."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"transformers {transformers.__version__} works differently from the versions tested with attention-sinks, "
            f"up to {LAST_TESTED}: {what}. Install transformers=={LAST_TESTED} or a newer attention-sinks."
        )


def cache_name(function: Callable[..., Any] | None = None) -> str:
    """Return the name of the cache argument of `function`; by default, the name that `generate` uses.

    Raises:
        DriftError: if `function` has no cache argument with a known name.
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
    """Return `cache` as a keyword argument for `function`."""
    return {cache_name(function): cache}


def chosen_cache(cache: Any, past_key_values: Any) -> Any:
    """Return the cache, which a caller may pass by either of its two names.

    Raises:
        TypeError: if both are given.
    """
    if cache is not None and past_key_values is not None:
        raise TypeError("`cache` and `past_key_values` must not both be given: they are two names of one argument.")
    return past_key_values if cache is None else cache


class PassWatch:
    """Checks that each forward pass of a call uses the cache as this library requires.

    A pass has three parts: the caller announces it, the model asks the cache for the sizes of its mask, and the layers
    update the cache. The cache reports parts two and three. A compiled pass reports only that it updated the cache.
    """

    def __init__(self) -> None:
        self.active = False
        self._begin()

    def __reduce__(self) -> tuple[type["PassWatch"], tuple[()]]:
        return PassWatch, ()  # a copy of a cache is not part of the call that runs

    def _begin(self) -> None:
        self.passes = 0
        # The number of tokens of the pass that was announced and has not updated the cache yet, or None.
        self._awaited: int | None = None
        self._awaits_mask = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Require that every pass in this context is announced.

        Raises:
            DriftError: at the end, if no pass was announced or the last one did not update the cache.
        """
        self._begin()
        self.active = True
        try:
            yield
            self.check()
        except DriftError:
            raise
        except RuntimeError as error:
            if self._awaited is not None and not isinstance(error, torch.OutOfMemoryError):
                # If the model ignores the cache, its mask has the wrong shape, and the model raises this error.
                error.add_note(f"The model may have caused this error. If not: {DriftError('it lost the cache')}")
            raise
        finally:
            self.active = False

    def announce(self, query_length: int, asks_mask: bool) -> None:
        """Expect a pass of `query_length` tokens. `asks_mask`: True if the model must ask for the sizes of its mask."""
        self._check_moved()
        self._awaited, self._awaits_mask = query_length, asks_mask
        self.passes += 1

    def note_mask(self) -> None:
        """Note that the model asked for the sizes of its mask."""
        self._awaits_mask = False

    def note_compiled_pass(self) -> None:
        """Note that a compiled pass updates the cache. Reads nothing, so that no compiled graph depends on a watch."""
        self._awaited = None

    def begin_pass(self, query_length: int) -> None:
        """Check a pass before it updates the cache.

        Raises:
            DriftError: if the pass was not announced, or differs from the announced one.
        """
        if not self.active:
            return
        if self._awaited is None:
            raise DriftError(
                "the model was called without `prepare_inputs_for_generation`, which prepares the positions for the "
                "cache (a decoding loop passed as `custom_generate` must call it too)"
            )
        if query_length != self._awaited:
            raise DriftError(f"the model reads {query_length} tokens where {self._awaited} were announced")
        if self._awaits_mask:
            raise DriftError("the model did not ask the cache for the sizes of its attention mask")
        self._awaited = None

    def check(self) -> None:
        """Check the passes so far, before a token is returned.

        Raises:
            DriftError: if a pass did not update the cache.
        """
        if self.passes == 0:
            raise DriftError("`generate` did not call `prepare_inputs_for_generation` with the cache")
        self._check_moved()

    def _check_moved(self) -> None:
        if self._awaited is not None:
            raise DriftError("a forward pass did not update the cache")


class CheckedStreamer(BaseStreamer):
    """Streamer that checks the forward passes of a token, then passes the token to another streamer."""

    def __init__(self, streamer: Any, watch: PassWatch) -> None:
        self._streamer = streamer
        self._watch = watch
        self._expects_prompt = True

    def put(self, value: Tensor) -> None:
        if not self._expects_prompt:
            self._watch.check()
        self._expects_prompt = False
        self._streamer.put(value)

    def end(self) -> None:
        self._watch.check()
        self._streamer.end()


class _CompileableCache(Cache):
    """A cache that `generate` may compile a model for."""

    is_compileable = True


@functools.lru_cache
def compiles_by_itself(device: torch.device | None) -> bool:
    """Return True if `generate` compiles a model by itself on a device, for a cache that allows it.

    Asks `transformers`. A `device` of None stands for the accelerator at hand, if there is one.
    """
    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model: Any = types.SimpleNamespace(device=device, config=PreTrainedConfig())
    arguments: dict[str, Any] = {cache_name(): _CompileableCache(layers=[])}
    before = os.environ.get("TOKENIZERS_PARALLELISM")  # set by transformers where it compiles
    try:
        return bool(GenerationMixin._valid_auto_compile_criteria(model, arguments, GenerationConfig()))
    except AttributeError:  # transformers asks the model, or itself, something else: not compiled is slower, not wrong
        return False
    finally:
        if before is None:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def checkpointing_drops_cache(model: PreTrainedModel) -> bool:
    """Return True if layers of a model compute without the cache, since they checkpoint activations for training."""
    layers = (each for each in model.modules() if isinstance(each, GradientCheckpointingLayer))
    return any(each.training and each.gradient_checkpointing for each in layers) and _drops_cache_without_gradients()


@functools.lru_cache
def _drops_cache_without_gradients() -> bool:
    """Return True if a layer that checkpoints drops the cache even where no gradients are computed. Asks a layer."""

    class Layer(GradientCheckpointingLayer):
        gradient_checkpointing = True

        def forward(self, **kwargs: Any) -> Any:
            return kwargs[cache_name()]

    layer: Any = Layer()
    layer._gradient_checkpointing_func = lambda function: function()
    with torch.no_grad():
        return layer(**{cache_name(): True}) is None
