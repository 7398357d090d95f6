"""`generate` with a `SinkCache`: `model.generate(..., custom_generate=<this repository>, trust_remote_code=True)`."""

from attention_sinks import sink_generate


def generate(model, window_length=256, num_sink_tokens=4, **kwargs):
    """Call `attention_sinks.sink_generate`, which documents the arguments."""
    return sink_generate(model, window_length=window_length, num_sink_tokens=num_sink_tokens, **kwargs)
