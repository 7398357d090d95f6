"""Attention sinks for Hugging Face language models: a KV cache of constant size, for streams without end."""

from .cache import SinkCache
from .generate import sink_generate
from .rope import Rotation

__all__ = ["Rotation", "SinkCache", "sink_generate"]
