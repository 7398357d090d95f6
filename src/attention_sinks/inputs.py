"""What `sink_generate` and `sink_prefill` are given, checked before anything is read."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

# Tensors that a text model or `generate` takes. Any other one brings images or sound.
_OF_TEXT = {
    "attention_mask", "cache_position", "input_ids", "inputs_embeds", "labels", "logits_to_keep",
    "negative_prompt_attention_mask", "negative_prompt_ids", "position_ids",
}  # fmt: skip
_SETTINGS = GenerationConfig()  # some of which may be tensors
# Arguments of a model that a call sets itself or that have no meaning in it, and what to do instead.
_LEFT_OUT = {
    "adapter_names": "activate the adapter with `model.set_adapter(name)`, and call once for each",
    "attention_mask": "tell the cache of padding: `SinkCache(config, attention_mask=mask)`",
    "input_ids": "they are the second argument",
    "inputs_embeds": "a text is read by its `input_ids`",
    "labels": "compute the loss from the `logits` of the whole text",
    "position_ids": "the cache counts them",
    "use_cache": "the window is a property of the cache",
}


def check_token_ids(name: str, ids: Any, model: PreTrainedModel, may_be_empty: bool = False) -> None:
    """Check token ids `[batch_size, length]`.

    Raises:
        TypeError, ValueError: naming the argument, what it is, and what to pass instead.
    """
    if not isinstance(ids, Tensor):
        way_on = "pass `torch.tensor` of a list of rows"
        if isinstance(ids, Mapping):
            way_on = "pass it as `**inputs`"
        elif isinstance(ids, str):
            way_on = "pass `**tokenizer(text, return_tensors='pt')`"
        raise TypeError(
            f"`{name}` must be a tensor of token ids, [batch_size, length], got a {type(ids).__name__}: {way_on}."
        )
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"`{name}` must hold token ids in torch.int64, got {ids.dtype} of the shape {[*ids.shape]}. Convert them "
            "with `.long()`; embeddings are `inputs_embeds`."
        )
    if ids.ndim != 2 or len(ids) == 0:
        way_on = " Add a dimension: `ids[None]`." if ids.ndim == 1 else ""
        raise ValueError(f"`{name}` must have the shape [batch_size, length], got {[*ids.shape]}.{way_on}")
    if ids.shape[1] == 0:
        if may_be_empty:
            return
        raise ValueError(
            f"`{name}` must have tokens, got the shape {[*ids.shape]}: there is nothing to read. Begin a text with "
            "`tokenizer.bos_token_id`; continue one with its last token, which the cache has not read yet."
        )
    if ids.device != model.device and ids.device.type != "cpu" and model.device.type != "meta":
        raise ValueError(f"`{name}` must be on the device of the model, {model.device}, got {ids.device}.")


def check_vocabulary(name: str, ids: Tensor, model: PreTrainedModel) -> None:
    """Check that a model has embeddings for token ids `[batch_size, length]`. On an accelerator this waits for it.

    Raises:
        ValueError: naming the argument and the first id that is none.
    """
    embeddings: Any = model.get_input_embeddings()
    size = getattr(embeddings, "num_embeddings", None)
    if isinstance(size, int) and ids.numel() > 0:
        size += getattr(embeddings, "num_additional_embeddings", 0)
        least, most = (int(x) for x in ids.aminmax())
        if least < 0 or most >= size:
            got = least if least < 0 else most
            raise ValueError(
                f"`{name}` must be from 0 to {size - 1}, the vocabulary of the model, got {got}. Use the "
                "tokenizer of the model, or `model.resize_token_embeddings(len(tokenizer))`."
            )


def check_prompt(model: PreTrainedModel, inputs: Any, arguments: dict[str, Any], is_started: bool) -> None:
    """Check the prompt of `sink_generate`.

    Args:
        model: the model of the call.
        inputs: the prompt, if it was given by position.
        arguments: the arguments by name.
        is_started: True if a stream is continued.

    Raises:
        TypeError, ValueError: naming the argument, what it is, and what to pass instead.
    """
    prompts = {"inputs": inputs, "input_ids": arguments.get("input_ids")}
    for name, ids in prompts.items():
        if ids is not None:
            check_token_ids(name, ids, model)
    mask = arguments.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        shape = [*mask.shape] if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"`attention_mask` must be a tensor of shape [batch_size, prompt_length], got {shape}.")
    embeddings = arguments.get("inputs_embeds")
    if embeddings is not None:
        if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point():
            kind = embeddings.dtype if isinstance(embeddings, Tensor) else type(embeddings).__name__
            raise TypeError(f"`inputs_embeds` must be a tensor of floating point numbers, got {kind}.")
        if embeddings.ndim != 3 or 0 in embeddings.shape:
            raise ValueError(
                f"`inputs_embeds` must have the shape [batch_size, length, hidden_size], got {[*embeddings.shape]}."
            )
    elif is_started and all(ids is None for ids in prompts.values()):
        raise ValueError(
            "`input_ids` must be given to continue a `cache`, got None: there is nothing to read. Continue a text with "
            "its last token, which the cache has not read yet."
        )


def check_left_out(arguments: dict[str, Any], names: Iterable[str]) -> None:
    """Check that arguments that a call sets itself, or that have no meaning in it, are left out.

    Raises:
        TypeError: naming the argument and what to do instead.
    """
    for name in names:
        value = arguments.get(name)
        if value is not None and not (name == "use_cache" and value is True):
            raise TypeError(f"`{name}` must be left out, got {value!r:.80}: {_LEFT_OUT[name]}.")


def check_model_arguments(arguments: dict[str, Any], input_ids: Tensor) -> None:
    """Check the arguments that `sink_prefill` passes to the model for each chunk of `input_ids`.

    Raises:
        TypeError, NotImplementedError: naming the argument and what to do instead.
    """
    check_left_out(arguments, _LEFT_OUT)
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[:2] == input_ids.shape:
            raise TypeError(
                f"`{name}` must be left out, got one value for each token, {[*value.shape]}: the model reads "
                "`input_ids` in chunks, and each chunk would get all of them."
            )
    check_is_text(arguments)


def not_text(arguments: dict[str, Any]) -> str | None:
    """Return the name of an argument that brings images or sound, or None.

    Processors give types of tokens (`token_type_ids`, `mm_token_type_ids`) for text too: there all are zero.
    """
    others = (name for name in arguments if name not in _OF_TEXT and not hasattr(_SETTINGS, name))
    return next((name for name in others if _brings(name, arguments[name])), None)


def _brings(name: str, value: Any) -> bool:
    if isinstance(value, Tensor):
        return not name.endswith("token_type_ids") or bool(value.any())
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return any(_brings(name, each) for each in values)


def check_is_text(arguments: dict[str, Any]) -> None:
    """Check that a prompt that is read in chunks is text alone."""
    name = not_text(arguments)
    if name is not None:
        raise NotImplementedError(
            f"`{name}` is not supported with a prompt that is read in chunks: images and sound are read at once with "
            "their text. Call `sink_generate` without `prefill_chunk_size`, and read text after them in chunks."
        )


def kind_of(cache: Any) -> str:
    """Return what a `cache` is that should be a `SinkCache`. On the Hub there are copies of this library."""
    kind = type(cache)
    is_copy = kind.__name__ == "SinkCache"
    return f"that of {kind.__module__}, another copy of this library" if is_copy else kind.__name__
