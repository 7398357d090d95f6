"""A KV cache of constant size with attention sinks: Hugging Face models, text or multimodal, generate without end."""

from .cache import SinkCache
from .dropin import disable_attention_sinks, enable_attention_sinks
from .generate import sink_generate
from .prefill import sink_prefill
from .rope import Rotation
from .session import SinkSession

__all__ = [
    "Rotation", "SinkCache", "SinkSession", "disable_attention_sinks", "enable_attention_sinks", "sink_generate",
    "sink_prefill",
]  # fmt: skip


def __getattr__(name: str) -> object:
    # attention_sinks 0.x had its own model classes. Importing one raises an ImportError that names the replacement.
    if name.startswith("Auto"):
        raise ImportError(
            f"attention_sinks 1.0 removed {name}. Load the model with `from transformers import {name}`. Then call "
            "`sink_generate(model, **inputs, window_length=1024, num_sink_tokens=4)`, or pass "
            "`past_key_values=SinkCache(model.config, window_length=1024, num_sink_tokens=4)` to `model.generate`."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
