"""Attention sinks for Hugging Face language models: a KV cache of constant size, for streams without end."""

from .cache import SinkCache
from .generate import sink_generate

__all__ = ["SinkCache", "sink_generate"]
