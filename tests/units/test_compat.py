"""A version of transformers that works differently is noticed before a token is returned.

Each drift is simulated by a model class; `sink_generate`, `sink_prefill` and `SinkSession` must raise a RuntimeError.
"""

import dataclasses
import functools
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import GenerationMixin, LlamaForCausalLM, masking_utils
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama import modeling_llama

from attention_sinks import SinkCache, SinkSession, sink_generate, sink_prefill
from attention_sinks.compat import CACHE_NAMES, LAST_TESTED, cache_name

from ..support.models import CACHE, build_config, build_model, random_ids, tiny_model
from ..support.streams import S, W
from ..support.tokenizer import byte_tokenizer, chat_model

ROOT = Path(__file__).parents[2]
OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class Tokens(BaseStreamer):
    """Collects the streamed tokens; the first entry is the prompt."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    def put(self, value: Any) -> None:
        self.got.append(value)

    def end(self) -> None: ...


def drifted(method: str, fake: Any) -> Any:
    """A tiny Llama in which one method is replaced."""
    model = tiny()
    model.__class__ = type("Drifted", (LlamaForCausalLM,), {method: fake})
    return model


def tiny() -> Any:
    return chat_model(eos_token_id=None)


def under_a_third_name(self: Any, input_ids: Any, kv_store: Any = None, **kwargs: Any) -> Any:
    return LlamaForCausalLM.forward(self, input_ids, **{**kwargs, CACHE: kv_store})


def calls_the_cache_otherwise(self: Any, inputs: Any = None, **kwargs: Any) -> Any:
    return self.prepare_inputs_for_generation(inputs, kv_store=kwargs[CACHE])


def drops_the_hook(self: Any, inputs: Any = None, **kwargs: Any) -> Any:
    return self(inputs, **{CACHE: kwargs[CACHE]}).logits.argmax(-1)


def drops_hook_and_cache(self: Any, inputs: Any = None, **kwargs: Any) -> Any:
    token = self(inputs).logits[:, -1:].argmax(-1)
    if kwargs.get("streamer") is not None:
        kwargs["streamer"].put(inputs)
        kwargs["streamer"].put(token)
    return token


def counts_every_position_twice(self: Any, *args: Any, **kwargs: Any) -> Any:
    inputs = LlamaForCausalLM.prepare_inputs_for_generation(self, *args, **kwargs)
    return {**inputs, "position_ids": inputs["position_ids"] * 2}


def gives_all_tokens_again(self: Any, *args: Any, **kwargs: Any) -> Any:
    inputs = LlamaForCausalLM.prepare_inputs_for_generation(self, *args, **{**kwargs, "next_sequence_length": None})
    return {**inputs, "position_ids": None}


@functools.wraps(LlamaForCausalLM.forward)
def leaves_the_cache_alone(self: Any, *args: Any, **kwargs: Any) -> Any:
    return LlamaForCausalLM.forward(self, *args, **{**kwargs, CACHE: None})


@functools.wraps(LlamaForCausalLM.forward)
def reads_the_last_token_alone(self: Any, input_ids: Any, **kwargs: Any) -> Any:
    return LlamaForCausalLM.forward(self, input_ids[:, -1:], **{**kwargs, "position_ids": None})


def by_sink_generate(model: Any, right: int = 0) -> None:
    cache, streamed = SinkCache(model.config, W, S), Tokens()
    try:
        sink_generate(model, random_ids(10), cache=cache, streamer=streamed, **OPTIONS)
    finally:
        assert len(streamed.got) <= 1 + right, "a token was returned"


def by_sink_generate_after_a_token(model: Any) -> None:
    """The first forward pass is right; the second one repeats tokens that the cache has."""
    by_sink_generate(model, right=1)


def by_sink_generate_in_chunks(model: Any) -> None:
    sink_generate(model, random_ids(30), window_length=W, prefill_chunk_size=7, **OPTIONS)


def by_sink_prefill(model: Any) -> None:
    for _ in sink_prefill(model, random_ids(30), SinkCache(model.config, W, S), 7):
        pytest.fail("logits were returned")


def by_session(model: Any) -> None:
    session = SinkSession(model, byte_tokenizer(), window_length=W)
    session.feed("Once upon a time")
    for _ in session.generate(max_new_tokens=12):
        pytest.fail("a token was returned")


GENERATE = [by_sink_generate, by_sink_generate_in_chunks, by_session]
ALL = [*GENERATE, by_sink_prefill]
DRIFTS: list[tuple[str, Any, list[Any], str]] = [
    ("prepare_inputs_for_generation", counts_every_position_twice, GENERATE, "the positions"),
    (
        "prepare_inputs_for_generation",
        gives_all_tokens_again,
        [by_sink_generate_after_a_token],
        "tokens where 1 are new",
    ),
    ("generate", calls_the_cache_otherwise, GENERATE, "calls the cache `kv_store`"),
    ("generate", drops_the_hook, GENERATE, "without `prepare_inputs_for_generation`"),
    ("generate", drops_hook_and_cache, GENERATE, "did not call `prepare_inputs_for_generation`"),
    ("forward", under_a_third_name, ALL, "did not update the cache|the cache was not updated|it lost the cache"),
    ("forward", leaves_the_cache_alone, ALL, "did not update the cache|it lost the cache"),
    ("forward", reads_the_last_token_alone, ALL, "the model reads 1 tokens where|stored none"),
]


@pytest.mark.parametrize(
    ("method", "fake", "call", "says"),
    [
        pytest.param(method, fake, call, says, id=f"{fake.__name__}-{call.__name__}")
        for method, fake, calls, says in DRIFTS
        for call in calls
    ],
)
def test_a_drift_is_noticed_before_a_token_is_returned(method: str, fake: Any, call: Any, says: str) -> None:
    with pytest.raises(RuntimeError, match=says) as raised:
        call(drifted(method, fake))
    said = "\n".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
    assert f"transformers {transformers.__version__} works differently" in said
    assert f"up to {LAST_TESTED}" in said


@pytest.mark.parametrize("call", ALL)
def test_a_mask_not_sized_by_the_cache_is_noticed(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if call is by_sink_prefill:
        call = by_unmasked_prefill
    original = masking_utils.create_causal_mask
    monkeypatch.setattr(
        modeling_llama, "create_causal_mask", lambda *args, **kwargs: original(*args, **{**kwargs, CACHE: None})
    )
    with pytest.raises(RuntimeError, match="did not ask the cache for the sizes of its attention mask"):
        call(tiny())


def by_unmasked_prefill(model: Any) -> None:
    """A chunk of one token gets its mask from the model."""
    for _ in sink_prefill(model, random_ids(30), SinkCache(model.config, W, S), 1):
        pytest.fail("logits were returned")


@pytest.mark.parametrize("call", ALL)
def test_an_unknown_name_of_the_cache_is_noticed(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = drifted("forward", under_a_third_name)
    SinkCache(model.config, W, S)  # measures the positions of the model, once

    def prepare(self: Any, input_ids: Any, kv_store: Any = None, **kwargs: Any) -> Any:
        pytest.fail("the replaced method must not be called")

    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", prepare)
    with pytest.raises(RuntimeError, match="takes no argument cache or past_key_values"):
        call(model)


def test_a_model_without_position_ids_is_noticed_after_a_rebase(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(build_config("llama", num_hidden_layers=2))
    cache = SinkCache(model.config, W, S)
    with torch.no_grad():
        model(random_ids(40), **{CACHE: cache})
    cache.rebase()
    forward = model.forward

    def without_positions(input_ids: Any = None, attention_mask: Any = None, cache: Any = None, **kwargs: Any) -> Any:
        return forward(input_ids, attention_mask=attention_mask, **{CACHE: cache or kwargs.pop(CACHE, None)}, **kwargs)

    monkeypatch.setattr(model, "forward", without_positions)
    for call in (
        lambda: sink_generate(model, random_ids(3), cache=cache, **OPTIONS),
        lambda: list(sink_prefill(model, random_ids(3), cache)),
    ):
        with pytest.raises(RuntimeError, match="takes no `position_ids`, by which positions are lowered"):
            call()
    assert cache.get_seq_length() == 40


def test_a_noticed_drift_leaves_cache_and_model_unchanged() -> None:
    """The same cache and model work without the drift."""
    model = tiny()
    cache = SinkCache(model.config, W, S)
    expected = sink_generate(model, random_ids(10), window_length=W, **OPTIONS)
    for method, fake, _, _ in DRIFTS:
        other = drifted(method, fake)
        with pytest.raises(RuntimeError):
            sink_generate(other, random_ids(10), cache=cache, **OPTIONS)
        assert "prepare_inputs_for_generation" not in vars(other)
        cache.reset()
    assert torch.equal(sink_generate(model, random_ids(10), cache=cache, **OPTIONS), expected)  # type: ignore[arg-type]
    assert "prepare_inputs_for_generation" not in vars(model)


def test_the_cache_is_taken_by_both_names() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    ids = random_ids(10)
    texts: list[Any] = []
    for name in CACHE_NAMES:
        cache = SinkCache(model.config, W, S)
        by_name: dict[str, Any] = {name: cache}
        texts.append(sink_generate(model, ids, **by_name, **OPTIONS))
        assert cache.get_seq_length() == 21
        for _ in sink_prefill(model, ids, **{name: SinkCache(model.config, W, S)}):  # type: ignore[arg-type]
            pass
    assert torch.equal(texts[0], texts[1])
    for call in (sink_generate, lambda *args, **kwargs: list(sink_prefill(*args, **kwargs))):
        with pytest.raises(TypeError, match="`cache` and `past_key_values` must not both be given"):
            call(model, ids, cache=cache, past_key_values=cache)
    with pytest.raises(TypeError, match="`cache` must be a SinkCache, got NoneType"):
        list(sink_prefill(model, ids))


@pytest.mark.filterwarnings("default:.*past_key_values. is deprecated:FutureWarning")
def test_transformers_takes_a_sink_cache_by_each_of_its_names() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    names = CACHE_NAMES if CACHE_NAMES[0] == CACHE else CACHE_NAMES[1:]
    for name in names:
        output = model.generate(
            random_ids(10), **{name: SinkCache(model.config, W, S)}, return_dict_in_generate=True, **OPTIONS
        )
        assert getattr(output, name).kept_length == W


def test_the_last_tested_version_is_the_pinned_one() -> None:
    assert f"transformers=={LAST_TESTED}\n" in (ROOT / "constraints.txt").read_text()


# What this library calls, replaces or reads in transformers, apart from the cache classes. A version that renames one
# of them fails here first.
def called_by_name() -> Iterator[tuple[str, Any, set[str]]]:
    mask = {
        "batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "attention_mask", "device",
    }  # fmt: skip
    for name in ("eager", "sdpa", "flex_attention"):
        yield f"the mask of {name}", masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[name], mask
    generated = {"inputs", "generation_config", "stopping_criteria", "streamer", "custom_generate"}
    yield "generate", GenerationMixin.generate, generated
    prepared = {"input_ids", "next_sequence_length", "attention_mask", "inputs_embeds"}
    for model_class in (GenerationMixin, LlamaForCausalLM):
        yield f"{model_class.__name__}.prepare", model_class.prepare_inputs_for_generation, prepared
    forward = {"input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep"}
    yield "forward", LlamaForCausalLM.forward, forward
    yield "create_causal_mask", masking_utils.create_causal_mask, {"config", "inputs_embeds", "attention_mask"}


@pytest.mark.parametrize(("what", "function", "names"), [pytest.param(*each, id=each[0]) for each in called_by_name()])
def test_functions_of_transformers_take_the_arguments_that_they_are_given(
    what: str, function: Any, names: set[str]
) -> None:
    parameters = inspect.signature(function).parameters
    assert names <= parameters.keys(), names - parameters.keys()


def test_the_cache_has_one_name_in_all_of_transformers() -> None:
    for function in (
        GenerationMixin.prepare_inputs_for_generation,
        LlamaForCausalLM.forward,
        LlamaForCausalLM.prepare_inputs_for_generation,
        masking_utils.create_causal_mask,
        masking_utils.create_masks_for_generate,
    ):
        assert cache_name(function) == CACHE
    for output in (
        BaseModelOutputWithPast,
        CausalLMOutputWithPast,
        GenerateDecoderOnlyOutput,
        GenerateBeamDecoderOnlyOutput,
    ):
        assert CACHE in {field.name for field in dataclasses.fields(output)}


def test_generate_passes_the_inputs_of_every_pass_through_the_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each decoding loop of `generate` calls the method that this library replaces before each forward pass."""
    source = inspect.getsource(transformers.generation.utils)
    loops = re.findall(r"^    def (_sample|_beam_search|_assisted_decoding|_prefill)\(", source, flags=re.MULTILINE)
    assert sorted(loops) == ["_assisted_decoding", "_beam_search", "_prefill", "_sample"]
