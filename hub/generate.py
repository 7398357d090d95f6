"""`generate` with a `SinkCache`, for `custom_generate` and for a model's own folder."""

from typing import Any

from attention_sinks.generate import sink_generate


def generate(
    inputs: Any = None,
    generation_config: Any = None,
    *,
    model: Any,
    window_length: int | None = None,
    num_sink_tokens: int | None = None,
    **kwargs: Any,
) -> Any:
    """Call `sink_generate`, which documents the arguments.

    `window_length` and `num_sink_tokens` may also stand in `generation_config`, or in the `generation_config.json` of
    the model. A cache that is continued keeps its own.
    """
    sizes: dict[str, Any] = {"window_length": window_length, "num_sink_tokens": num_sink_tokens}
    if kwargs.get("cache") is None and kwargs.get("past_key_values") is None:
        for config in (generation_config, model.generation_config):
            sizes = {name: getattr(config, name, None) if size is None else size for name, size in sizes.items()}
    kwargs.update({name: size for name, size in sizes.items() if size is not None})
    return sink_generate(model, inputs, generation_config=generation_config, **kwargs)
