"""Every way in which `generate` decodes, against statements of truth: the row alone, token by token, re-scored."""

import copy
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, StoppingCriteriaList

from attention_sinks import SinkCache, sink_generate

from ..support.inside import position_offset_of
from ..support.models import (
    ARCHITECTURES,
    CACHE,
    VOCAB_SIZE,
    build_config,
    build_model,
    random_ids,
    relative_error,
    tiny_model,
)
from ..support.streams import NEW_STREAM, OPTIONS, S, W, by_token, padded, prefilled, scored
from ..support.versions import MAY_ADD_A_CANDIDATE, RECORDS_PAST

# Prompt lengths of the rows, and new tokens.
PROMPTS = {
    "below": ([7], 8),
    "across": ([10], 20),
    "past": ([30], 20),
    "padded-below": ([1, 3, 7], 8),
    "padded-across": ([2, 10, 14], 20),
    "padded-past": ([5, 18, 40], 30),
}

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("architecture", ["llama", "deepseek_v3"])
@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 3, "do_sample": True},
    ],
    ids=["greedy", "sampling", "several", "beams", "beam-sampling"],
)
def test_a_returned_row_is_what_it_is_alone(architecture: str, prompts: str, options: dict[str, Any]) -> None:
    model = tiny_model(architecture, num_hidden_layers=2)
    lengths, new = PROMPTS[prompts]
    rows, ids, mask = padded(lengths)
    torch.manual_seed(0)
    output: Any = sink_generate(model, ids, attention_mask=mask, max_new_tokens=new, **{**NEW_STREAM, **options})
    repeats = options.get("num_return_sequences", 1)
    for i, sequence in enumerate(output.sequences):
        row = rows[i // repeats]
        text = sequence[None, ids.shape[1] - row.shape[1] :]
        assert torch.equal(text[:, : row.shape[1]], row)
        expected = scored(model, text, row.shape[1])
        if "num_beams" in options:
            steps = expected.log_softmax(-1).gather(2, text[:, row.shape[1] :, None]).sum()
            if not options.get("do_sample"):  # a sampled beam's score is that of its warped distribution
                assert abs(float(output.sequences_scores[i] - steps / new)) < 1e-4
            transition = model.compute_transition_scores(
                output.sequences[i : i + 1], output.scores, output.beam_indices[i : i + 1]
            )
            assert abs(float(transition.sum() - steps)) < 1e-2
        else:
            logits = torch.stack([step[i] for step in output.logits])[None]
            assert relative_error(logits, expected) < 1e-4
            if not options:
                assert torch.equal(text[0, row.shape[1] :], expected[0].argmax(-1))
    cache = output[CACHE]
    assert cache.get_seq_length() == ids.shape[1] + new - 1
    assert cache.kept_length == min(W, cache.get_seq_length())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_of_very_different_length_are_what_they_are_alone(architecture: str) -> None:
    model = tiny_model(architecture, num_hidden_layers=2)
    rows, ids, mask = padded([5, 14, 40])
    output: Any = sink_generate(model, ids, attention_mask=mask, max_new_tokens=25, **NEW_STREAM)
    for i, row in enumerate(rows):
        text = output.sequences[i : i + 1, 40 - row.shape[1] :]
        logits = torch.stack([step[i] for step in output.logits])[None]
        assert relative_error(logits, scored(model, text, row.shape[1])) < 1e-4


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("chunk_size", [1, 7, 50, 100])
@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "deepseek_v3", "smollm3", "mistral-sliding"])
def test_chunks_are_what_single_tokens_are(architecture: str, chunk_size: int, implementation: str) -> None:
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
    # The stream goes on as if nothing had happened.
    whole = torch.ones(3, 71, dtype=torch.long)
    whole[:, :70] = mask
    positions = whole.sum(dim=1, keepdim=True) - 1
    logits = model(random_ids(1).repeat(3, 1), attention_mask=whole, position_ids=positions, **{CACHE: cache}).logits
    model.set_attn_implementation("sdpa")
    for i, row in enumerate(rows):
        alone = by_token(model, torch.cat([row, random_ids(1)], dim=1))[:, -1:]
        assert relative_error(logits[i : i + 1], alone) < 1e-4


