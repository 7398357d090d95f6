"""Streams in several threads through one model do not affect each other."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_sinks import SinkCache, sink_generate

from ..support.models import build_config, build_model, random_ids
from ..support.streams import NEW_STREAM, S, W, by_token, prefilled


@pytest.mark.parametrize("architecture", ["llama", "gptj"])
def test_streams_in_several_threads_through_one_model_are_what_they_are_alone(architecture: str) -> None:
    """Each thread reads token by token, in chunks, and with `generate`; positions of GPT-J end at 40."""
    model = build_model(build_config(architecture, max_position_embeddings=40))

    @torch.no_grad()
    def streamed(seed: int) -> Tensor:
        ids = random_ids(150, seed=seed)
        logits = [by_token(model, ids[:, :39]), prefilled(model, ids, SinkCache(model.config, W, S), 7)]
        output: Any = sink_generate(model, ids[:, : 10 * seed + 5], max_new_tokens=100, **NEW_STREAM)
        return torch.cat([*logits, torch.stack(output.logits, dim=1)], dim=1)

    seeds = list(range(4))
    expected = [streamed(seed) for seed in seeds]
    with ThreadPoolExecutor(4) as pool:
        for output, alone in zip(pool.map(streamed, seeds), expected, strict=True):
            assert torch.equal(output, alone)
    assert "prepare_inputs_for_generation" not in vars(model)
