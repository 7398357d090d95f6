"""Logits with a full SinkCache equal those of oracles that know nothing about it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attention_sinks import SinkCache

from ..support.models import ARCHITECTURES, CACHE, build_config, build_model, random_ids, relative_error, tiny_model
from ..support.reference import StreamingLlama

EDGES = [(16, 4), (16, 0), (16, 15), (2, 1), (1, 0)]


def without_cache(model: Any, ids: Tensor, held: list[int], new: list[int]) -> Tensor:
    """Logits of the `new` tokens if the model reads exactly the `held` tokens and these, without a cache."""
    logits: Tensor = model(ids[:, held + new], use_cache=False).logits[:, -len(new) :]
    return logits


def kept(seen: int, window_length: int, num_sink_tokens: int) -> list[int]:
    """The tokens that a window keeps of `seen` tokens: the first and the last ones."""
    tokens = list(range(seen))
    if seen <= window_length:
        return tokens
    return tokens[:num_sink_tokens] + tokens[seen - (window_length - num_sink_tokens) :]


@pytest.mark.parametrize(("window_length", "num_sink_tokens"), EDGES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_one_layer_decodes_as_if_only_the_kept_tokens_existed(
    architecture: str, window_length: int, num_sink_tokens: int
) -> None:
    """In one layer keys and values depend on their token alone, so evicted tokens leave no trace."""
    model = tiny_model(architecture, num_hidden_layers=1)
    ids = random_ids(3 * window_length + 5, batch_size=2)
    cache = SinkCache(model.config, window_length, num_sink_tokens)
    for token in range(ids.shape[1]):
        logits = model(ids[:, token : token + 1], **{CACHE: cache}).logits
        held = kept(token + 1, window_length, num_sink_tokens)
        assert relative_error(logits, without_cache(model, ids, held[:-1], held[-1:])) < 1e-4


@pytest.mark.parametrize(("window_length", "num_sink_tokens"), EDGES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_one_layer_reads_a_chunk_after_the_window_of_its_first_token(
    architecture: str, window_length: int, num_sink_tokens: int
) -> None:
    model = tiny_model(architecture, num_hidden_layers=1)
    ids = random_ids(70, batch_size=2)
    cache = SinkCache(model.config, window_length, num_sink_tokens)
    seen = 0
    for length in (7, 2, 13, 1, 5, 20, 3, 1, 1, 9):
        new = list(range(seen, seen + length))
        logits = model(ids[:, new], **{CACHE: cache}).logits
        held = kept(seen + 1, window_length, num_sink_tokens)[:-1] if seen else []
        assert relative_error(logits, without_cache(model, ids, held, new)) < 1e-4
        seen += length


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_a_first_prompt_longer_than_the_window_gets_full_attention(architecture: str) -> None:
    model = tiny_model(architecture, num_hidden_layers=1)
    ids = random_ids(51)
    cache = SinkCache(model.config, window_length=16, num_sink_tokens=4)
    prompt, token = ids[:, :50], ids[:, 50:]
    assert relative_error(model(prompt, **{CACHE: cache}).logits, model(prompt, use_cache=False).logits) < 1e-5
    assert cache.kept_length == 16
    held = kept(51, 16, 4)
    expected = without_cache(model, ids, held[:-1], held[-1:])
    assert relative_error(model(token, **{CACHE: cache}).logits, expected) < 1e-4


@pytest.mark.parametrize(("window_length", "num_sink_tokens"), EDGES)
@torch.no_grad()
def test_many_layers_follow_the_papers_rule(window_length: int, num_sink_tokens: int) -> None:
    """In several layers the states of a kept token depend on evicted tokens: only the reference knows how."""
    config = build_config("llama", num_hidden_layers=4)
    model = build_model(config, scale=2.0)
    reference = StreamingLlama(build_model(config, scale=2.0).double(), window_length, num_sink_tokens)
    cache = SinkCache(config, window_length, num_sink_tokens)
    ids = random_ids(400)
    for token in range(ids.shape[1]):
        logits = model(ids[:, token : token + 1], **{CACHE: cache}).logits[0, 0]
        assert relative_error(logits, reference.step(int(ids[0, token])).float()) < 1e-4


@pytest.mark.parametrize("back", [1, 5, 12])
@torch.no_grad()
def test_after_a_crop_the_next_tokens_attend_to_the_tokens_still_held(back: int) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    ids = random_ids(60)
    cache = SinkCache(model.config, window_length=16, num_sink_tokens=4)
    for token in range(40):
        model(ids[:, token : token + 1], **{CACHE: cache})
    cache.crop(-back)
    held = [token for token in kept(40, 16, 4) if token < 40 - back]
    for token in range(40 - back, 60):
        logits = model(ids[:, token : token + 1], **{CACHE: cache}).logits
        held = held[:4] + held[4:][-11:]
        assert relative_error(logits, without_cache(model, ids, held, [token])) < 1e-4
        held.append(token)
