"""All ways in which `generate` decodes give the logits of the same row alone, read token by token."""

import copy
import time
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, StoppingCriteriaList

from attention_sinks import SinkCache, sink_generate

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
from ..support.streams import NEW_STREAM, OPTIONS, S, W, by_token, padded, scored
from ..support.versions import MAY_ADD_A_CANDIDATE, RECORDS_PAST

pytestmark = pytest.mark.usefixtures("no_grad")


# The length of the prompt of each row, and the number of new tokens.
PROMPTS = {
    "below": ([7], 8),
    "across": ([10], 20),
    "past": ([30], 20),
    "padded-below": ([1, 3, 7], 8),
    "padded-across": ([2, 10, 14], 20),
    "padded-past": ([5, 18, 40], 30),
}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_below_the_window_generate_is_bitwise_equal_to_a_dynamic_cache(architecture: str, implementation: str) -> None:
    model = tiny_model(architecture, num_hidden_layers=4)
    model.set_attn_implementation(implementation)
    options: dict[str, Any] = {
        "max_new_tokens": 30,
        "do_sample": False,
        "use_cache": True,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    ids = random_ids(20, batch_size=2)
    expected = model.generate(ids, **{CACHE: DynamicCache(config=model.config)}, **options)
    output = model.generate(ids, **{CACHE: SinkCache(model.config, 50, 4)}, **options)
    assert torch.equal(output.sequences, expected.sequences)
    for logits, expected_logits in zip(output.logits, expected.logits, strict=True):
        assert torch.equal(logits, expected_logits)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "cohere", "smollm3"])
@torch.no_grad()
def test_generate_equals_a_loop_of_single_tokens(architecture: str) -> None:
    """`generate` counts positions as the cache does, below and past the window."""
    model = tiny_model(architecture, num_hidden_layers=4)
    ids = random_ids(10)
    output: Any = sink_generate(
        model, ids, window_length=16, max_new_tokens=60, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert output[CACHE].get_seq_length() == 69
    assert output[CACHE].kept_length == 16
    cache = SinkCache(model.config, window_length=16)
    logits = model(ids, **{CACHE: cache}).logits[:, -1]
    for step, generated in enumerate(output.logits):
        assert relative_error(generated, logits) < 1e-5
        token = output.sequences[:, 10 + step : 11 + step]
        logits = model(token, **{CACHE: cache}).logits[:, -1]


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
def test_every_strategy_gives_each_row_the_logits_of_the_row_alone(
    architecture: str, prompts: str, options: dict[str, Any]
) -> None:
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
            if not options.get("do_sample"):  # the score of a sampled beam comes from the warped distribution
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


def test_sampling_beams_and_several_sequences_work_past_the_window() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    for options in ({"do_sample": True}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}):
        torch.manual_seed(0)
        output: Any = sink_generate(
            model, random_ids(10), window_length=16, max_new_tokens=40, **options, return_dict_in_generate=True
        )
        assert output.sequences.shape[1] == 50
        assert output[CACHE].kept_length == 16


def test_building_a_cache_does_not_change_the_random_state() -> None:
    """The rotation is measured with a random model, which must not consume random numbers of the caller."""
    model = build_model(build_config("llama", num_hidden_layers=1, max_position_embeddings=333))
    outputs: list[Any] = []
    for _ in range(2):
        torch.manual_seed(5)
        outputs.append(sink_generate(model, random_ids(5), max_new_tokens=20, do_sample=True))
    assert torch.equal(outputs[0], outputs[1])


def test_embeddings_instead_of_tokens_give_the_same_text() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    _, ids, mask = padded([4, 20])
    options: dict[str, Any] = {**NEW_STREAM, "attention_mask": mask, "max_new_tokens": 20}
    expected: Any = sink_generate(model, ids, **options)
    output: Any = sink_generate(model, inputs_embeds=model.get_input_embeddings()(ids), **options)
    assert torch.equal(output.sequences, expected.sequences[:, 20:])


def test_streamers_criteria_processors_and_attentions_work_past_the_window() -> None:
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


def test_the_settings_of_the_model_complete_a_generation_config() -> None:
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


def test_the_cache_implementation_of_the_generation_config_is_overruled() -> None:
    model = build_model(build_config("llama", num_hidden_layers=1))
    model.generation_config.cache_implementation = "static"
    output: Any = sink_generate(model, random_ids(5), window_length=8, max_new_tokens=9, return_dict_in_generate=True)
    assert isinstance(output[CACHE], SinkCache)


def test_use_cache_false_in_the_model_config_is_overruled() -> None:
    model = build_model(build_config("llama", num_hidden_layers=1, use_cache=False))
    model.generation_config.use_cache = False
    output: Any = sink_generate(model, random_ids(5), window_length=8, max_new_tokens=20, return_dict_in_generate=True)
    assert output[CACHE].kept_length == 8


# --- assisted decoding


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 5}, {"assistant_model": True}])
def test_assisted_decoding_below_the_window_gives_the_text_of_greedy_decoding(options: dict[str, Any]) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    if "assistant_model" in options:
        options = {"assistant_model": tiny_model("llama", num_hidden_layers=1)}
    ids = torch.tensor([[5, 6, 7, 8, 9, 10] * 3])
    plain: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": 96, "pad_token_id": 96}
    greedy = model.generate(ids, **plain)
    output: Any = sink_generate(model, ids, window_length=64, **plain, **options)
    assert torch.equal(output, greedy)


@pytest.mark.skipif(not RECORDS_PAST, reason="prompt lookup of early transformers 5 needs an end-of-sequence token")
@pytest.mark.parametrize("helper", ["prompt lookup", "draft model"])
@pytest.mark.parametrize("layers", [1, 2])
def test_rejected_candidates_leave_no_trace(helper: str, layers: int) -> None:
    """Past the window the cache is the one that single tokens leave.

    In one layer that is exact. In two layers the later tokens of a candidate saw a little more than their window.
    """
    model = tiny_model("llama", num_hidden_layers=layers)
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 5}
    if helper == "draft model":
        options = {"assistant_model": copy.deepcopy(tiny_model("llama", num_hidden_layers=1))}
    ids = torch.tensor([[5, 6, 7] * 2])
    output: Any = sink_generate(model, ids, max_new_tokens=60, **NEW_STREAM, **options)
    cache = output[CACHE]
    assert cache.get_seq_length() == 65
    assert cache.kept_length == W
    if layers == 1:
        expected = by_token(model, output.sequences)[:, -1]
        positions = torch.tensor([[65]])
        logits = model(output.sequences[:, -1:], position_ids=positions, **{CACHE: cache}).logits[:, -1]
        assert relative_error(logits, expected) < 1e-4


@pytest.mark.parametrize("chunk_size", [None, 8])
def test_assisted_decoding_in_a_second_turn_gives_the_text_of_greedy_decoding(chunk_size: int | None) -> None:
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


@pytest.mark.skipif(not RECORDS_PAST, reason="early transformers 5 does not record the past")
def test_the_next_call_ends_the_recording_of_the_past() -> None:
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


@pytest.mark.skipif(RECORDS_PAST, reason="later versions are right")
def test_early_transformers_refuse_assisted_decoding_of_new_tokens_alone() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    first: Any = sink_generate(model, random_ids(20), max_new_tokens=4, **NEW_STREAM)
    with pytest.raises(NotImplementedError, match="`assistant_model` with only what is new"):
        sink_generate(model, random_ids(5), past_key_values=first[CACHE], assistant_model=model, **OPTIONS)
    assert first[CACHE].get_seq_length() == 23