@pytest.mark.parametrize("num_sink_tokens", [0, 4, 15])
def test_chunks_at_the_edges_of_the_number_of_sinks(num_sink_tokens: int) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    ids = random_ids(60)
    expected = by_token(model, ids, SinkCache(model.config, W, num_sink_tokens))
    logits = prefilled(model, ids, SinkCache(model.config, W, num_sink_tokens), 13)
    assert relative_error(logits, expected) < 1e-4


@pytest.mark.parametrize("before", [1, 3, 5, 11])
def test_chunks_may_follow_a_few_tokens(before: int) -> None:
    """Fewer than there are sinks, too."""
    model, ids = tiny_model("llama", num_hidden_layers=2), random_ids(60)
    cache = SinkCache(model.config, W, S)
    first, rest = prefilled(model, ids[:, :before], cache, 1), prefilled(model, ids[:, before:], cache, 13)
    assert relative_error(torch.cat([first, rest], dim=1), by_token(model, ids)) < 1e-4


def test_a_chunked_prompt_is_generated_from_as_one_fed_by_tokens() -> None:
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


def test_a_prompt_beyond_the_positions_of_the_model_is_read_in_chunks_by_default() -> None:
    model = build_model(build_config("llama", num_hidden_layers=2, max_position_embeddings=64))
    ids = random_ids(65).clamp(min=1)
    output: Any = sink_generate(model, ids, max_new_tokens=5, **NEW_STREAM)
    expected = by_token(model, output.sequences)[:, 64:-1]
    assert relative_error(torch.stack(output.logits, dim=1), expected) < 1e-4
    output = sink_generate(model, ids[:, :64], max_new_tokens=5, **NEW_STREAM)  # and a shorter one at once
    assert relative_error(torch.stack(output.logits, dim=1), scored(model, output.sequences, 64)) < 1e-4


def test_a_model_whose_masks_cannot_be_replaced_reads_single_tokens() -> None:
    model = build_model(build_config("mpt", num_hidden_layers=2, max_seq_len=512))
    with pytest.raises(NotImplementedError, match=r"`prefill_chunk_size` must be 1 for this 'mpt' model .* got 5"):
        sink_generate(model, random_ids(30).clamp(min=1), prefill_chunk_size=5, max_new_tokens=5, **NEW_STREAM)
    output: Any = sink_generate(
        model, random_ids(30).clamp(min=1), prefill_chunk_size=1, max_new_tokens=5, **NEW_STREAM
    )
    expected = by_token(model, output.sequences)[:, 29:-1]
    assert relative_error(torch.stack(output.logits, dim=1), expected) < 1e-4


@pytest.mark.skipif(not RECORDS_PAST, reason="prompt lookup of early transformers 5 needs an end-of-sequence token")
@pytest.mark.parametrize("helper", ["prompt lookup", "draft model"])
@pytest.mark.parametrize("layers", [1, 2])
def test_rejected_candidates_leave_no_trace(helper: str, layers: int) -> None:
    """Below the window the text is greedy's; past it the cache is what feeding the text token by token leaves.

    In one layer that is exact. In two, the later tokens of a candidate saw a little more than their window.
    """
    model = tiny_model("llama", num_hidden_layers=layers)
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 5}
    if helper == "draft model":
        options = {"assistant_model": copy.deepcopy(tiny_model("llama", num_hidden_layers=1))}
    ids = torch.tensor([[5, 6, 7] * 2])
    greedy: Any = sink_generate(model, ids, max_new_tokens=8, **NEW_STREAM)
    output: Any = sink_generate(model, ids, max_new_tokens=8, **NEW_STREAM, **options)
    assert torch.equal(output.sequences, greedy.sequences)
    output = sink_generate(model, ids, max_new_tokens=60, **NEW_STREAM, **options)
    cache = output[CACHE]
    assert cache.get_seq_length() == 65
    assert cache.kept_length == W
    if layers == 1:
        expected = by_token(model, output.sequences)[:, -1]
        positions = torch.tensor([[65]])
        logits = model(output.sequences[:, -1:], position_ids=positions, **{CACHE: cache}).logits[:, -1]
        assert relative_error(logits, expected) < 1e-4


