"""Bad arguments are refused: the error names the argument and its value, and a refused call changes nothing."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    MambaConfig,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
)

from attention_sinks import SinkCache, enable_attention_sinks, sink_generate, sink_prefill

from ..support.models import CACHE, build_config, build_model, random_ids, tiny_model
from ..support.states import CONFIG, states_of, update
from ..support.streams import NEW_STREAM, S, W, padded
from ..support.versions import RECORDS_PAST


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"window_length": True}, TypeError, "`window_length` must be an int, got True"),
        ({"window_length": 256.0}, TypeError, "`window_length` must be an int, got 256.0"),
        ({"window_length": "256"}, TypeError, "`window_length` must be an int, got '256'"),
        ({"window_length": 0}, ValueError, "`window_length` must be at least 1, got 0"),
        ({"num_sink_tokens": False}, TypeError, "`num_sink_tokens` must be an int, got False"),
        ({"num_sink_tokens": 4.0}, TypeError, "`num_sink_tokens` must be an int, got 4.0"),
        ({"num_sink_tokens": -1}, ValueError, "`num_sink_tokens` must be at least 0, got -1"),
        ({"num_sink_tokens": 256}, ValueError, "got num_sink_tokens=256 and window_length=256"),
        ({"config": None}, TypeError, r"`config` must be .* got None.*SinkCache\(model.config, window_length=256"),
        ({"config": 256}, TypeError, "`config` must be the config of the model, got 256"),
        ({"config": build_config("mistral-sliding"), "window_length": 64}, ValueError, "sliding window.* with 64"),
        ({"config": MambaConfig(num_hidden_layers=2)}, NotImplementedError, "'mamba'"),
        ({"config": T5Config()}, NotImplementedError, "'t5'.*encoder-decoder"),
    ],
)
def test_an_error_names_the_bad_argument_of_a_cache(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        SinkCache(**{"config": CONFIG, **arguments})


def test_a_call_in_the_form_of_older_versions_gets_the_new_form_as_answer() -> None:
    with pytest.raises(TypeError, match=r"SinkCache\(model\.config, window_length=256, num_sink_tokens=4\)"):
        SinkCache(window_length=256, num_sink_tokens=4)


WRONG_STATES: list[Any] = [
    (lambda k, v: (k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1)), "`key_states` must keep batch size"),
    (lambda k, v: (k[..., :8], v), "`key_states` must keep batch size, heads and head dimension"),
    (lambda k, v: (k, v[..., :8]), "`value_states` must keep batch size, heads and head dimension"),
    (lambda k, v: (k.double(), v.double()), "dtype and device, torch.float32 on cpu, got torch.float64"),
    (lambda k, v: (k.to("meta"), v.to("meta")), "dtype and device, torch.float32 on cpu, got .* on meta"),
]


@pytest.mark.parametrize("past", [5, 8, 20])
@pytest.mark.parametrize(("change", "message"), WRONG_STATES)
def test_a_refused_update_changes_nothing(past: int, change: Any, message: str) -> None:
    cache, untouched = SinkCache(CONFIG, 8, 2), SinkCache(CONFIG, 8, 2)
    for each in (cache, untouched):
        update(each, list(range(past)))
    with pytest.raises(ValueError, match=message):
        cache.update(*change(*states_of([past, past + 1])), 0)
    for length in (1, 3, 1):
        start = untouched.get_seq_length()
        tokens = list(range(start, start + length))
        for mine, others in zip(update(cache, tokens), update(untouched, tokens), strict=True):
            assert torch.equal(mine, others)


def test_keys_and_values_of_different_lengths_are_refused_before_anything_is_allocated() -> None:
    cache = SinkCache(CONFIG, 8, 2)
    keys, values = states_of([0, 1])
    with pytest.raises(ValueError, match="must agree in batch size and number of tokens"):
        cache.update(keys, values[:, :, :1], 0)
    assert not cache.is_initialized
    update(cache, [0, 1])


def test_a_crop_of_more_tokens_than_are_held_is_refused_and_changes_nothing() -> None:
    cache, untouched = SinkCache(CONFIG, 8, 2), SinkCache(CONFIG, 8, 2)
    for each in (cache, untouched):
        update(each, list(range(20)))
    with pytest.raises(ValueError, match="`tokens_to_remove` must be at least -6, got -7: of the 20 tokens"):
        cache.crop(-7)
    for mine, others in zip(update(cache, [20]), update(untouched, [20]), strict=True):
        assert torch.equal(mine, others)


# --- sink_generate


def test_bad_input_is_refused_before_anything_is_generated() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    ids = random_ids(5, batch_size=2)
    for other in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=9), ()):
        with pytest.raises(TypeError, match=f"`cache` must be a SinkCache, got {type(other).__name__}"):
            sink_generate(model, ids, past_key_values=other)  # type: ignore[arg-type]
    cache = SinkCache(model.config, 50)
    with pytest.raises(ValueError, match="`window_length` of a cache cannot change: got window_length=60 .* with 50"):
        sink_generate(model, ids, past_key_values=cache, window_length=60)
    with pytest.raises(ValueError, match="`num_sink_tokens` of a cache cannot change: got num_sink_tokens=2 .* with 4"):
        sink_generate(model, ids, past_key_values=cache, num_sink_tokens=2)
    with pytest.raises(ValueError, match="`use_cache` must be True, got False"):
        sink_generate(model, ids, past_key_values=cache, use_cache=False)
    with pytest.raises(ValueError, match="`window_length` must be at least 1, got 0"):
        sink_generate(model, ids, window_length=0)
    with pytest.raises(TypeError, match="`model` must be a transformers model that can generate, got str"):
        sink_generate("llama", ids)  # type: ignore[arg-type]
    assert not cache.is_initialized


def test_encoder_decoders_are_refused() -> None:
    config = T5Config(d_model=8, d_ff=8, d_kv=4, num_heads=2, num_layers=1, vocab_size=9)
    with pytest.raises(NotImplementedError, match=r"'t5'.*encoder-decoder"):
        sink_generate(T5ForConditionalGeneration(config), random_ids(5))
    part = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    nested = T5GemmaForConditionalGeneration(T5GemmaConfig(encoder=part, decoder=part, vocab_size=9))
    for call in (sink_generate, lambda model, ids: enable_attention_sinks(model)):
        with pytest.raises(NotImplementedError, match=r"'t5gemma'.*encoder-decoder"):
            call(nested, random_ids(5))


def test_a_model_with_rounded_rotary_frequencies_is_refused() -> None:
    model = build_model(build_config("llama", num_hidden_layers=1)).to(torch.bfloat16)
    calls: list[Callable[[], object]] = [
        lambda: sink_generate(model, random_ids(5)),
        lambda: next(sink_prefill(model, random_ids(5), SinkCache(model.config))),
    ]
    for call in calls:
        with pytest.raises(
            ValueError, match=r"rounded to torch.bfloat16 .*from_pretrained\(..., dtype=torch.bfloat16\)"
        ):
            call()


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
def test_an_error_names_the_bad_argument_of_sink_generate(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sink_generate(tiny_model("llama", num_hidden_layers=1), random_ids(5), **options)


# --- padding


def test_unannounced_padding_is_refused_and_nothing_is_stored() -> None:
    model, cache = build_model(CONFIG), SinkCache(CONFIG, 16, 4)
    ids, mask = random_ids(10, batch_size=2), torch.ones(2, 10, dtype=torch.long)
    ids[1, :3], mask[1, :3] = 0, 0
    with pytest.raises(ValueError, match="as only padding does"):
        model.generate(ids, attention_mask=mask, **{CACHE: cache}, max_new_tokens=5)
    assert cache.get_seq_length() == 0
    assert not cache.is_initialized
    ids[1, :3] = ids[0, 0]
    model.generate(ids, **{CACHE: cache}, max_new_tokens=5)  # a repeated word without a mask is no padding


def test_the_error_about_unannounced_padding_names_the_remedy() -> None:
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


def test_rows_that_do_not_fit_the_mask_are_refused() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    _, ids, mask = padded([4, 9])
    cache = SinkCache(model.config, W, S, attention_mask=mask)
    with pytest.raises(ValueError, match="`attention_mask` must have a row for each of the 3 sequences"):
        model(ids[[0, 1, 1]], **{CACHE: cache})
    assert not cache.is_initialized


def test_a_mask_of_another_shape_than_the_first_prompt_is_refused() -> None:
    """MPT counts no positions, by which the others would notice."""
    for name in ("llama", "mpt"):
        model = tiny_model(name, num_hidden_layers=1)
        ids = random_ids(12).clamp(min=1)
        for mask in (torch.ones(1, 9), torch.ones(1, 15), torch.ones(2, 12), torch.tensor([[0] * 3 + [1] * 12])):
            cache = SinkCache(model.config, W, S)
            with pytest.raises(ValueError, match=r"`attention_mask` must have the shape of the prompt, \[1, 12\], got"):
                sink_generate(model, ids, attention_mask=mask.long(), cache=cache, max_new_tokens=2)
            assert cache.get_seq_length() == 0


def test_positions_of_the_caller_are_refused() -> None:
    """The cache counts them; prompts that are read in chunks would get others."""
    model = tiny_model("llama", num_hidden_layers=1)
    with pytest.raises(TypeError, match="`position_ids` must be left out"):
        sink_generate(model, random_ids(6), position_ids=torch.arange(6)[None], max_new_tokens=2)


def test_a_cache_of_another_model_is_refused() -> None:
    model, other = build_model(build_config("llama")), build_model(build_config("llama-linear"))
    cache = SinkCache(model.config, W, S)
    with pytest.raises(ValueError, match="`cache` must be made with the config of `model`: rope_parameters"):
        sink_generate(other, random_ids(6), cache=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="`cache` must be made with the config of `model`: rope_parameters"):
        next(sink_prefill(other, random_ids(6), cache))
    assert cache.get_seq_length() == 0
    sink_generate(copy.deepcopy(model), random_ids(6), cache=cache, max_new_tokens=2)


def test_what_is_read_in_chunks_is_text_for_the_rows_of_the_cache_and_is_not_recorded() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    cache = SinkCache(model.config, W, S, attention_mask=torch.tensor([[0, 0, 1, 1, 1]]))
    with pytest.raises(ValueError, match="`input_ids` must have a row for each of the 1 rows .*, got 3"):
        next(sink_prefill(model, random_ids(5, 3), cache))
    with pytest.raises(NotImplementedError, match="`pixel_values` is not supported with a prompt"):
        next(sink_prefill(model, random_ids(5), cache, pixel_values=torch.zeros(1)))
    if RECORDS_PAST:
        cache = SinkCache(model.config, W, S)
        cache.activate_past_recording()  # type: ignore[no-untyped-call]
        with pytest.raises(ValueError, match="`cache` must not record what it evicts"):
            next(sink_prefill(model, random_ids(5), cache))


def test_rows_of_an_empty_cache_are_left_alone_and_others_are_named() -> None:
    model = tiny_model("llama")
    cache = SinkCache(model.config, W, S)
    cache.batch_select_indices(torch.tensor([3, 0]))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([0, 1]))
    update(cache, [0, 1, 2], batch_size=2)
    for indices in (torch.tensor([0, 2]), torch.tensor([-3]), torch.tensor([0.5])):
        with pytest.raises(IndexError, match="`indices` must be of the 2 rows that the cache holds"):
            cache.batch_select_indices(indices)
    update(cache, [3], batch_size=2)
    cache.batch_select_indices(torch.tensor([True, False]))
    assert cache.num_rows == 1


@pytest.mark.parametrize("tokens", [[], [0, 1, 2]])
def test_an_export_is_refused_in_words(tokens: list[int]) -> None:
    class Exported(torch.nn.Module):
        def __init__(self, cache: SinkCache) -> None:
            super().__init__()
            self.cache = cache

        def forward(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            return self.cache.update(keys, values, 0)[0]

    cache = SinkCache(CONFIG, W, S)
    if tokens:
        update(cache, tokens)
    with pytest.raises(NotImplementedError, match="A SinkCache cannot be exported.*`torch.compile`"):
        torch.export.export(Exported(cache), states_of([3]), strict=False)
    assert cache.get_seq_length() == len(tokens)
