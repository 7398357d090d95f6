"""Where a model changes its behavior with the position, positions are rebased in time, or the update is refused."""

from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedConfig

from attention_sinks import Rotation, SinkCache, sink_generate

from ..support.inside import position_offset_of
from ..support.models import CACHE, VOCAB_SIZE, build_config, build_model, random_ids, relative_error, tiny_model
from ..support.states import CONFIG, states_of
from ..support.streams import NEW_STREAM, OPTIONS, S, W, by_token, padded
from ..support.versions import RECORDS_PAST

pytestmark = pytest.mark.usefixtures("no_grad")


ENDING: dict[str, tuple[str, dict[str, Any]]] = {
    "gptj": ("gptj", {"max_position_embeddings": 40}),
    "dynamic": ("llama", {"max_position_embeddings": 40, "rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "longrope": ("phi3", {"max_position_embeddings": 160, "original_max_position_embeddings": 40, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 40}}),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDING)
@pytest.mark.parametrize(
    "options",
    [{}, {"prefill_chunk_size": 9}, pytest.param({"num_beams": 2}, marks=pytest.mark.exhaustive)],
    ids=["", "chunks", "beams"],
)
@pytest.mark.parametrize("lengths", [[10], [60], [4, 30, 70]], ids=["short", "long", "padded"])
def test_sink_generate_rebases_positions_before_they_end(
    name: str, options: dict[str, Any], lengths: list[int]
) -> None:
    """Up to five times the limit, each step of one layer equals the model on the kept tokens without a cache."""
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
                held = list(range(seen))  # the prompt is read in one forward pass
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
def test_a_custom_loop_and_plain_generate_are_refused_where_positions_end(name: str) -> None:
    architecture, changes = ENDING[name]
    model = build_model(build_config(architecture, num_hidden_layers=1, **changes))
    cache = SinkCache(model.config, W, S)
    with pytest.raises(ValueError, match="`query_length` must be at most 0 after 40 tokens, got 1: .* `sink_generate`"):
        by_token(model, random_ids(60), cache)
    assert cache.get_seq_length() == 40
    if name != "longrope":  # `prepare_inputs_for_generation` of Phi-3 drops any cache at the limit
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


def test_plain_generate_refuses_a_cache_with_rebased_positions() -> None:
    architecture, changes = ENDING["dynamic"]
    model = build_model(build_config(architecture, num_hidden_layers=1, **changes))
    output: Any = sink_generate(model, random_ids(10).clamp(min=1), max_new_tokens=60, **NEW_STREAM)
    cache = output[CACHE]
    before = cache.get_seq_length()
    with pytest.raises(ValueError, match="Continue it with `sink_generate` or `sink_prefill`"):
        model.generate(output.sequences, **{CACHE: cache}, max_new_tokens=5)
    assert cache.get_seq_length() == before


@pytest.mark.parametrize("wrong", [{"max_new_tokens": -2}, {"misspelt": 1}, {"rows": 3}])
def test_a_refused_call_does_not_rebase(wrong: dict[str, Any]) -> None:
    model = build_model(build_config("gptj", num_hidden_layers=1, max_position_embeddings=64))
    first: Any = sink_generate(model, random_ids(50).clamp(min=1), max_new_tokens=4, **NEW_STREAM)
    options = {"max_new_tokens": 5, **OPTIONS, **wrong}
    ids = random_ids(30, batch_size=options.pop("rows", 1)).clamp(min=1)
    with pytest.raises(ValueError):  # noqa: PT011  # each in its own words
        sink_generate(model, ids, past_key_values=first[CACHE], **options)
    assert position_offset_of(first[CACHE]) == 0


def test_compact_after_a_crop_does_not_change_logits() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    cache, other = SinkCache(model.config, W, S), SinkCache(model.config, W, S)
    for each in (cache, other):
        by_token(model, random_ids(30), each)
        each.crop(-3)
    cache.compact()
    assert cache.get_seq_length() == cache.kept_length == W - 3
    more = random_ids(30, seed=1)
    assert relative_error(by_token(model, more, cache), by_token(model, more, other)) < 1e-4


def test_an_update_that_would_reach_the_position_limit_is_refused() -> None:
    config = build_config(
        "llama", num_hidden_layers=1, max_position_embeddings=40,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    )  # fmt: skip
    model, cache = build_model(config), SinkCache(config, 8, 2)
    with torch.no_grad():
        model(random_ids(38), **{CACHE: cache})
        with pytest.raises(ValueError, match="`query_length` must be at most 2 after 38 tokens, got 3.*position 40"):
            model(random_ids(3), **{CACHE: cache})
        model(random_ids(2), **{CACHE: cache})
        with pytest.raises(ValueError, match="at most 0 after 40 tokens"):
            cache.update(*states_of([40]), 0)
    assert cache.get_seq_length() == 40
    with pytest.raises(ValueError, match="`window_length` must be below 40, .* got 40"):
        SinkCache(config, 40, 2)


def test_a_rotation_given_as_argument_equals_the_measured_one() -> None:
    """A rotation is given for models that cannot be measured, such as custom models."""
    model = build_model(build_config("llama", num_hidden_layers=2))
    measured = SinkCache(model.config, 8, 2)
    inv_freq = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    stated = SinkCache(PretrainedConfigOfItsOwn(num_hidden_layers=2), 8, 2, rotation=Rotation(inv_freq))
    with torch.no_grad():
        for chunk in random_ids(40).split([5, 1, 1, 9, *[1] * 24], dim=1):
            logits = [model(chunk, **{CACHE: cache}).logits for cache in (measured, stated)]
            torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-4)
    with pytest.raises(NotImplementedError, match=r"'its_own'.*SinkCache\(config, rotation=Rotation\(inv_freq"):
        SinkCache(PretrainedConfigOfItsOwn(num_hidden_layers=2), 8, 2)
    with pytest.raises(TypeError, match="`rotation` must be a Rotation, got 'llama'"):
        SinkCache(CONFIG, rotation="llama")  # type: ignore[arg-type]


class PretrainedConfigOfItsOwn(PreTrainedConfig):
    model_type = "its_own"
    num_hidden_layers: int = 2
