"""A stream continues in further calls, which get the whole text or only the new tokens."""

import copy
from typing import Any

import pytest
import torch

from attention_sinks import sink_generate

from ..support.models import CACHE, random_ids, relative_error, tiny_model
from ..support.streams import NEW_STREAM, OPTIONS, by_token, padded, scored

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("lengths", [[10], [3, 12]], ids=["one row", "padded"])
def test_the_whole_text_and_the_new_tokens_alone_give_the_same_turn(lengths: list[int]) -> None:
    """Three turns past the window, with a mask of the whole text or without one."""
    model = tiny_model("llama", num_hidden_layers=2)
    _, ids, mask = padded(lengths)
    first: Any = sink_generate(model, ids, attention_mask=mask, max_new_tokens=12, **NEW_STREAM)
    whole, only = first[CACHE], copy.deepcopy(first[CACHE])
    masked = copy.deepcopy(only)
    text, text_mask = first.sequences, torch.nn.functional.pad(mask, (0, 12), value=1)
    for turn in range(3):
        said = random_ids(7, batch_size=len(lengths), seed=turn).clamp(min=1)
        unseen = torch.cat([text[:, -1:], said], dim=1)
        text, text_mask = torch.cat([text, said], dim=1), torch.nn.functional.pad(text_mask, (0, 7), value=1)
        manual = copy.deepcopy(whole)
        a: Any = sink_generate(
            model, text, past_key_values=whole, attention_mask=text_mask, max_new_tokens=9, **OPTIONS
        )
        b: Any = sink_generate(model, unseen, past_key_values=only, max_new_tokens=9, **OPTIONS)
        c: Any = sink_generate(
            model, unseen, past_key_values=masked, attention_mask=text_mask, max_new_tokens=9, **OPTIONS
        )
        assert torch.equal(a.sequences[:, text.shape[1] :], b.sequences[:, unseen.shape[1] :])
        assert torch.equal(a.sequences[:, text.shape[1] :], c.sequences[:, unseen.shape[1] :])
        positions = (text_mask.cumsum(1) - 1)[:, -8:]
        logits = model(unseen, attention_mask=text_mask, position_ids=positions, **{CACHE: manual}).logits[:, -1]
        assert relative_error(a.logits[0], logits) < 1e-5
        text, text_mask = a.sequences, torch.nn.functional.pad(text_mask, (0, 9), value=1)
    assert whole.get_seq_length() == only.get_seq_length() == text.shape[1] - 1


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_chunks_of_a_turn_are_exact_for_the_whole_text_and_for_new_tokens(chunk_size: int) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    rows, ids, mask = padded([3, 12])
    first: Any = sink_generate(model, ids, attention_mask=mask, prefill_chunk_size=4, max_new_tokens=12, **NEW_STREAM)
    cache, other = first[CACHE], copy.deepcopy(first[CACHE])
    said = random_ids(7, batch_size=2, seed=1).clamp(min=1)
    text, unseen = torch.cat([first.sequences, said], dim=1), torch.cat([first.sequences[:, -1:], said], dim=1)
    options: dict[str, Any] = {**OPTIONS, "prefill_chunk_size": chunk_size, "max_new_tokens": 9}
    a: Any = sink_generate(model, text, past_key_values=cache, **options)
    b: Any = sink_generate(model, unseen, past_key_values=other, **options)
    assert torch.equal(a.sequences[:, text.shape[1] :], b.sequences[:, unseen.shape[1] :])
    assert cache.get_seq_length() == other.get_seq_length() == a.sequences.shape[1] - 1
    for i, row in enumerate(rows):
        whole = a.sequences[i : i + 1, 12 - row.shape[1] :]
        expected = by_token(model, whole)[:, -10:-1]
        assert relative_error(torch.stack([step[i] for step in a.logits])[None], expected) < 1e-4


def test_beams_continue_a_greedily_generated_row_exactly() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    rows, ids, mask = padded([5, 12])
    first: Any = sink_generate(model, ids, attention_mask=mask, max_new_tokens=12, **NEW_STREAM)
    output: Any = sink_generate(
        model, first.sequences, past_key_values=first[CACHE], max_new_tokens=9, num_beams=3, **OPTIONS
    )
    for i, row in enumerate(rows):
        text = output.sequences[i : i + 1, 12 - row.shape[1] :]
        expected = scored(model, text, row.shape[1])[:, 12:].log_softmax(-1)
        steps = expected.gather(2, text[:, row.shape[1] + 12 :, None]).sum()
        assert abs(float(output.sequences_scores[i] - steps / 9)) < 1e-4


def test_position_ids_of_none_mean_the_positions_of_the_stream() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    first: Any = sink_generate(model, random_ids(20), max_new_tokens=4, **NEW_STREAM)
    copied = copy.deepcopy(first[CACHE])
    a: Any = sink_generate(model, random_ids(5), past_key_values=copied, position_ids=None, max_new_tokens=5, **OPTIONS)
    b: Any = sink_generate(model, random_ids(5), past_key_values=first[CACHE], max_new_tokens=5, **OPTIONS)
    assert torch.equal(torch.stack(a.logits), torch.stack(b.logits))
