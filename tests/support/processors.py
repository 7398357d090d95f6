"""Processors made of parts, nothing of which is downloaded, and frames for them."""

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import (
    BatchFeature,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Qwen2_5_VLProcessor,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
    WhisperFeatureExtractor,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
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
    """A processor of Qwen2-VL and its kin, with a token for each byte and one for each 8 x 8 pixels."""
    tokenizer = byte_tokenizer(None)
    tokenizer.add_special_tokens({"additional_special_tokens": GRID_TOKENS})
    processor_class: Any = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor}.get(name, Qwen3VLProcessor)
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


# What models with other processors write around images and sound.
_SOUND = "<|audio_bos|><|AUDIO|><|audio_eos|>"
_OTHER_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
    "{% if part.type == 'image' %}<begin>{% elif part.type == 'audio' %}"
    + _SOUND
    + "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_SMALL |= {"max_position_embeddings": 512, "eos_token_id": END, "bos_token_id": 0}


def gemma_processor() -> Any:
    """A processor of Gemma 3, whose image tokens see each other, with 4 for each image."""
    tokenizer: Any = byte_tokenizer(None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<begin>", "<end>", "<img>"]})
    for name, token in (("boi", "<begin>"), ("eoi", "<end>"), ("image", "<img>")):
        setattr(tokenizer, f"{name}_token", token)
        setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    pixels = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    return Gemma3Processor(pixels, tokenizer, chat_template=_OTHER_TEMPLATE, image_seq_length=4)


@cache
def gemma_model(num_layers: int = 1) -> Any:
    """A random model with the vocabulary of `gemma_processor`."""
    tokenizer = gemma_processor().tokenizer
    layers: dict[str, Any] = {"num_hidden_layers": num_layers, "layer_types": ["full_attention"] * num_layers}
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**_SMALL, **layers, "head_dim": 16, "vocab_size": len(tokenizer), "pad_token_id": None},
        vision_config={**tower, "image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    return _sharp(Gemma3ForConditionalGeneration, config, [tokenizer.image_token_id])


def sound_processor() -> Any:
    """A processor of Qwen2-Audio."""
    tokenizer = byte_tokenizer(None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]})
    features = WhisperFeatureExtractor(8, sampling_rate=16_000, hop_length=32, chunk_length=1, n_fft=64)
    return Qwen2AudioProcessor(features, tokenizer, chat_template=_OTHER_TEMPLATE)


@cache
def sound_model() -> Any:
    """A random model with the vocabulary of `sound_processor`."""
    processor = sound_processor()
    token = processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    tower = {"num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 32}
    text = {**_SMALL, "model_type": "qwen2", "num_hidden_layers": 1, "vocab_size": len(processor.tokenizer)}
    config = Qwen2AudioConfig(
        audio_config={**tower, "max_source_positions": processor.feature_extractor.nb_max_frames // 2},
        text_config=text,
        audio_token_index=token,
    )
    return _sharp(Qwen2AudioForConditionalGeneration, config, [token])


def _sharp(model_class: Any, config: Any, silent: list[int]) -> Any:
    """A random model with weights like those of `grid_model`, that never says some tokens."""
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "vision" not in name and "audio" not in name:
                weight.mul_(4)
    model.generation_config.suppress_tokens = silent
    return model


def sound(number: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A tenth of a second of noise."""
    return np.random.default_rng(number).normal(size=1600).astype(np.float32)


def frame(number: int, height: int = 16, width: int = 16) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A picture of noise, `[height, width, 3]`; each number is another one."""
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def grid_chat_model(name: str = "qwen2_5_vl") -> Any:
    """A random model with one text layer and the vocabulary of `grid_processor`."""
    tokenizer = grid_processor().tokenizer
    tokens = tuple(tokenizer.convert_tokens_to_ids(GRID_TOKENS))
    return grid_model(name, tokens, vocab_size=len(tokenizer), eos_token_id=END)
