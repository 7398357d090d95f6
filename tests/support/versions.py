"""What earlier versions of transformers 5 lack."""

from typing import Any

import transformers
from transformers import Cache

# Caches can take an update back, whatever it evicted.
RECORDS_PAST = hasattr(Cache, "activate_past_recording")
# Layers with an indexer, and with linear attention beside attention.
HAS_LATER_MODELS = hasattr(transformers, "DeepseekV32Config")
# Prompt lookup may add a token to `max_new_tokens`, with any cache.
MAY_ADD_A_CANDIDATE = not hasattr(Cache, "get_max_length")


def checkpointing(model: Any) -> Any:
    """Let a model checkpoint activations, as in training."""
    name = "activation_checkpointing_enable"  # from transformers 5.24
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()
    return model.train()
