"""Processors made of parts, nothing of which is downloaded, and frames for them."""

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, Qwen2_5_VLProcessor, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from attention_sinks.load import tiny_vision_model

from .grids import grid_model
from .tokenizer import END, byte_tokenizer

# Like that of Qwen2-VL: the media of a message where they stand, a text as it is.
GRID_TEMPLATE = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n"
    "{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GRID_TOKENS = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
_PATCHES: dict[str, Any] = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
_SIZES = {"shortest_edge": 8 * 8, "longest_edge": 64 * 64}


class VideoProcessor:
    """Makes patches of two frames of a video, as that of Qwen2-VL, which needs torchvision."""

    merge_size = 2
    temporal_patch_size = 2
    model_input_names = ("pixel_values_videos", "video_grid_thw")

    def __call__(self, videos: Any, **options: Any) -> BatchFeature:
        pixels, grids = [], []
        for video in videos[0] if isinstance(videos[0], list) else videos:
            frames = torch.as_tensor(np.asarray(video)).permute(0, 3, 1, 2).float() / 255
            t, h, w = len(frames) // 2, frames.shape[2] // 4, frames.shape[3] // 4
            patches = frames.view(t, 2, 3, h // 2, 2, 4, w // 2, 2, 4).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
            pixels.append(patches.reshape(t * h * w, -1))
            grids.append([t, h, w])
        values: dict[str, Any] = {"pixel_values_videos": torch.cat(pixels), "video_grid_thw": torch.tensor(grids)}
        if options.get("return_metadata"):
            values["video_metadata"] = [SimpleNamespace(sampled_fps=2.0) for _ in grids]
        return BatchFeature(values)


class _OfParts:
    """A processor that notes the grids of images and videos."""

    def check_argument_for_proper_class(self, name: str, argument: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = super().__call__(*args, **kwargs)  # type: ignore[misc]
        noted = vars(self).setdefault("noted", {"image_grid_thw": [], "video_grid_thw": []})
        for name, grids in noted.items():
            grids += [output[name]] if name in output else []
        return output


def grid_processor(name: str = "qwen2_5_vl", template: str | None = GRID_TEMPLATE) -> Any:
    """A processor of Qwen2-VL or Qwen2.5-VL with a token for each byte, and one for each 8 x 8 pixels."""
    tokenizer = byte_tokenizer(None)
    tokenizer.add_special_tokens({"additional_special_tokens": GRID_TOKENS})
    processor_class: Any = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor}[name]
    # Transformers asks for the class of a video processor, which it does not have without torchvision.
    made_of_parts = type(processor_class.__name__, (_OfParts, processor_class), {})
    return made_of_parts(
        image_processor=Qwen2VLImageProcessorPil(**_PATCHES, size=_SIZES),
        tokenizer=tokenizer,
        video_processor=VideoProcessor(),
        chat_template=template,
    )


@cache
def llava_model() -> Any:
    """The model of `llava_processor`, which has one text layer, with weights like those of `grid_model`."""
    model: Any = tiny_vision_model()[0]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "vision" not in name:
                weight.mul_(4)
    return model


def llava_processor() -> Any:
    """A processor of LLaVA with a token for each byte, and 16 for each image."""
    return tiny_vision_model()[1]


def frame(number: int, height: int = 16, width: int = 16) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A picture of noise, `[height, width, 3]`; each number is another one."""
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def grid_chat_model(name: str = "qwen2_5_vl") -> Any:
    """A random model with one text layer and the vocabulary of `grid_processor`."""
    tokenizer = grid_processor().tokenizer
    tokens = tuple(tokenizer.convert_tokens_to_ids(GRID_TOKENS))
    return grid_model(name, tokens, vocab_size=len(tokenizer), eos_token_id=END)
