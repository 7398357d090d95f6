"""In a batch with left padding every row gets the logits of the row alone."""

import copy
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

from attention_sinks import sink_generate

from ..support.models import ARCHITECTURES, CACHE, VOCAB_SIZE, build_model, random_ids, relative_error, tiny_model
from ..support.streams import NEW_STREAM, OPTIONS, W, padded, scored

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_of_very_different_length_get_the_logits_of_each_row_alone(architecture: str) -> None:
    model = tiny_model(architecture, num_hidden_layers=2)
    rows, ids, mask = padded([5, 14, 40])
    output: Any = sink_generate(model, ids, attention_mask=mask, max_new_tokens=25, **NEW_STREAM)
    for i, row in enumerate(rows):
        text = output.sequences[i : i + 1, 40 - row.shape[1] :]
        logits = torch.stack([step[i] for step in output.logits])[None]
        assert relative_error(logits, scored(model, text, row.shape[1])) < 1e-4


def test_below_the_window_padded_rows_give_the_text_of_a_dynamic_cache() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    _, ids, mask = padded([4, 9])
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **{CACHE: DynamicCache(config=model.config)}, eos_token_id=None, **options)
    output: Any = sink_generate(model, ids, window_length=W, eos_token_id=None, **options)
    assert torch.equal(output, expected)


def test_padding_is_inferred_where_generate_infers_it() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    _, ids, mask = padded([4, 9])
    options = {**NEW_STREAM, "eos_token_id": VOCAB_SIZE - 1, "max_new_tokens": 20}
    expected: Any = sink_generate(model, ids, attention_mask=mask, **options)
    output: Any = sink_generate(model, ids, **options)
    assert torch.equal(output.sequences, expected.sequences)


def test_rows_selected_past_the_window_stay_exact() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    rows, ids, mask = padded([4, 9, 30])
    output: Any = sink_generate(model, ids, attention_mask=mask, max_new_tokens=10, **NEW_STREAM)
    cache, chosen = output[CACHE], [2, 0]
    cache.batch_select_indices(torch.tensor(chosen))
    more: Any = sink_generate(model, output.sequences[chosen], past_key_values=cache, max_new_tokens=20, **OPTIONS)
    for i, row in enumerate(chosen):
        text = more.sequences[i : i + 1, 30 - rows[row].shape[1] :]
        expected = scored(model, text, rows[row].shape[1])[:, 10:]
        assert relative_error(torch.stack([step[i] for step in more.logits])[None], expected) < 1e-4


@pytest.mark.parametrize("steps", [3, 20, 40])
def test_compact_does_not_change_the_logits_of_padded_rows(steps: int) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    _, ids, mask = padded([4, 9, 30])
    output: Any = sink_generate(model, ids, attention_mask=mask, max_new_tokens=steps, **NEW_STREAM)
    cache, other = output[CACHE], copy.deepcopy(output[CACHE])
    cache.compact()
    assert cache.get_seq_length() == cache.kept_length == W
    last = output.sequences[:, -1:]
    expected: Any = sink_generate(model, last, past_key_values=other, max_new_tokens=20, **OPTIONS)
    actual: Any = sink_generate(model, last, past_key_values=cache, max_new_tokens=20, **OPTIONS)
    assert relative_error(torch.cat(actual.logits), torch.cat(expected.logits)) < 1e-4


def test_padding_that_a_chunked_layer_still_holds_stays_hidden() -> None:
    """A chunk of Llama 4 is longer than the window, so its layers hold padding that the rings have evicted."""
    config = transformers.Llama4TextConfig(
        num_hidden_layers=4, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=97,
        intermediate_size=32, intermediate_size_mlp=32, attention_chunk_size=256, max_position_embeddings=4096,
        num_local_experts=2, pad_token_id=0,
    )  # fmt: skip
    model = build_model(config)
    rows, ids, mask = padded([17, 20])
    new = random_ids(5, batch_size=2, seed=1).clamp(min=1)
    first: Any = sink_generate(model, ids, attention_mask=mask, max_new_tokens=4, **NEW_STREAM)
    batch: Any = sink_generate(model, new, past_key_values=first[CACHE], max_new_tokens=9, **OPTIONS)
    alone_first: Any = sink_generate(model, rows[0], max_new_tokens=4, **NEW_STREAM)
    cache = alone_first[CACHE]
    alone: Any = sink_generate(model, new[:1], past_key_values=cache, max_new_tokens=9, **OPTIONS)
    for in_batch, by_itself in zip(batch.logits, alone.logits, strict=True):
        assert relative_error(in_batch[:1], by_itself) < 1e-4