@pytest.mark.parametrize("chunk_size", [None, 8])
def test_candidates_in_a_second_turn_are_those_of_greedy_decoding(chunk_size: int | None) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    options: dict[str, Any] = {**OPTIONS, "eos_token_id": VOCAB_SIZE - 1, "max_new_tokens": 12}
    for seed in range(4):
        pattern = random_ids(5, seed=seed).repeat(1, 4)
        helpers: list[dict[str, Any]] = [{}, {"prompt_lookup_num_tokens": 3}]
        for helper in helpers:
            cache = SinkCache(model.config, 200)
            first: Any = sink_generate(model, pattern, past_key_values=cache, **options)
            text = torch.cat([first.sequences, pattern], dim=1)
            more: Any = sink_generate(
                model, text, past_key_values=cache, prefill_chunk_size=chunk_size, **options, **helper
            )
            if not helper:
                expected = more.sequences
        more_than_asked = more.sequences.shape[1] - expected.shape[1]
        assert more_than_asked == 0 or (MAY_ADD_A_CANDIDATE and more_than_asked == 1)
        assert torch.equal(more.sequences[:, : expected.shape[1]], expected)
        assert cache.get_seq_length() == more.sequences.shape[1] - 1


def test_embeddings_instead_of_tokens() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    _, ids, mask = padded([4, 20])
    options: dict[str, Any] = {**NEW_STREAM, "attention_mask": mask, "max_new_tokens": 20}
    expected: Any = sink_generate(model, ids, **options)
    output: Any = sink_generate(model, inputs_embeds=model.get_input_embeddings()(ids), **options)
    assert torch.equal(output.sequences, expected.sequences[:, 20:])


def test_streamers_criteria_processors_and_attentions() -> None:
    model = copy.deepcopy(tiny_model("llama", num_hidden_layers=2))
    model.set_attn_implementation("eager")
    pieces: list[int] = []

    class Streamer(transformers.generation.streamers.BaseStreamer):
        def put(self, value: Tensor) -> None:
            pieces.extend(value.flatten().tolist())

        def end(self) -> None:
            pieces.append(-1)

    def never_seven(input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, torch.tensor([7]), -torch.inf)

    def at_thirty(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 30)

    output: Any = sink_generate(
        model, random_ids(10).clamp(min=1), max_new_tokens=50, output_attentions=True, streamer=Streamer(),
        logits_processor=[never_seven], stopping_criteria=StoppingCriteriaList([at_thirty]), **NEW_STREAM,
    )  # fmt: skip
    assert output.sequences.shape[1] == 30
    assert pieces == [*output.sequences[0].tolist(), -1]
    assert 7 not in output.sequences[0, 10:]
    assert [step[0].shape[-1] for step in output.attentions] == [10, *range(11, W + 1), *[W] * 13]
    started = time.monotonic()
    output = sink_generate(
        model,
        random_ids(10),
        max_new_tokens=100_000,
        max_time=0.2,
        **{**NEW_STREAM, "output_logits": False, "output_scores": False},
    )
    assert output.sequences.shape[1] > 10
    assert time.monotonic() - started < 60


# --- positions that must not grow for ever


