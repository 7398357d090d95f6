"""Tiny random models of the supported architectures, and what the library must make of them."""

from functools import cache
from typing import Any

import torch
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

# The name by which the installed version of transformers takes and returns a cache.
CACHE = cache_name()

VOCAB_SIZE = 97

SIZES: dict[str, Any] = {
    "hidden_size": 64,
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
    "deepseek_v3": (
        DeepseekV3Config,
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "qk_head_dim": 16,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
        },
    ),
    "mpt": (MptConfig, {"max_seq_len": 512}),
}


def build_config(architecture: str, **changes: Any) -> PreTrainedConfig:
    config_class, differences = ARCHITECTURES[architecture]
    return config_class(**{**SIZES, **differences, **changes})


def build_model(config: PreTrainedConfig, scale: float = 4.0) -> Any:
    """A random model whose attention is sharp enough that a wrong position shows.

    Default weights make attention almost uniform, so matrices are scaled up; vectors, the norms' among them, vary.
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
def tiny_model(architecture: str, num_hidden_layers: int) -> Any:
    return build_model(build_config(architecture, num_hidden_layers=num_hidden_layers))


def random_ids(length: int, batch_size: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB_SIZE, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest error on the scale of the expected logits."""
    return float((actual - expected).abs().max() / expected.abs().max())
