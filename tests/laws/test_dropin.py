"""`generate` of an enabled model is `sink_generate`. Calls that choose a cache, and other models, are left alone."""

import contextlib
import copy
import gc
import inspect
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, GenerationMixin, LlamaForCausalLM

from attention_sinks import SinkCache, disable_attention_sinks, enable_attention_sinks, sink_generate

from ..support.models import CACHE, build_config, build_model, random_ids, tiny_model
from ..support.streams import OPTIONS, S, W, padded

WINDOW: dict[str, Any] = {"window_length": W, "num_sink_tokens": S}
PROMPTS = {"below": 3, "across": 12, "past": 40}


def generated(function: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None, Any]:
    """The tokens, logits and cache of a call, with the same random numbers for each."""
    torch.manual_seed(0)
    output = function(*args, **{**OPTIONS, "max_new_tokens": 20, **kwargs})
    logits = None if output.logits is None else torch.stack(output.logits)
    return output.sequences, logits, getattr(output, CACHE)


def assert_same(actual: Any, expected: Any) -> None:
    assert torch.equal(actual[0], expected[0])
    assert (actual[1] is None) == (expected[1] is None)
    assert actual[1] is None or torch.equal(actual[1], expected[1])
    assert type(actual[2]) is type(expected[2])
    assert actual[2].get_seq_length() == expected[2].get_seq_length()


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "eos_token_id": 96},  # early transformers 5 needs one
    "chunks": {"prefill_chunk_size": 5},
    "another window": {"window_length": 12},
}


@pytest.mark.parametrize("prompt_length", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("mode", MODES)
def test_generate_of_an_enabled_model_is_sink_generate(mode: str, prompt_length: int) -> None:
    model, ids, options = tiny_model("llama"), random_ids(prompt_length), MODES[mode]
    expected = generated(sink_generate, model, ids, **{**WINDOW, **options})
    with enable_attention_sinks(model, W, S):
        for given in ({"inputs": ids}, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}):
            assert_same(generated(model.generate, **given, **options), expected)
        assert_same(generated(sink_generate, model, ids, **{**WINDOW, **options}), expected)
    assert expected[2].kept_length <= W


def test_a_padded_batch_and_a_prompt_beyond_the_context_are_those_of_sink_generate() -> None:
    model = tiny_model("llama")
    _, ids, mask = padded([5, 13, 14])
    for given in ({"inputs": ids, "attention_mask": mask}, {"inputs": random_ids(600).clamp(min=1)}):
        expected = generated(sink_generate, model, **given, **WINDOW)
        with enable_attention_sinks(model, **WINDOW):
            assert_same(generated(model.generate, **given), expected)


def test_arguments_by_position_are_those_of_generate() -> None:
    model, ids = tiny_model("llama"), random_ids(5)
    config = GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    with enable_attention_sinks(model, **WINDOW):
        assert inspect.signature(model.generate) == inspect.signature(build_model(model.config).generate)
        tokens = model.generate(ids, config, None, None)
        with pytest.raises(TypeError, match="inputs"):
            model.generate(ids, inputs=ids)
        with pytest.raises(TypeError, match="positional"):
            model.generate(*[None] * 20)
    expected: Any = sink_generate(model, ids, generation_config=config, **WINDOW)
    assert torch.equal(tokens, expected)


# Arguments of a call that says which cache it uses, and how many tokens that holds after 40.
CHOSEN: dict[str, Any] = {
    "use_cache": lambda model: {"use_cache": False},
    "config": lambda model: {"generation_config": GenerationConfig(use_cache=False)},
    "cache_implementation": lambda model: {"cache_implementation": "static"},
    "config's implementation": lambda model: {"generation_config": GenerationConfig(cache_implementation="dynamic")},
    "DynamicCache": lambda model: {CACHE: DynamicCache(config=model.config)},
    "SinkCache": lambda model: {CACHE: SinkCache(model.config, 10, 2)},
}


@pytest.mark.parametrize("choice", CHOSEN)
def test_a_call_that_chooses_its_cache_is_left_alone(choice: str) -> None:
    model, ids = build_model(build_config("llama")), random_ids(20)
    expected = generated(model.generate, ids, **CHOSEN[choice](model))
    with enable_attention_sinks(model, **WINDOW):
        actual = generated(model.generate, ids, **CHOSEN[choice](model))
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])  # type: ignore[arg-type]
    assert type(actual[2]) is type(expected[2])