ENDING: dict[str, tuple[str, dict[str, Any]]] = {
    "gptj": ("gptj", {"max_position_embeddings": 40}),
    "dynamic": ("llama", {"max_position_embeddings": 40, "rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "longrope": ("phi3", {"max_position_embeddings": 160, "original_max_position_embeddings": 40, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 40}}),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDING)
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 9}, {"num_beams": 2}], ids=["", "chunks", "beams"])
@pytest.mark.parametrize("lengths", [[10], [60], [4, 30, 70]], ids=["short", "long", "padded"])
def test_positions_are_wound_back_before_they_end(name: str, options: dict[str, Any], lengths: list[int]) -> None:
    """Five times past the end each step is that of one layer on the kept tokens alone, without a cache."""
    architecture, changes = ENDING[name]
    model = build_model(build_config(architecture, num_hidden_layers=1, **changes))
    rows, ids, mask = padded(lengths)
    output: Any = sink_generate(model, ids, attention_mask=mask, max_new_tokens=200, **{**NEW_STREAM, **options})
    for i, row in enumerate(rows):
        text = output.sequences[i : i + 1, ids.shape[1] - row.shape[1] :]
        steps = 0.0
        for t in range(200):
            seen = row.shape[1] + t
            held = list(range(seen)) if seen <= W else [*range(S), *range(seen - W + S, seen)]
            if seen > W and t == 0 and max(lengths) <= 39 and not options.get("prefill_chunk_size"):
                held = list(range(seen))  # the prompt is read at once
            logits = model(text[:, held], use_cache=False).logits[:, -1]
            if options.get("num_beams"):
                steps += float(logits.log_softmax(-1)[0, text[0, seen]])
            else:
                assert relative_error(output.logits[t][i : i + 1], logits) < 1e-3
        if options.get("num_beams"):
            assert abs(float(output.sequences_scores[i]) - steps / 200) < 1e-3
    if "num_beams" not in options:
        more: Any = sink_generate(model, output.sequences, past_key_values=output[CACHE], max_new_tokens=30, **OPTIONS)
        text = more.sequences[:1, ids.shape[1] - rows[0].shape[1] :]
        held = [*range(S), *range(text.shape[1] - 1 - W + S, text.shape[1] - 1)]
        assert relative_error(more.logits[-1][:1], model(text[:, held], use_cache=False).logits[:, -1]) < 1e-3


@pytest.mark.parametrize("name", ENDING)
def test_a_loop_and_plain_generate_are_refused_where_positions_end(name: str) -> None:
    architecture, changes = ENDING[name]
    model = build_model(build_config(architecture, num_hidden_layers=1, **changes))
    cache = SinkCache(model.config, W, S)
    with pytest.raises(ValueError, match="`query_length` must be at most 0 after 40 tokens, got 1: .* `sink_generate`"):
        by_token(model, random_ids(60), cache)
    assert cache.get_seq_length() == 40
    if name != "longrope":  # Phi-3's own `prepare_inputs_for_generation` drops any cache there
        cache = SinkCache(model.config, W, S)
        with pytest.raises(ValueError, match="after 40 tokens"):
            model.generate(random_ids(10), **{CACHE: cache}, max_new_tokens=60, eos_token_id=None)


@pytest.mark.skipif(not RECORDS_PAST, reason="RoFormer of early transformers 5 needs a key for every token seen")
def test_a_model_that_counts_positions_itself_ends_with_a_clear_error() -> None:
    config = transformers.RoFormerConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=60, is_decoder=True,
    )  # fmt: skip
    model = build_model(config)
    with pytest.raises(ValueError, match="`query_length` must be at most 0"):
        sink_generate(model, random_ids(10).clamp(min=1), max_new_tokens=60, **NEW_STREAM)


# --- second turns


@pytest.mark.parametrize("lengths", [[10], [3, 12]], ids=["one row", "padded"])
def test_turns_are_those_of_a_loop_however_they_are_given(lengths: list[int]) -> None:
    """Whole conversation or new tokens only, with a mask over all of it or without: turn for turn past the window."""
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
def test_turns_are_read_in_chunks_however_they_are_given(chunk_size: int) -> None:
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


def test_chunks_after_a_crop_are_what_single_tokens_are() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    cache = SinkCache(model.config, W, S)
    by_token(model, random_ids(40), cache)
    cache.crop(-5)
    other = copy.deepcopy(cache)
    more = random_ids(20, seed=1)
    assert relative_error(prefilled(model, more, cache, 8), by_token(model, more, other)) < 1e-4


