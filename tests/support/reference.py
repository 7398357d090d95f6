"""The rule of the paper for a Llama, written plainly and slowly; it shares no code with the library.

Every layer keeps the value of a token and its key without rotation. At each step the kept tokens are numbered 0, 1, 2,
... inside the cache, and their keys are rotated by this number (StreamingLLM, arXiv 2309.17453, section 3.2).
"""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel


class StreamingLlama:
    def __init__(self, model: PreTrainedModel, window_length: int, num_sink_tokens: int) -> None:
        assert isinstance(model.config, LlamaConfig)
        self.model: Any = model
        self.window_length = window_length
        self.num_sink_tokens = num_sink_tokens
        self.kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(model.config.num_hidden_layers)]
        self.heads = model.config.num_attention_heads
        self.head_dim = model.config.hidden_size // self.heads
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        assert model.config.rope_parameters is not None
        theta: Any = model.config.rope_parameters["rope_theta"]
        self.inv_freq = theta**-exponents

    @torch.no_grad()
    def step(self, token: int) -> Tensor:
        """Logits `[vocab]` after one more token."""
        decoder = self.model.model
        hidden = decoder.embed_tokens.weight[token]
        for layer, kept in zip(decoder.layers, self.kept, strict=True):
            hidden = hidden + self.attend(layer.self_attn, layer.input_layernorm(hidden), kept)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        logits: Tensor = self.model.lm_head(decoder.norm(hidden))
        return logits

    def attend(self, attention: Any, hidden: Tensor, kept: list[tuple[Tensor, Tensor]]) -> Tensor:
        if len(kept) == self.window_length:
            del kept[self.num_sink_tokens]
        key, value = attention.k_proj(hidden), attention.v_proj(hidden)
        kept.append((key.view(-1, self.head_dim), value.view(-1, self.head_dim)))

        places = torch.arange(len(kept))
        query = self.rotate(attention.q_proj(hidden).view(self.heads, 1, self.head_dim), places[-1:])
        keys = self.rotate(torch.stack([key for key, _ in kept], dim=1), places)
        values = torch.stack([value for _, value in kept], dim=1)
        group = self.heads // keys.shape[0]
        scores = query @ keys.repeat_interleave(group, dim=0).mT / self.head_dim**0.5
        output: Tensor = attention.o_proj((scores.softmax(dim=-1) @ values.repeat_interleave(group, dim=0)).flatten())
        return output

    def rotate(self, states: Tensor, positions: Tensor) -> Tensor:
        """States `[heads, tokens, head_dim]` rotated to their positions `[tokens]`."""
        angles = positions[:, None] * self.inv_freq
        cos, sin = angles.cos().to(states.dtype), angles.sin().to(states.dtype)
        first, second = states.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
