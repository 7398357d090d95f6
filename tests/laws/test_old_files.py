"""Files of format 1, which version 1.4 wrote, still load: what follows is bitwise what an unbroken stream gives.

`tests/data` holds a file for each stream, written by version 1.4.0. States are small whole numbers: the same on every
machine.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from attention_sinks import SinkCache

from ..support.inside import IndexedSinkLayer, announced, position_offset_of
from ..support.models import LATER, build_config

DATA = Path(__file__).parents[1] / "data"
W, S = 6, 2
SIZES: dict[str, Any] = {"num_hidden_layers": 2}

pytestmark = pytest.mark.usefixtures("no_grad")


def numbers(*shape: int, seed: int) -> Tensor:
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 7919 + seed * 104729) % 17 - 8).float().view(shape)


def heads_of(config: PreTrainedConfig, layer: Any) -> tuple[int, int, int]:
    """The number of heads of a layer, and the dimensions of its keys and values."""
    if isinstance(layer, IndexedSinkLayer):
        return 1, config.kv_lora_rank, config.qk_rope_head_dim
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads, dim, dim


def read(cache: SinkCache, config: PreTrainedConfig, lengths: list[int], rows: int = 1) -> list[Tensor]:
    """Everything that the layers return for chunks of these lengths."""
    returned = []
    for length in lengths:
        seed = cache.get_seq_length() + position_offset_of(cache)
        with announced(cache, length):
            for i, layer in enumerate(cache.layers):
                if hasattr(layer, "conv_states"):
                    returned.append(cache.update_conv_state(numbers(rows, 4, length, seed=seed), i, conv_kernel_size=3))
                    returned.append(cache.update_recurrent_state(numbers(rows, 2, 4, seed=seed), i).clone())
                if not hasattr(layer, "keys"):
                    continue
                num_heads, key_dim, value_dim = heads_of(config, layer)
                if isinstance(layer, IndexedSinkLayer):
                    returned.append(cache.update_indexer(numbers(rows, length, 16, seed=seed), i).clone())
                keys = numbers(rows, num_heads, length, key_dim, seed=seed + i)
                values = numbers(rows, num_heads, length, value_dim, seed=seed - i)
                returned += [states.clone() for states in cache.update(keys, values, i)]
    return returned


def started(name: str) -> tuple[SinkCache, PreTrainedConfig]:
    kind, _, age = name.partition("-")
    config = build_config(kind, **(SIZES if kind == "llama" else {}))
    mask = torch.tensor([[0, 0, 0, 1, 1], [1] * 5]) if age == "padded" else None
    window_length = 9 if kind == "sliding beside full" else W  # so that its sliding layers stay as they are
    cache, rows = SinkCache(config, window_length, S, attention_mask=mask), 1 if mask is None else 2
    if age == "pending":
        read(cache, config, [8, 1])
        cache.activate_past_recording()  # type: ignore[no-untyped-call]
        read(cache, config, [3])
    else:
        read(cache, config, [5, 1, 1, 3, 1, 1], rows)
    changes: dict[str, Callable[[], object]] = {"cropped": lambda: cache.crop(-2), "rebased": cache.rebase}
    changes.get(age, lambda: None)()
    return cache, config


NAMES = ["llama", "llama-cropped", "llama-rebased", "llama-padded", "sliding beside full"]
NAMES += [*sorted(LATER), "llama-pending"] if LATER else []


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_of_format_1_goes_on_bitwise(name: str) -> None:
    cache, config = started(name)
    loaded = SinkCache.load(DATA / f"format-1 {name}.safetensors", config)
    if name.endswith("pending"):
        for each in (cache, loaded):
            each.crop(-1)
            each.deactivate_past_recording()
    assert loaded.get_seq_length() == cache.get_seq_length()
    rows = loaded.num_rows
    for mine, others in zip(*(read(each, config, [1, 1, 3, 1, 9, 1], rows) for each in (loaded, cache)), strict=True):
        assert torch.equal(mine, others)