@pytest.mark.parametrize("settings", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_the_settings_of_the_model_choose_nothing(settings: dict[str, Any]) -> None:
    """Also where a pipeline passes a copy of them."""
    model, ids = build_model(build_config("llama")), random_ids(20)
    model.generation_config.update(**settings)
    expected = generated(sink_generate, model, ids, **WINDOW)
    with enable_attention_sinks(model, **WINDOW):
        assert_same(generated(model.generate, ids), expected)
        assert_same(generated(model.generate, ids, generation_config=copy.deepcopy(model.generation_config)), expected)


def test_an_assistant_drafts_with_its_own_cache() -> None:
    """Enabled too; and the model itself, which exits early."""
    model, assistant, ids = (
        tiny_model("llama", 2),
        build_model(build_config("llama", num_hidden_layers=1)),
        random_ids(6),
    )
    for options in ({"assistant_model": assistant}, {"assistant_early_exit": 1}):
        expected = generated(sink_generate, model, ids, **WINDOW, **options)
        with enable_attention_sinks(model, **WINDOW), enable_attention_sinks(assistant, **WINDOW):
            assert_same(generated(model.generate, ids, **options), expected)


def test_other_models_and_later_calls_are_those_of_transformers() -> None:
    model, other, ids = tiny_model("llama", 2), build_model(build_config("llama")), random_ids(20)
    expected = [generated(each.generate, ids) for each in (model, other)]
    before = dict(vars(model))
    with enable_attention_sinks(model, **WINDOW):
        assert_same(generated(other.generate, ids), expected[1])
        assert vars(model) == before
        bound = model.generate
        assert generated(bound, ids)[2].kept_length == W
    for generate in (model.generate, bound):
        assert_same(generated(generate, ids), expected[0])
    assert "generate" not in vars(type(model))
    assert type(model).generate is GenerationMixin.generate


def test_the_last_window_is_in_force_and_each_end_takes_its_own() -> None:
    model, ids = tiny_model("llama"), random_ids(20)

    def kept() -> int:
        cache = generated(model.generate, ids)[2]
        return cache.kept_length if isinstance(cache, SinkCache) else cache.get_seq_length()

    with enable_attention_sinks(model, 16):
        with enable_attention_sinks(model, 8):
            assert kept() == 8
        assert kept() == 16
        first, second = enable_attention_sinks(model, 10), enable_attention_sinks(model, 12)
        with first:
            assert kept() == 12
        assert kept() == 12
        with second:
            pass
        assert kept() == 16
        enable_attention_sinks(model, 9)
        assert kept() == 9
        disable_attention_sinks(model)
        assert kept() == 39
    disable_attention_sinks(model)
    assert kept() == 39
    assert "generate" not in vars(type(model))


def test_an_error_inside_of_a_block_disables_the_model() -> None:
    model = tiny_model("llama")
    with contextlib.suppress(KeyboardInterrupt), enable_attention_sinks(model, **WINDOW):
        raise KeyboardInterrupt
    assert "generate" not in vars(type(model))


def test_copies_pickles_and_saved_models_carry_nothing(tmp_path: Path) -> None:
    model, ids = build_model(build_config("llama")), random_ids(20)
    plain, attributes = generated(model.generate, ids), vars(model).keys()
    with enable_attention_sinks(model, **WINDOW):
        generated(model.generate, ids)
        model.save_pretrained(tmp_path / "model")
        torch.save(model, tmp_path / "model.pt")
        pickled = pickle.dumps(model)
        copies = {
            "deep copy": copy.deepcopy(model),
            "copy": copy.copy(model),
            "pickle": pickle.loads(pickled),
            "saved": AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval(),
            "torch.save": torch.load(tmp_path / "model.pt", weights_only=False),
        }
        for each in copies.values():
            assert_same(generated(each.generate, ids), plain)
    assert b"attention_sinks" not in pickled
    for path in (tmp_path / "model").iterdir():
        assert b"sink" not in path.read_bytes()
    for name, each in copies.items():
        assert vars(each).keys() == attributes or name == "saved", name
        assert_same(generated(each.generate, ids), plain)


def test_threads_generate_with_one_enabled_model_as_alone() -> None:
    model = tiny_model("llama")
    prompts = [random_ids(5 + 9 * seed, seed=seed) for seed in range(4)]

    def run(ids: Tensor) -> tuple[Tensor, Any]:
        output = model.generate(ids, max_new_tokens=40, **OPTIONS)
        return torch.stack(output.logits), output[CACHE]

    with enable_attention_sinks(model, **WINDOW):
        alone = [run(ids)[0] for ids in prompts]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(run, prompts))
    assert all(cache.kept_length == W for _, cache in together)
    assert all(torch.equal(logits, expected) for (logits, _), expected in zip(together, alone, strict=True))