def test_the_settings_of_the_model_count_where_a_generation_config_says_nothing() -> None:
    model = copy.deepcopy(tiny_model("llama", num_hidden_layers=2))
    _, ids, mask = padded([4, 9])
    model.generation_config.pad_token_id = 0
    model.generation_config.num_beams = 2
    config = transformers.GenerationConfig(max_new_tokens=20, do_sample=False)
    expected: Any = sink_generate(model, ids, attention_mask=mask, window_length=W, generation_config=config)
    output: Any = sink_generate(model, ids, window_length=W, generation_config=config)
    assert torch.equal(output, expected)
    output = sink_generate(model, ids, window_length=W, generation_config=config, prefill_chunk_size=5)
    assert torch.equal(output, expected)
    cache = SinkCache(model.config, W, S, attention_mask=mask)
    model.generation_config.pad_token_id = None
    output = sink_generate(model, ids, past_key_values=cache, generation_config=config, pad_token_id=None)
    assert torch.equal(output, expected)


def test_a_cache_whose_positions_were_wound_back_is_refused_elsewhere() -> None:
    architecture, changes = ENDING["dynamic"]
    model = build_model(build_config(architecture, num_hidden_layers=1, **changes))
    output: Any = sink_generate(model, random_ids(10).clamp(min=1), max_new_tokens=60, **NEW_STREAM)
    cache = output[CACHE]
    before = cache.get_seq_length()
    with pytest.raises(ValueError, match="Continue it with `sink_generate` or `sink_prefill`"):
        model.generate(output.sequences, **{CACHE: cache}, max_new_tokens=5)
    assert cache.get_seq_length() == before


def test_beams_continue_a_row_that_was_generated_greedily() -> None:
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


@pytest.mark.skipif(not RECORDS_PAST, reason="early transformers 5 does not record the past")
def test_recording_ends_with_the_call_that_needed_it() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    ids = torch.tensor([[5, 6, 7] * 4])
    first: Any = sink_generate(model, ids, max_new_tokens=20, prompt_lookup_num_tokens=3, **NEW_STREAM)
    cache = first[CACHE]
    assert cache.is_recording_past(0)
    other = copy.deepcopy(cache)
    output: Any = sink_generate(model, first.sequences, past_key_values=cache, max_new_tokens=20, **OPTIONS)
    assert not cache.is_recording_past(0)
    expected = model.generate(first.sequences, **{CACHE: other}, max_new_tokens=20, **OPTIONS)
    assert torch.equal(output.sequences, expected.sequences)


@pytest.mark.skipif(not RECORDS_PAST, reason="early transformers 5 does not record the past")
def test_recorded_tokens_of_a_padded_row_can_all_be_taken_back() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    _, ids, mask = padded([5, 30])
    output: Any = sink_generate(model, ids, attention_mask=mask, max_new_tokens=5, **NEW_STREAM)
    cache, other = output[CACHE], copy.deepcopy(output[CACHE])
    cache.activate_past_recording()
    whole = torch.nn.functional.pad(mask, (0, 7), value=1)
    more = {"attention_mask": whole, "position_ids": (whole.cumsum(1) - 1)[:, -3:]}
    model(random_ids(3, batch_size=2), **{CACHE: cache}, **more)
    cache.crop(-3)
    logits, expected = (model(random_ids(3, 2, seed=1), **{CACHE: x}, **more).logits for x in (cache, other))
    assert relative_error(logits, expected) < 1e-5


# --- bad input


def test_bad_masks_are_refused() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    ids = random_ids(6, batch_size=2).clamp(min=1)
    for mask, message in (
        ([[1, 1, 1, 1, 1, 0], [1] * 6], "padded on the left"),
        ([[0, 1, 0, 1, 1, 1], [1] * 6], "padded on the left"),
        ([[0] * 6, [1] * 6], "padded on the left"),
        ([[2] * 6, [1] * 6], "1 for tokens and 0 for padding"),
        ([1] * 6, r"must be a tensor of shape \[batch_size, prompt_length\], got \[6\]"),
    ):
        for call in (
            lambda mask: SinkCache(model.config, W, S, attention_mask=mask),
            lambda mask: sink_generate(model, ids, attention_mask=mask, max_new_tokens=2),
        ):
            with pytest.raises(ValueError, match=f"`attention_mask` .*{message}"):
                call(torch.tensor(mask))
    with pytest.raises(ValueError, match=r"`attention_mask` must be a tensor .* got list"):
        SinkCache(model.config, W, S, attention_mask=[[1]])  # type: ignore[arg-type]


