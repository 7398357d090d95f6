"""What a cache holds, and that neither its memory nor the cost of a chunk grows with the stream."""

import pytest
import torch

from attention_sinks import SinkCache, sink_prefill

from ..support.counting import Operations, storages
from ..support.inside import buffers
from ..support.models import build_config, random_ids, tiny_model
from ..support.states import CONFIG, update
from ..support.streams import S, W

pytestmark = pytest.mark.usefixtures("no_grad")


def test_a_cache_holds_the_bytes_of_its_window() -> None:
    """At most 2 % more, for the sinks without rotation, which are kept in float32."""
    config = build_config("llama", num_hidden_layers=3)
    for dtype in (torch.float32, torch.bfloat16):
        cache = SinkCache(config, 256, S)
        for length in (300, 1, 1, 7, 1):
            states = torch.randn(1, 2, length, 16).to(dtype)
            for layer_idx in range(3):
                cache.update(states, states, layer_idx)
        held = storages([buffers(layer) for layer in cache.layers])
        assert sum(held.values()) <= 2 * 3 * 2 * 256 * 16 * dtype.itemsize * 1.02


def test_the_cost_of_a_chunk_does_not_depend_on_the_length_of_the_stream() -> None:
    model = tiny_model("llama")
    cache = SinkCache(model.config, W, S)
    costs = []
    for length in (100, 2991):  # both end at the same slot
        list(sink_prefill(model, random_ids(length), cache, chunk_size=100))
        with Operations() as operations:
            list(sink_prefill(model, random_ids(9), cache, chunk_size=9))
        costs.append((operations.names, operations.largest))
    assert costs[0] == costs[1]


def test_updates_past_the_window_write_in_place() -> None:
    """Neither single tokens nor chunks replace the buffers: their addresses stay."""
    cache = SinkCache(CONFIG, 8, 2)
    update(cache, [0])
    update(cache, [*range(10)])
    update(cache, [0])
    addresses = [[states.data_ptr() for states in buffers(layer)] for layer in cache.layers]
    for token in range(1, 40, 3):
        update(cache, [token])
        update(cache, [token + 1, token + 2])
    assert addresses == [[states.data_ptr() for states in buffers(layer)] for layer in cache.layers]
    keys, values = update(cache, [40])
    assert [keys.data_ptr(), values.data_ptr()] == addresses[-1][:2], (
        "a step returns the buffers themselves, not copies"
    )
