"""No step moves a tensor from one device to another."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from attention_sinks import SinkCache

from ..support.counting import Transfers
from ..support.inside import buffers, windowed_chunk, windowed_sizes
from ..support.models import build_config
from ..support.streams import S, W


def states_on(device: str, batch_size: int, query_length: int) -> tuple[Tensor, Tensor]:
    key_states, value_states = torch.rand(2, batch_size, 2, query_length, 16, device=device)
    return key_states, value_states


@pytest.mark.parametrize("chunks", [[1], pytest.param([1, 3], marks=pytest.mark.exhaustive), [40]], ids=str)
@pytest.mark.parametrize("windowed", [False, True], ids=["", "windowed"])
@pytest.mark.parametrize("pads", [None, [7, 0]], ids=["", "padded"])
def test_no_step_moves_a_tensor_to_another_device(pads: list[int] | None, windowed: bool, chunks: list[int]) -> None:
    """One of the two devices here computes nothing, but tensors lie on it as on any other."""
    devices = ["cpu", "cpu", "meta", "meta"]
    mask = None if pads is None else (torch.arange(20) >= torch.tensor(pads)[:, None]).long()
    cache = SinkCache(build_config("llama", num_hidden_layers=4), W, S, attention_mask=mask)
    transfers = Transfers()
    for query_length in [20, *chunks * 50]:
        # The first step of each kind puts on each device what later steps need.
        if cache.get_seq_length() == 20 + sum(chunks):
            transfers.found.clear()
        # In a batch without padding a single token needs no window of its own.
        in_window = windowed and (query_length > 1 or pads is not None)
        sizes = windowed_sizes if in_window else SinkCache.get_mask_sizes
        with transfers:
            length, _ = sizes(cache, query_length, 0)
        with transfers, windowed_chunk(cache, query_length) if in_window else nullcontext():
            for layer_idx, device in enumerate(devices):
                for returned in cache.update(*states_on(device, 2, query_length), layer_idx):
                    assert returned.device.type == device
                    assert returned.shape[2] == length
    for layer, device in zip(cache.layers, devices, strict=True):
        assert {states.device.type for states in buffers(layer)} == {device}
    assert transfers.found == []
