import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache, T5Config, T5ForConditionalGeneration

from attention_sinks import SinkCache, sink_generate

from ..support.models import ARCHITECTURES, CACHE, build_config, build_model, random_ids, relative_error, tiny_model


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_below_the_window_generate_is_bitwise_that_of_a_dynamic_cache(architecture: str, implementation: str) -> None:
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
def test_generate_is_a_loop_of_single_tokens(architecture: str) -> None:
    """The positions that `generate` counts must be those the ring expects, across and past the window."""
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


def test_a_cache_is_continued_with_the_whole_conversation() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False}
    first: Any = sink_generate(model, random_ids(10), window_length=16, **options, return_dict_in_generate=True)
    cache = first[CACHE]
    again = copy.deepcopy(cache)
    follow_up = torch.cat([first.sequences, random_ids(5, seed=1)], dim=1)
    second: Any = sink_generate(model, follow_up, past_key_values=cache, **options)
    assert second.shape[1] == 10 + 30 + 5 + 30
    assert cache.get_seq_length() == second.shape[1] - 1
    assert torch.equal(second, model.generate(follow_up, **{CACHE: again}, **options))


def test_beams_below_the_window_are_those_of_a_dynamic_cache() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 20, "do_sample": False}
    expected = model.generate(random_ids(10), **{CACHE: DynamicCache(config=model.config)}, **options)
    output: Any = sink_generate(model, random_ids(10), window_length=64, **options)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 5}, {"assistant_model": True}])
def test_speculative_decoding_below_the_window_is_greedy(options: dict[str, Any]) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    if "assistant_model" in options:
        options = {"assistant_model": tiny_model("llama", num_hidden_layers=1)}
    ids = torch.tensor([[5, 6, 7, 8, 9, 10] * 3])
    plain: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": 96, "pad_token_id": 96}
    greedy = model.generate(ids, **plain)
    output: Any = sink_generate(model, ids, window_length=64, **plain, **options)
    assert torch.equal(output, greedy)


def test_a_cache_that_the_generation_config_asks_for_is_overruled() -> None:
    model = build_model(build_config("llama", num_hidden_layers=1))
    model.generation_config.cache_implementation = "static"
    output: Any = sink_generate(model, random_ids(5), window_length=8, max_new_tokens=9, return_dict_in_generate=True)
    assert isinstance(output[CACHE], SinkCache)


def test_sampling_beams_and_several_sequences_run_past_the_window() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    for options in ({"do_sample": True}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}):
        torch.manual_seed(0)
        output: Any = sink_generate(
            model, random_ids(10), window_length=16, max_new_tokens=40, **options, return_dict_in_generate=True
        )
        assert output.sequences.shape[1] == 50
        assert output[CACHE].kept_length == 16


def test_sampled_text_does_not_depend_on_whether_the_cache_was_derived_before() -> None:
    """Deriving the rotation builds a random model; that must not move the random state of the caller."""
    model = build_model(build_config("llama", num_hidden_layers=1, max_position_embeddings=333))
    outputs: list[Any] = []
    for _ in range(2):
        torch.manual_seed(5)
        outputs.append(sink_generate(model, random_ids(5), max_new_tokens=20, do_sample=True))
    assert torch.equal(outputs[0], outputs[1])


def test_a_model_config_that_switches_caches_off_is_overruled() -> None:
    model = build_model(build_config("llama", num_hidden_layers=1, use_cache=False))
    model.generation_config.use_cache = False
    output: Any = sink_generate(model, random_ids(5), window_length=8, max_new_tokens=20, return_dict_in_generate=True)
    assert output[CACHE].kept_length == 8


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


def test_a_model_whose_frequencies_were_rounded_with_its_weights_is_refused() -> None:
    model = build_model(build_config("llama", num_hidden_layers=1)).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"rounded to torch.bfloat16 .*from_pretrained\(..., dtype=torch.bfloat16\)"):
        sink_generate(model, random_ids(5))
