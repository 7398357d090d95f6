"""Tiny random models that take an image or sound, their prompts, and the model without a cache on the kept tokens."""

from functools import cache
from typing import Any, Self

import torch
import transformers
from torch import Tensor

from .versions import RECORDS_PAST

MEDIA, START, END = 90, 92, 93
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_IMAGE = {"image_token_id": MEDIA, "image_token_index": MEDIA, "tie_word_embeddings": False}
_AUDIO = {"audio_token_id": MEDIA, "audio_token_index": MEDIA, "tie_word_embeddings": False}
_SQUARE = {"pixel_values": (1, 3, 16, 16)}
# By name: the class of the model, its config, how many tokens an image or a sound makes, and the shapes of the inputs.
_KINDS: dict[str, tuple[str, dict[str, Any], int, Any]] = {
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "gemma3_text", "head_dim": 16, "layer_types": ["full_attention"]},
            "vision_config": {**_TOWER, "model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
            **_IMAGE,
        },
        4,
        _SQUARE,
    ),
    "glm4v": (
        "Glm4vForConditionalGeneration",
        {
            "text_config": {
                **TEXT,
                "rope_parameters": {**_ROPE, "mrope_section": [1, 2, 1], "partial_rotary_factor": 0.5},
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": 64,
                "image_size": 16,
                "patch_size": 4,
            },
            "image_start_token_id": START,
            "image_end_token_id": END,
            **_IMAGE,
        },
        6,
        {"pixel_values": (24, 96)},
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {**_TOWER, "model_type": "clip_vision_model"},
            **_IMAGE,
        },
        16,
        _SQUARE,
    ),
    "smolvlm": (
        "SmolVLMForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {**_TOWER, "model_type": "smolvlm_vision"},
            "scale_factor": 2,
            **_IMAGE,
        },
        4,
        {"pixel_values": (1, 1, 3, 16, 16)},
    ),
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "gemma", "head_dim": 16},
            "vision_config": {**_TOWER, "model_type": "siglip_vision_model"},
            "projection_dim": 64,
            **_IMAGE,
        },
        16,
        _SQUARE,
    ),
    "qwen2_audio": (
        "Qwen2AudioForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "qwen2"},
            "audio_config": {
                "d_model": 32,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 32,
                "num_mel_bins": 8,
                "max_source_positions": 20,
            },
            **_AUDIO,
        },
        10,
        {"input_features": (1, 8, 40)},
    ),
    "voxtral": (
        "VoxtralForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "audio_config": {
                "hidden_size": 32,
                "intermediate_size": 128,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_mel_bins": 8,
                "max_source_positions": 20,
            },
            **_AUDIO,
        },
        5,
        {"input_features": (1, 8, 40)},
    ),
    # The layer that attends to images is the last one: the states of the other depend on its token alone.
    "mllama": (
        "MllamaForConditionalGeneration",
        {
            "text_config": {
                **TEXT,
                "num_hidden_layers": 2,
                "cross_attention_layers": [1],
                "rope_parameters": _ROPE,
                "bos_token_id": 0,
            },
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "intermediate_layers_indices": [0],
                "vision_output_dim": 32,
                "num_hidden_layers": 1,
                "num_global_layers": 1,
                "attention_heads": 2,
                "image_size": 16,
                "patch_size": 4,
                "max_num_tiles": 1,
                "supported_aspect_ratios": [[1, 1]],
            },
            "image_token_index": MEDIA,
        },
        1,
        {"pixel_values": (1, 1, 1, 3, 16, 16)},
    ),
}
# Mllama of early transformers 5 needs a key for every token.
MULTIMODAL = [name for name in _KINDS if name != "mllama" or RECORDS_PAST]


@cache
def multimodal_model(name: str) -> Any:
    """Return a model in which the cached states of a token depend on that token alone."""
    class_name, settings, _, _ = _KINDS[name]
    model_class: Any = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**settings)).eval()
    decoder = {id(weight) for weight in model.get_decoder().parameters()}
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1 and id(weight) in decoder:
                weight.mul_(4)  # default weights make attention so flat that a wrong position hardly shows
            elif weight.ndim < 2:
                weight.add_(torch.randn_like(weight) * 0.2)  # gates that are closed in a new model
            elif not weight.any():  # the projection of Gemma 3
                weight.normal_()
    model.generation_config.suppress_tokens = [MEDIA, START, END]
    return model


def media_prompt(name: str, before: int, after: int) -> dict[str, Any]:
    """Return a prompt with an image or with sound between words."""
    _, _, length, shapes = _KINDS[name]
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, 80, (before + after,), generator=generator).tolist()
    input_ids = torch.tensor([[*words[:before], START, *[MEDIA] * length, END, *words[before:]]])
    types, ones = (input_ids == MEDIA).long(), torch.ones_like(input_ids)
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": ones}
    inputs |= {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    if name in ("gemma3", "paligemma"):
        inputs["token_type_ids"] = types
    elif name == "glm4v":
        inputs |= {"mm_token_type_ids": types, "image_grid_thw": torch.tensor([[1, 4, 6]])}
    elif name == "qwen2_audio":
        inputs["feature_attention_mask"] = torch.ones(1, 40, dtype=torch.long)
    elif name == "mllama":
        inputs |= {"aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long), "aspect_ratio_mask": torch.ones(1, 1, 1)}
        inputs["cross_attention_mask"] = ones[:, :, None, None]
    return inputs


class DecoderRecorder:
    """The embeddings that the text model is fed, in all passes inside, one row."""

    def __init__(self, model: Any) -> None:
        self.decoder = model.get_decoder()
        self.embeddings: list[Tensor] = []

    def __enter__(self) -> Self:
        def record(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            self.embeddings.append(kwargs["inputs_embeds"])

        self._hook = self.decoder.register_forward_pre_hook(record, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


@torch.no_grad()
def logits_of_kept(
    model: Any, inputs: dict[str, Any], sequence: Tensor, embeddings: Tensor, window_length: int, num_sinks: int
) -> Tensor:
    """Return the logits `[vocab_size]` after the last token, by the model without a cache on the kept tokens.

    Args:
        model: one of `MULTIMODAL`.
        inputs: its prompt.
        sequence: all tokens so far, `[1, length]`.
        embeddings: theirs, `[1, length, hidden_size]`.
        window_length, num_sinks: the window.
    """
    length = sequence.shape[1]
    kept = [*range(num_sinks), *range(max(length - window_length, 0) + num_sinks, length)]
    if "cross_attention_mask" in inputs:  # attention to the image in a layer of its own: the tokens are words
        mask = torch.ones(1, len(kept), 1, 1, dtype=torch.long)
        given = {**inputs, "input_ids": sequence[:, kept], "attention_mask": mask[:, :, 0, 0]}
        words: Tensor = model(**{**given, "cross_attention_mask": mask}, use_cache=False).logits[0, -1]
        return words
    arguments = {}
    if "image_grid_thw" in inputs:
        types = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, length - inputs["input_ids"].shape[1]))
        grid = inputs["image_grid_thw"]
        positions = model.model.get_rope_index(sequence, mm_token_type_ids=types, image_grid_thw=grid)[0][:, :, kept]
        gap = positions[:, :, num_sinks:].min() - positions[:, :, :num_sinks].max() - 1
        arguments["position_ids"] = positions - gap * (torch.arange(len(kept)) >= num_sinks)
    output = model.get_decoder()(inputs_embeds=embeddings[:, kept], use_cache=False, **arguments)
    logits = model.get_output_embeddings()(output.last_hidden_state[0, -1])
    assert isinstance(logits, Tensor)
    return logits