def test_an_unannounced_padded_batch_is_refused_and_what_it_says_helps() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    _, ids, mask = padded([4, 9])
    cache = SinkCache(model.config, W, S)
    with pytest.raises(ValueError, match=r"SinkCache\(config, ..., attention_mask=attention_mask\)"):
        model.generate(ids, attention_mask=mask, **{CACHE: cache}, max_new_tokens=20)
    assert not cache.is_initialized
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    cache = SinkCache(model.config, W, S, attention_mask=mask)
    output = model.generate(ids, **{CACHE: cache}, eos_token_id=None, **options)
    expected: Any = sink_generate(model, ids, window_length=W, eos_token_id=None, **options)
    assert torch.equal(output, expected)


def test_the_padding_of_a_stream_cannot_change() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    _, ids, mask = padded([4, 9])
    output: Any = sink_generate(model, ids, attention_mask=mask, max_new_tokens=5, **NEW_STREAM)
    cache = output[CACHE]
    before = cache.get_seq_length()
    with pytest.raises(ValueError, match="`attention_mask` must say of the text so far what it said before"):
        sink_generate(model, output.sequences, attention_mask=torch.ones_like(output.sequences), past_key_values=cache)
    with pytest.raises(ValueError, match="`attention_mask` must be one for each of the 3 new tokens"):
        sink_generate(model, output.sequences[:, :3], attention_mask=mask[:, :3], past_key_values=cache)
    assert cache.get_seq_length() == before


