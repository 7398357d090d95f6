"""`sink_generate`: `model.generate` with a `SinkCache`."""

import re
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation.utils import GenerateOutput

from .cache import DEFAULT_NUM_SINK_TOKENS, DEFAULT_WINDOW_LENGTH, SinkCache

_NOT_TEXT = r"pixel_values|_grid_thw|input_features"


def sink_generate(
    model: PreTrainedModel,
    inputs: torch.Tensor | None = None,
    *,
    window_length: int = DEFAULT_WINDOW_LENGTH,
    num_sink_tokens: int = DEFAULT_NUM_SINK_TOKENS,
    past_key_values: SinkCache | None = None,
    **generate_kwargs: Any,
) -> GenerateOutput | torch.LongTensor:
    """Generate text of any length in constant memory: `model.generate` with a `SinkCache`.

    Args:
        model: a causal language model.
        inputs: the prompt, as `generate` takes it; `input_ids=` or `**tokenizer(...)` do as well.
        window_length: the most tokens a layer of the cache holds, sinks included.
        num_sink_tokens: how many of the first tokens are never evicted.
        past_key_values: the `SinkCache` of an earlier call, to continue it; it keeps its own window.
        generate_kwargs: anything else that `model.generate` takes.

    Returns:
        What `model.generate` returns; with `return_dict_in_generate=True` its `past_key_values` is the cache.

    Raises:
        TypeError, ValueError: naming the argument and its value, before anything is generated.
        NotImplementedError: naming the model type and the reason, for a model that cannot be supported exactly.
    """
    if not isinstance(model, GenerationMixin):
        raise TypeError(f"`model` must be a transformers model that can generate, got {model.__class__.__name__}.")
    if past_key_values is None:
        past_key_values = SinkCache(model.config, window_length, num_sink_tokens)
    elif not isinstance(past_key_values, SinkCache):
        raise TypeError(
            f"`past_key_values` must be a SinkCache, got {past_key_values.__class__.__name__}. Leave it out to start a "
            "new stream, or call `model.generate` for other caches."
        )
    for name, value, default in (
        ("window_length", window_length, DEFAULT_WINDOW_LENGTH),
        ("num_sink_tokens", num_sink_tokens, DEFAULT_NUM_SINK_TOKENS),
    ):
        if value not in (default, getattr(past_key_values, name)):
            raise ValueError(
                f"`{name}` of a cache cannot change: got {name}={value} for `past_key_values` with "
                f"{getattr(past_key_values, name)}. Leave it out to continue that cache."
            )
    if generate_kwargs.setdefault("use_cache", True) is not True:
        raise ValueError(
            f"`use_cache` must be True, got {generate_kwargs['use_cache']!r}: the window is a property of the cache."
        )
    _check_padding(model, inputs, generate_kwargs)
    seen = [name for name, value in generate_kwargs.items() if value is not None and re.search(_NOT_TEXT, name)]
    if seen and "mrope_section" in str(model.config.to_dict()):
        raise NotImplementedError(
            f"`{seen[0]}` is not supported: this {model.config.model_type!r} model gives images positions in several "
            "dimensions (M-RoPE), so that tokens cannot be counted as positions any more. Text alone is exact."
        )
    if generate_kwargs.get("prefill_chunk_size") is not None:
        raise NotImplementedError(
            f"`prefill_chunk_size` is not supported yet, got {generate_kwargs['prefill_chunk_size']!r}: later tokens "
            "of a chunk would see more than their window."
        )
    # The model's own settings may ask for another cache.
    generate_kwargs.setdefault("cache_implementation", None)
    _check_frequencies(model)
    return model.generate(inputs, past_key_values=past_key_values, **generate_kwargs)  # type: ignore[misc]


def _check_padding(model: PreTrainedModel, inputs: torch.Tensor | None, generate_kwargs: dict[str, Any]) -> None:
    """Refuse padding, announced or, as `generate` reads it from the prompt, not."""
    padded = False
    attention_mask = generate_kwargs.get("attention_mask")
    input_ids = inputs if inputs is not None else generate_kwargs.get("input_ids")
    if attention_mask is not None:
        padded = not bool(attention_mask.all())
    elif input_ids is not None:
        settings = generate_kwargs.get("generation_config") or model.generation_config
        pad, eos = (generate_kwargs.get(name, getattr(settings, name)) for name in ("pad_token_id", "eos_token_id"))
        ends = eos if isinstance(eos, list) else [eos]
        padded = pad is not None and pad not in ends and bool((input_ids == pad).any())
    if padded:
        raise ValueError(
            "`attention_mask` must be all ones, got padding: padded batches are not supported yet. Generate for "
            "prompts of equal length together, or one by one. If the pad token is a word of the prompt, pass a mask."
        )


def _check_frequencies(model: PreTrainedModel) -> None:
    # `model.to(torch.bfloat16)` rounds the rotary frequencies with the weights; the cache turns by the exact ones.
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and buffer.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"`model` has rotary frequencies rounded to {buffer.dtype} ({name}), so that positions drift apart. "
                f"Load it with `from_pretrained(..., dtype={buffer.dtype})` instead of converting it afterwards."
            )
