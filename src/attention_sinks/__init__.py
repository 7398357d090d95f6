"""Attention sinks for Hugging Face language models: a KV cache of constant size, for streams without end."""

from .cache import SinkCache
from .generate import sink_generate
from .prefill import sink_prefill
from .rope import Rotation
from .session import SinkSession

__all__ = ["Rotation", "SinkCache", "SinkSession", "sink_generate", "sink_prefill"]


def __getattr__(name: str) -> object:
    # The model classes of attention_sinks 0.x; an ImportError where they are imported.
    if name.startswith("Auto"):
        raise ImportError(
            f"attention_sinks has had no {name} since 1.0: load the model with `from transformers import {name}` and "
            "call `sink_generate(model, **inputs, window_length=1024, num_sink_tokens=4)`, or pass "
            "`past_key_values=SinkCache(model.config, window_length=1024, num_sink_tokens=4)` to `model.generate`."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