def test_pads_that_generate_would_infer_are_inferred() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    _, ids, mask = padded([4, 9])
    options = {**NEW_STREAM, "eos_token_id": VOCAB_SIZE - 1, "max_new_tokens": 20}
    expected: Any = sink_generate(model, ids, attention_mask=mask, **options)
    output: Any = sink_generate(model, ids, **options)
    assert torch.equal(output.sequences, expected.sequences)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prefill_chunk_size": 0}, ValueError, "`prefill_chunk_size` must be at least 1, got 0"),
        ({"prefill_chunk_size": "4"}, TypeError, "`prefill_chunk_size` must be an int, got '4'"),
        (
            {"prefill_chunk_size": 4, "inputs_embeds": torch.zeros(1, 5, 64)},
            ValueError,
            "needs `input_ids`, got 4 with",
        ),
        ({"use_cache": False}, ValueError, "`use_cache` must be True"),
        ({"cache_implementation": "static"}, ValueError, "`cache_implementation` must be left out, got 'static'"),
        ({"window_length": 10**9}, ValueError, "`window_length` must be below 16777216"),
        ({"input_ids": random_ids(3)}, ValueError, "`inputs` and `input_ids` must not both be given"),
    ],
)
def test_bad_arguments_are_refused_by_name(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sink_generate(tiny_model("llama", num_hidden_layers=1), random_ids(5), **options)


def test_rows_that_do_not_fit_the_mask_are_refused() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    _, ids, mask = padded([4, 9])
    cache = SinkCache(model.config, W, S, attention_mask=mask)
    with pytest.raises(ValueError, match="`attention_mask` must have a row for each of the 3 sequences"):
        model(ids[[0, 1, 1]], **{CACHE: cache})
    assert not cache.is_initialized


def test_padding_past_the_window_is_exact_after_any_choice_of_rows() -> None:
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


@pytest.mark.parametrize("architecture", ["llama", "gptj"])
def test_streams_through_one_model_from_several_threads_do_not_meet(architecture: str) -> None:
    config = build_config(architecture, num_hidden_layers=2, max_position_embeddings=40)
    model = build_model(config)
    prompts = [random_ids(length, seed=length) for length in (5, 30, 50)]

    def written(prompt: Tensor) -> Tensor:
        with torch.no_grad():
            output: Any = sink_generate(model, prompt, max_new_tokens=100, **NEW_STREAM)
        return output.sequences  # type: ignore[no-any-return]

    expected = [written(prompt) for prompt in prompts]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            for output, alone in zip(pool.map(written, prompts), expected, strict=True):
                assert torch.equal(output, alone)
    assert "prepare_inputs_for_generation" not in vars(model)


def test_pads_that_a_chunked_layer_still_holds_stay_hidden() -> None:
    """A chunk of Llama 4 is longer than the window, whose last pad is gone long before."""
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


@pytest.mark.skipif(RECORDS_PAST, reason="later versions are right")
def test_early_transformers_cannot_take_candidates_back_in_a_turn_of_new_tokens_alone() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    first: Any = sink_generate(model, random_ids(20), max_new_tokens=4, **NEW_STREAM)
    with pytest.raises(NotImplementedError, match="`assistant_model` with only what is new"):
        sink_generate(model, random_ids(5), past_key_values=first[CACHE], assistant_model=model, **OPTIONS)
    assert first[CACHE].get_seq_length() == 23


def test_positions_that_are_none_are_those_of_the_stream() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    first: Any = sink_generate(model, random_ids(20), max_new_tokens=4, **NEW_STREAM)
    copied = copy.deepcopy(first[CACHE])
    a: Any = sink_generate(model, random_ids(5), past_key_values=copied, position_ids=None, max_new_tokens=5, **OPTIONS)
    b: Any = sink_generate(model, random_ids(5), past_key_values=first[CACHE], max_new_tokens=5, **OPTIONS)
    assert torch.equal(torch.stack(a.logits), torch.stack(b.logits))


@pytest.mark.parametrize("wrong", [{"max_new_tokens": -2}, {"misspelt": 1}, {"rows": 3}])
def test_a_refused_call_winds_nothing_back(wrong: dict[str, Any]) -> None:
    model = build_model(build_config("gptj", num_hidden_layers=1, max_position_embeddings=64))
    first: Any = sink_generate(model, random_ids(50).clamp(min=1), max_new_tokens=4, **NEW_STREAM)
    options = {"max_new_tokens": 5, **OPTIONS, **wrong}
    ids = random_ids(30, batch_size=options.pop("rows", 1)).clamp(min=1)
    with pytest.raises(ValueError):  # noqa: PT011  # each in its own words
        sink_generate(model, ids, past_key_values=first[CACHE], **options)
    assert position_offset_of(first[CACHE]) == 0


def test_caches_of_several_threads_on_one_model_do_not_disturb_each_other() -> None:
    """Token by token, in chunks with a window for each token, and by `generate`, all at the same time."""
    model = tiny_model("llama", num_hidden_layers=2)

    def streamed(seed: int) -> Tensor:
        with torch.no_grad():
            ids = random_ids(150, seed=seed)
            logits = [by_token(model, ids), prefilled(model, ids, SinkCache(model.config, W, S), 7)]
            output: Any = sink_generate(model, ids[:, :20], max_new_tokens=50, **NEW_STREAM)
            return torch.cat([*logits, torch.stack(output.logits, dim=1)], dim=1)

    seeds = list(range(4))
    expected = [streamed(seed) for seed in seeds]
    with ThreadPoolExecutor(4) as pool:
        for output, alone in zip(pool.map(streamed, seeds), expected, strict=True):
            assert torch.equal(output, alone)


@pytest.mark.parametrize("steps", [3, 20, 40])
def test_padded_rows_that_are_counted_anew_go_on_as_before(steps: int) -> None:
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


def test_a_crop_that_left_a_gap_is_forgotten_with_the_rest() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    cache, other = SinkCache(model.config, W, S), SinkCache(model.config, W, S)
    for each in (cache, other):
        by_token(model, random_ids(30), each)
        each.crop(-3)
    cache.compact()
    assert cache.get_seq_length() == cache.kept_length == W - 3
    more = random_ids(30, seed=1)
    assert relative_error(by_token(model, more, cache), by_token(model, more, other)) < 1e-4


def test_a_dynamic_cache_is_equalled_below_the_window_with_padding() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    _, ids, mask = padded([4, 9])
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **{CACHE: DynamicCache(config=model.config)}, eos_token_id=None, **options)
    output: Any = sink_generate(model, ids, window_length=W, eos_token_id=None, **options)
    assert torch.equal(output, expected)
