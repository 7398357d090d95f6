"""`generate` with a `SinkCache`.

`model.generate(..., custom_generate=<this repository>, trust_remote_code=True)`, or `model.generate(...)` for a model
whose own repository has this folder.
"""

from attention_sinks import sink_generate


def generate(inputs=None, *, model, **kwargs):
    """Call `attention_sinks.sink_generate`, which documents the arguments.

    Where `window_length` and `num_sink_tokens` are not given, they may stand in the generation config.
    """
    if kwargs.get("cache") is None and kwargs.get("past_key_values") is None:
        for name in ("window_length", "num_sink_tokens"):
            configs = kwargs.get("generation_config"), model.generation_config
            values = [kwargs.pop(name, None), *(getattr(config, name, None) for config in configs)]
            value = next((each for each in values if each is not None), None)
            if value is not None:
                kwargs[name] = value
    return sink_generate(model, inputs, **kwargs)
