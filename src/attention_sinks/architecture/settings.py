"""The settings of a config that say whose model a stream belongs to."""

import importlib
import json
import re
from typing import Any

from transformers import PreTrainedConfig

# Config fields that differ between configs of one model, or that do not affect cached states.
IRRELEVANT_FIELDS = (
    r"^_|_token_id$|dtype|version|use_cache|architectures|label|dropout|initializer|aux_loss|return_dict|problem_type|"
    r"^output_(attentions|hidden_states|router_logits)$|^is_(encoder_)?decoder$|tokenizer|auto_map|quantization|"
    r"chunk_size_feed_forward|pretraining_tp|implementation"
)


def config_state(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the settings of a config, as JSON has them."""
    settings: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return settings


def check_config(saved: dict[str, Any], config: PreTrainedConfig, demand: str) -> None:
    """Check that a stream belongs to the model of a config; the message of the error begins with `demand`.

    Raises:
        ValueError: naming the first setting that differs.
    """
    ours = config_state(config)
    for name in sorted(saved.keys() & ours.keys()):
        if ours[name] != saved[name] and not re.search(IRRELEVANT_FIELDS, name):
            raise ValueError(f"{demand}: {name} was {saved[name]!r:.80}, got {ours[name]!r:.80}.")


def own_text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of the text model that a model generates with; an encoder-decoder's own, which is refused."""
    return config if config.is_encoder_decoder else config.get_text_config(decoder=True)


def has_grid_positions(config: PreTrainedConfig) -> bool:
    """Return True if the model of a config gives images positions on a grid (M-RoPE), and not only its text model.

    Asks the classes beside the config whether one finds such positions; what the config says may be left to defaults.
    """
    if config.get_text_config(decoder=True) is config:
        return False
    try:
        module = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    except ImportError:  # a config without a model, or whose model lacks a package
        return False
    return any(hasattr(each, "get_rope_index") for each in vars(module).values() if isinstance(each, type))
