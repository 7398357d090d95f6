"""Tiny random models that give images positions on a grid (M-RoPE), their prompts, and the rule stated plainly."""

from functools import cache
from typing import Any, Self

import torch
import transformers
from torch import Tensor
from torch.nn.functional import pad

from .versions import RECORDS_PAST

IMAGE, VIDEO, START, END = 90, 91, 92, 93
_PATCH = {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3}
_TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_TOWER = {"depth": 1, "num_heads": 2, "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 64, **_PATCH}
# By name: the class of the model, and what its parts have beside the common settings.
_KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", {}, {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", {}, {"window_size": 16, "fullatt_block_indexes": [0]}),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        {},
        {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
    ),
    "qwen3_5": (
        "Qwen3_5ForConditionalGeneration",
        {"layer_types": ["full_attention"], "rope_parameters": {**_ROPE, "partial_rotary_factor": 1.0}},
        {"num_position_embeddings": 64},
    ),
}
# Early transformers 5 has a cache class of its own for Qwen3.5.
GRID_MODELS = [name for name in _KINDS if name != "qwen3_5" or RECORDS_PAST]
# Early transformers 5 multiplies where an image of Qwen2.5-VL starts with the rate of its frames.
STARTS_AT_TEXT = [name for name in GRID_MODELS if name != "qwen2_5_vl" or RECORDS_PAST]


@cache
def grid_model(name: str, tokens: tuple[int, int, int, int] = (IMAGE, VIDEO, START, END), **changes: Any) -> Any:
    """Return a model with one text layer: the states of a token then depend on that token alone.

    `tokens`: those of images, of videos, and around both. `changes`: of its text.
    """
    class_name, text, tower = _KINDS[name]
    image, video, start, end = tokens
    model_class: Any = getattr(transformers, class_name)
    config = model_class.config_class(
        text_config={**_TEXT, "rope_parameters": _ROPE, **text, **changes},
        vision_config={**_TOWER, **tower},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter_name, weight in model.named_parameters():
            if weight.ndim > 1 and "visual" not in parameter_name:
                weight.mul_(4)  # default weights make attention so flat that a wrong position hardly shows
    model.generation_config.suppress_tokens = [*tokens]
    return model


def picture(height: int, width: int, frames: int = 1) -> tuple[int, int, int]:
    """Return the grid of an image, in patches, of which two by two make a token."""
    return frames, 2 * height, 2 * width


def prompt(*parts: int | tuple[int, int, int], seed: int = 0, split: bool = False) -> dict[str, Any]:
    """Return the inputs of one row: a number of words, or an image with that grid (of several frames: a video).

    `split`: the frames of a video stand apart, as Qwen3-VL has them.
    """
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    pixels: dict[str, list[Tensor]] = {"image": [], "video": []}
    grids: dict[str, list[Any]] = {"image": [], "video": []}
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(1, 80, (part,), generator=generator).tolist()
            continue
        kind, token = ("image", IMAGE) if part[0] == 1 else ("video", VIDEO)
        frames, height, width = part
        size = height * width // 4
        ids += [START, *([token] * size + [END, START] * split) * (frames - 1), *[token] * size, END]
        pixels[kind].append(torch.randn(frames * height * width, 3 * 2 * 4 * 4, generator=generator))
        grids[kind].append(part)
    input_ids = torch.tensor([ids])
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    inputs["mm_token_type_ids"] = (input_ids == IMAGE).long() + 2 * (input_ids == VIDEO).long()
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if grids[kind]:
            inputs |= {name: torch.cat(pixels[kind]), f"{kind}_grid_thw": torch.tensor(grids[kind])}
    return inputs


class Recorder:
    """The embeddings that the text model is fed, in all passes inside, one row."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.embeddings: list[Tensor] = []

    def __enter__(self) -> Self:
        def record(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            self.embeddings.append(kwargs["inputs_embeds"])

        self._hook = self.model.model.language_model.register_forward_pre_hook(record, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


def coordinates(model: Any, input_ids: Tensor, *turns: dict[str, Any]) -> Tensor:
    """Return the positions of a whole text `[3, 1, length]`, by the model's own `get_rope_index`."""
    given = {
        name: torch.cat([turn[name] for turn in turns if name in turn])
        for name in ("image_grid_thw", "video_grid_thw")
        if any(name in turn for turn in turns)
    }
    types = (input_ids == model.config.image_token_id).int() + 2 * (input_ids == model.config.video_token_id).int()
    positions: Tensor = model.model.get_rope_index(input_ids, mm_token_type_ids=types, **given)[0]
    return positions


@torch.no_grad()
def logits_of_window(model: Any, embeddings: Tensor, positions: Tensor, window_length: int, num_sinks: int) -> Tensor:
    """Return the logits `[vocab_size]` after the last token, by the model without a cache on the kept tokens.

    Args:
        model: a model with one text layer.
        embeddings: of all tokens so far, `[1, length, hidden_size]`.
        positions: theirs, `[3, 1, length]`.
        window_length, num_sinks: the window.
    """
    length = embeddings.shape[1]
    if length > window_length:
        kept = [*range(num_sinks), *range(length - window_length + num_sinks, length)]
        embeddings, positions = embeddings[:, kept], positions[:, :, kept].clone()
        end_of_sinks = positions[:, :, :num_sinks].max() + 1 if num_sinks else 0
        positions[:, :, num_sinks:] -= positions[:, :, num_sinks:].min() - end_of_sinks
    output = model.model.language_model(inputs_embeds=embeddings, position_ids=positions, use_cache=False)
    logits: Tensor = model.lm_head(output.last_hidden_state[0, -1])
    return logits


def padded(inputs: dict[str, Any], num_pads: int) -> dict[str, Any]:
    """Return the inputs of one row with pads on the left."""
    sides = {name: pad(inputs[name], (num_pads, 0)) for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    return {**inputs, **sides}