def test_models_are_enabled_and_disabled_in_several_threads() -> None:
    models = [build_model(build_config("llama", num_hidden_layers=1)) for _ in range(3)]

    def run(model: Any) -> set[Any]:
        found = set()
        for _ in range(20):
            with enable_attention_sinks(model, 8, 2):
                found.add(type(model.generate(random_ids(4), max_new_tokens=1, **OPTIONS)[CACHE]))
        return found

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(run, models)) == [{SinkCache}] * 3
    assert "generate" not in vars(LlamaForCausalLM)


def test_an_enabled_model_is_collected() -> None:
    model = build_model(build_config("qwen2", num_hidden_layers=1))
    enable_attention_sinks(model, **WINDOW)
    collected = weakref.ref(model)
    del model
    gc.collect()
    assert collected() is None


class OwnGenerate(LlamaForCausalLM):
    """A model with a `generate` of its own, with other names."""

    def generate(self, ids: Tensor | None = None, **more: Any) -> Any:
        return super().generate(input_ids=ids if ids is not None else more.pop("input_ids"), **more)


def test_a_class_with_a_generate_of_its_own_gets_it_back() -> None:
    own = vars(OwnGenerate)["generate"]
    config: Any = build_config("llama")
    model, other = OwnGenerate(config), LlamaForCausalLM(config)
    with enable_attention_sinks(model, **WINDOW), enable_attention_sinks(other, 8):
        assert generated(other.generate, random_ids(20))[2].kept_length == 8
        output = model.generate(input_ids=random_ids(20), max_new_tokens=3, **OPTIONS)
        assert output[CACHE].kept_length == W
    assert vars(OwnGenerate)["generate"] is own
    assert "generate" not in vars(LlamaForCausalLM)


def test_what_others_put_on_the_class_meanwhile_stays() -> None:
    model, ids = tiny_model("llama"), random_ids(20)
    calls = []
    end = enable_attention_sinks(model, **WINDOW)
    ours = LlamaForCausalLM.generate

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(type(self))
        return ours(self, *args, **kwargs)

    try:
        LlamaForCausalLM.generate = counted  # type: ignore[method-assign]
        with end:
            assert generated(model.generate, ids)[2].kept_length == W
        assert isinstance(generated(model.generate, ids)[2], DynamicCache)
        assert LlamaForCausalLM.generate is counted
        assert len(calls) >= 2
    finally:
        del LlamaForCausalLM.generate


def test_what_cannot_be_enabled_is_refused_at_once() -> None:
    replaced = build_model(build_config("llama"))
    replaced.generate = lambda *args, **kwargs: None
    refusals: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (object(), {}, TypeError, "`model`"),
        (tiny_model("llama").model, {}, TypeError, "`model`"),
        (replaced, {}, ValueError, "del model.generate"),
        (tiny_model("llama"), {"window_length": 4}, ValueError, "num_sink_tokens"),
        (tiny_model("llama"), {"window_length": "4"}, TypeError, "window_length"),
    ]
    for model, arguments, error, text in refusals:
        with pytest.raises(error, match=text):
            enable_attention_sinks(model, **arguments)
    assert "generate" not in vars(LlamaForCausalLM)


def test_what_sink_generate_refuses_is_refused() -> None:
    """By the call, since a model may change until then."""
    model, ids = build_model(build_config("llama")), random_ids(20)
    with enable_attention_sinks(model, **WINDOW):
        with pytest.raises(TypeError, match="position_ids"):
            model.generate(ids, position_ids=torch.arange(20)[None], max_new_tokens=3)
        model.half()
        with pytest.raises(ValueError, match="from_pretrained"):
            model.generate(ids, max_new_tokens=3)
