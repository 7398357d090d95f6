"""Keys and values that show which token they belong to, and at which position it stands."""

import torch
from torch import Tensor

from attention_sinks import SinkCache

from .inside import derive_positions
from .models import build_config

CONFIG = build_config("llama", num_hidden_layers=2)
HEADS, HEAD_DIM = 2, 16
ROTATION = derive_positions(CONFIG, [0]).rotations[0]
assert ROTATION is not None


def states_of(tokens: list[int], batch_size: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Keys and values of tokens: token `t` stands at position `t`, and all its values are `t`.

    Without rotation all keys of a row would be equal, so that keys show the rotation and nothing else.
    """
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(batch_size, HEADS, 1, HEAD_DIM, generator=generator).to(dtype)
    assert ROTATION is not None
    keys = torch.cat([ROTATION.rotate(base, token) for token in tokens], dim=2)
    rows = 1000.0 * torch.arange(batch_size)[:, None, None, None]
    values = (rows + torch.tensor(tokens)[:, None]).expand(batch_size, HEADS, len(tokens), HEAD_DIM)
    return keys, values.to(dtype)


@torch.no_grad()
def update(cache: SinkCache, tokens: list[int], batch_size: int = 1) -> tuple[Tensor, Tensor]:
    """Let every layer take the states of some tokens; returns what the last layer returns."""
    keys, values = states_of(tokens, batch_size)
    for layer_idx in range(len(cache)):
        returned = cache.update(keys, values, layer_idx)
    return returned


def tokens_in(values: Tensor) -> list[int]:
    """The tokens that the values of a batch of one row belong to."""
    return [int(token) for token in values[0, 0, :, 0]]
