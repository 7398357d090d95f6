"""A text that is read in chunks gives the logits of the same text read token by token."""

import copy
from typing import Any

import pytest
import torch

from attention_sinks import SinkCache, sink_generate

from ..support.models import CACHE, build_config, build_model, random_ids, relative_error, tiny_model
from ..support.streams import NEW_STREAM, S, W, by_token, padded, prefilled, scored

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("chunk_size", [1, 7, 50, 100])
@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "deepseek_v3", "smollm3", "mistral-sliding"])
def test_chunks_give_the_logits_of_single_tokens(architecture: str, chunk_size: int, implementation: str) -> None:
    model = copy.deepcopy(tiny_model(architecture, num_hidden_layers=2))
    rows, ids, mask = padded([9, 30, 70])
    expected = [by_token(model, row) for row in rows]
    model.set_attn_implementation(implementation)
    cache = SinkCache(model.config, W, S, attention_mask=mask)
    logits = prefilled(model, ids, cache, chunk_size)
    for i, row in enumerate(rows):
        assert relative_error(logits[i : i + 1, 70 - row.shape[1] :], expected[i]) < 1e-4
    assert cache.get_seq_length() == 70
    assert cache.kept_length == W
    # The stream continues exactly.
    whole = torch.ones(3, 71, dtype=torch.long)
    whole[:, :70] = mask
    positions = whole.sum(dim=1, keepdim=True) - 1
    logits = model(random_ids(1).repeat(3, 1), attention_mask=whole, position_ids=positions, **{CACHE: cache}).logits
    model.set_attn_implementation("sdpa")
    for i, row in enumerate(rows):
        alone = by_token(model, torch.cat([row, random_ids(1)], dim=1))[:, -1:]
        assert relative_error(logits[i : i + 1], alone) < 1e-4


@pytest.mark.parametrize("chunk_size", [7, 50])
def test_chunks_are_exact_where_the_model_would_hide_sinks_from_their_last_queries(chunk_size: int) -> None:
    """The window of the model is hardly wider than ours, but each query of a chunk sees ours."""
    model = build_model(build_config("mistral-sliding", num_hidden_layers=2, sliding_window=W + 2))
    ids = random_ids(60)
    logits = prefilled(model, ids, SinkCache(model.config, W, S), chunk_size)
    assert relative_error(logits, by_token(model, ids)) < 1e-4


@pytest.mark.parametrize("num_sink_tokens", [0, 4, 15])
def test_chunks_are_exact_with_no_sinks_and_with_almost_only_sinks(num_sink_tokens: int) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    ids = random_ids(60)
    expected = by_token(model, ids, SinkCache(model.config, W, num_sink_tokens))
    logits = prefilled(model, ids, SinkCache(model.config, W, num_sink_tokens), 13)
    assert relative_error(logits, expected) < 1e-4


@pytest.mark.parametrize("before", [1, 3, 5, 11])
def test_chunks_are_exact_after_a_few_single_tokens(before: int) -> None:
    """Also after fewer tokens than there are sinks."""
    model, ids = tiny_model("llama", num_hidden_layers=2), random_ids(60)
    cache = SinkCache(model.config, W, S)
    first, rest = prefilled(model, ids[:, :before], cache, 1), prefilled(model, ids[:, before:], cache, 13)
    assert relative_error(torch.cat([first, rest], dim=1), by_token(model, ids)) < 1e-4


def test_chunks_after_a_crop_give_the_logits_of_single_tokens() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    cache = SinkCache(model.config, W, S)
    by_token(model, random_ids(40), cache)
    cache.crop(-5)
    other = copy.deepcopy(cache)
    more = random_ids(20, seed=1)
    assert relative_error(prefilled(model, more, cache, 8), by_token(model, more, other)) < 1e-4


def test_generation_after_a_chunked_prompt_equals_generation_after_single_tokens() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    rows, ids, mask = padded([8, 50])
    for options in ({}, {"num_beams": 2}):
        output: Any = sink_generate(
            model, ids, attention_mask=mask, prefill_chunk_size=11, max_new_tokens=20, **{**NEW_STREAM, **options}
        )
        for i, row in enumerate(rows):
            text = output.sequences[i : i + 1, 50 - row.shape[1] :]
            expected = by_token(model, text)[:, row.shape[1] - 1 : -1]
            if not options:
                assert relative_error(torch.stack([step[i] for step in output.logits])[None], expected) < 1e-4
            else:
                steps = expected.log_softmax(-1).gather(2, text[:, row.shape[1] :, None]).sum()
                assert abs(float(output.sequences_scores[i] - steps / 20)) < 1e-4


def test_a_prompt_longer_than_the_model_positions_is_read_in_chunks_by_default() -> None:
    model = build_model(build_config("llama", num_hidden_layers=2, max_position_embeddings=64))
    ids = random_ids(65).clamp(min=1)
    output: Any = sink_generate(model, ids, max_new_tokens=5, **NEW_STREAM)
    expected = by_token(model, output.sequences)[:, 64:-1]
    assert relative_error(torch.stack(output.logits, dim=1), expected) < 1e-4
    output = sink_generate(
        model, ids[:, :64], max_new_tokens=5, **NEW_STREAM
    )  # a shorter prompt is read in one forward pass
    assert relative_error(torch.stack(output.logits, dim=1), scored(model, output.sequences, 64)) < 1e-4


def test_a_model_whose_mask_cannot_be_replaced_reads_single_tokens() -> None:
    model = build_model(build_config("mpt", num_hidden_layers=2, max_seq_len=512))
    with pytest.raises(NotImplementedError, match=r"`prefill_chunk_size` must be 1 for this 'mpt' model .* got 5"):
        sink_generate(model, random_ids(30).clamp(min=1), prefill_chunk_size=5, max_new_tokens=5, **NEW_STREAM)
    output: Any = sink_generate(
        model, random_ids(30).clamp(min=1), prefill_chunk_size=1, max_new_tokens=5, **NEW_STREAM
    )
    expected = by_token(model, output.sequences)[:, 29:-1]
    assert relative_error(torch.stack(output.logits, dim=1), expected) < 1e-4
