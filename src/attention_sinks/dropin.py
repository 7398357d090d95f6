"""A `SinkCache` for code that calls `model.generate` itself: agents, pipelines, evaluation harnesses.

While a model is enabled, `generate` of its class is a function that knows which models are. Nothing is set on the model
itself, so that a copy, a pickle or a saved folder of it holds nothing of this library.
"""

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from typing import Any

from transformers import GenerationMixin, PreTrainedModel

from .architecture.settings import own_text_config
from .cache import DEFAULT_NUM_SINK_TOKENS, DEFAULT_WINDOW_LENGTH, SinkCache
from .compat import CACHE_NAMES
from .generate import sink_generate
from .models import unwrapped

# The windows of each enabled model, as arguments of `sink_generate`; the last one is in force.
_enabled: weakref.WeakKeyDictionary[PreTrainedModel, tuple[dict[str, int], ...]] = weakref.WeakKeyDictionary()
# By class: the function in the place of its `generate`, and what the class itself had there.
_hooks: dict[type, tuple[Any, Any]] = {}
_lock = threading.RLock()  # whoever collects garbage under it may disable another model


def enable_attention_sinks(
    model: Any, window_length: int = DEFAULT_WINDOW_LENGTH, num_sink_tokens: int = DEFAULT_NUM_SINK_TOKENS
) -> contextlib.AbstractContextManager[Any]:
    """Let `model.generate` be `sink_generate`, whoever calls it, until it is disabled or a `with` block ends.

    A call that brings a cache or asks for one (`cache_implementation`), or says `use_cache=False`, is left alone. So is
    the draft of an assistant model. Calls that have begun are not changed.

    Args:
        model: a causal language model, or what wraps one (PEFT, data parallelism).
        window_length: the most tokens a layer of the cache holds, sinks included.
        num_sink_tokens: the number of first tokens that are never evicted.

    Returns:
        A context manager, at whose end the model is as it was before, with the window of an earlier call if there was
        one. It need not be entered.

    Raises:
        TypeError, ValueError: naming the argument and its value.
        NotImplementedError: naming the model type and the reason, for a model that cannot be supported exactly.

    Example:
        >>> with enable_attention_sinks(model, window_length=1024):
        ...     pipeline("text-generation", model=model, tokenizer=tokenizer)("Once upon a time", max_new_tokens=5000)
    """
    inner = unwrapped(model)
    if not isinstance(inner, GenerationMixin):
        raise TypeError(f"`model` must be a transformers model that can generate, got {type(inner).__name__}.")
    if "generate" in vars(inner):
        raise ValueError(
            f"`model` must have the `generate` of its class, but it was replaced by {inner.generate!r:.80}. Call "
            "`sink_generate`, or `del model.generate` before."
        )
    # Refuses what no call could do.
    SinkCache(own_text_config(inner.config), window_length, num_sink_tokens)
    window = {"window_length": window_length, "num_sink_tokens": num_sink_tokens}
    with _lock:
        _enabled[inner] = (*_enabled.get(inner, ()), window)
        _hook(type(inner))
    end = contextlib.ExitStack()
    end.callback(_disable, inner, lambda each: each is window)
    return end


def disable_attention_sinks(model: Any) -> None:
    """Undo all that `enable_attention_sinks` did to a model; nothing happens if it is not enabled."""
    _disable(unwrapped(model), lambda each: True)


def _disable(model: PreTrainedModel, is_over: Callable[[dict[str, int]], bool]) -> None:
    with _lock:
        left = tuple(window for window in _enabled.get(model, ()) if not is_over(window))
        if left:
            _enabled[model] = left
        else:
            _enabled.pop(model, None)
        for model_class in list(_hooks):  # `fully_shard` may have given the model another class meanwhile
            if not any(isinstance(each, model_class) for each in _enabled):
                _unhook(model_class)


def _hook(model_class: Any) -> None:
    """Let calls of `generate` on enabled models of a class go to `sink_generate`."""
    own = vars(model_class).get("generate")
    if own is not None and own is _hooks.get(model_class, (None,))[0]:
        return
    plain = model_class.generate
    signature = inspect.signature(plain)

    @functools.wraps(plain)  # callers read the signature, and transformers the name
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        windows = _enabled.get(self)
        if windows is None:
            return plain(self, *args, **kwargs)
        signature.bind(self, *args, **kwargs)  # raises the TypeErrors of a call
        arguments = {**dict(zip(signature.parameters, (self, *args), strict=False)), **kwargs}
        del arguments["self"]
        if _chooses_cache(self, arguments):
            return plain(self, *args, **kwargs)
        return sink_generate(self, **{**windows[-1], **arguments})

    _hooks[model_class] = generate, own
    model_class.generate = generate


def _unhook(model_class: Any) -> None:
    generate, own = _hooks.pop(model_class, (None, None))
    if generate is None or vars(model_class).get("generate") is not generate:  # replaced, by one that may call it
        return
    if own is None:
        del model_class.generate
    else:
        model_class.generate = own


def _chooses_cache(model: Any, arguments: dict[str, Any]) -> bool:
    """Return True if a call of `generate` says which cache it uses. The settings of the model say nothing."""
    config = arguments.get("generation_config")

    def said(name: str) -> Any:
        value, in_config = arguments.get(name), getattr(config, name, None)
        # A pipeline passes a copy of the model's settings.
        return in_config if value is None and in_config != getattr(model.generation_config, name, None) else value

    return (
        any(arguments.get(name) is not None for name in CACHE_NAMES)
        or said("use_cache") is False
        or said("cache_implementation") is not None
        # An assistant, perhaps the model itself, which exits early, drafts candidates.
        or getattr(config, "is_assistant", False)
    )
