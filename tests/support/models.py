"""All tiny configs and random models of the tests."""

from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DeepseekV3Config,
    GemmaConfig,
    Glm4Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    Olmo2Config,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from attention_sinks.compat import cache_name

from .versions import HAS_LATER_MODELS

# The argument by which the installed version of transformers takes a cache, and the field in which it returns one.
CACHE = cache_name()

VOCAB_SIZE = 97

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}

DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}

# Latent attention and experts, as small as they go.
DEEPSEEK = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}

# name: config class and what differs from SIZES
ARCHITECTURES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama-linear": (LlamaConfig, {"rope_parameters": LINEAR_ROPE}),
    "llama-llama3": (LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
    "llama-yarn": (LlamaConfig, {"rope_parameters": YARN_ROPE}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "mistral-sliding": (MistralConfig, {"sliding_window": 64}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
    "phi3": (Phi3Config, {}),
    "phi": (PhiConfig, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "gpt_neox": (GPTNeoXConfig, {}),
    "gemma": (GemmaConfig, {"head_dim": 32}),
    "olmo2": (Olmo2Config, {}),
    "smollm3": (SmolLM3Config, {}),
    "cohere": (CohereConfig, {}),
    "glm4": (Glm4Config, {"head_dim": 32}),
    "gptj": (GPTJConfig, {"n_inner": 64, "rotary_dim": 8}),
    "deepseek_v3": (DeepseekV3Config, {**DEEPSEEK, "qk_head_dim": 16}),
    "mpt": (MptConfig, {"max_seq_len": 512}),
}

# Models whose layers differ from one another.
MIXED: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "sliding beside full": (
        Qwen2Config,
        {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}

# Models whose layers hold more than keys and values: states of convolutions or of linear attention, keys of an indexer.
LATER: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {}
if HAS_LATER_MODELS:
    LATER = {
        "deepseek_v32": (
            transformers.DeepseekV32Config,
            {
                **DEEPSEEK,
                "index_topk": 6,
                "index_head_dim": 16,
                "index_n_heads": 32,
            },
        ),
        "falcon_h1": (
            transformers.FalconH1Config,
            {
                "num_key_value_heads": 4,
                "head_dim": 16,
                "mamba_d_ssm": 64,
                "mamba_n_heads": 4,
                "mamba_d_head": 16,
                "mamba_d_state": 16,
            },
        ),
        "lfm2": (transformers.Lfm2Config, {"num_key_value_heads": 4, "layer_types": ["conv", "full_attention"]}),
        "qwen3_next": (
            transformers.Qwen3NextConfig,
            {
                "num_hidden_layers": 3,
                "num_key_value_heads": 4,
                "head_dim": 16,
                "layer_types": ["linear_attention", "full_attention", "linear_attention"],
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 2,
                "linear_key_head_dim": 16,
                "linear_value_head_dim": 16,
                "num_experts": 2,
                "num_experts_per_tok": 1,
                "moe_intermediate_size": 32,
            },
        ),
    }


def build_config(architecture: str, **changes: Any) -> PreTrainedConfig:
    config_class, differences = {**ARCHITECTURES, **MIXED, **LATER}[architecture]
    return config_class(**{**SIZES, **differences, **changes})


def build_model(config: PreTrainedConfig, scale: float = 4.0) -> Any:
    """A random model whose attention is so sharp that a wrong position changes the logits.

    With default weights attention is almost uniform. Matrices are scaled up; vectors, such as those of norms, vary.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(scale) if weight.ndim > 1 else weight.add_(torch.randn_like(weight) * 0.2)
    model.eval()
    return model


@cache
def tiny_model(architecture: str, num_hidden_layers: int | None = None) -> Any:
    """A model that tests share and must not change; of two layers, if the architecture does not say otherwise."""
    changes = {} if num_hidden_layers is None else {"num_hidden_layers": num_hidden_layers}
    return build_model(build_config(architecture, **changes))


def random_ids(length: int, batch_size: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB_SIZE, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest error, relative to the largest expected logit."""
    return float((actual - expected).abs().max() / expected.abs().max())
