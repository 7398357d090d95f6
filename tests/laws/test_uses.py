"""What people do with a stream, by each way of calling a model: the outcome is right, or refused with a remedy.

Right is what the plain rule of the paper gives, token by token. After a refusal the stream goes on as if nobody had
asked, and the model is what it was.
"""

import contextlib
import copy
import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding, DynamicCache

from attention_sinks import SinkCache, SinkSession, sink_generate, sink_prefill

from ..support.models import CACHE, build_config, build_model, random_ids, relative_error
from ..support.reference import StreamingLlama
from ..support.streams import OPTIONS, S, W, prefilled
from ..support.tokenizer import byte_tokenizer

pytestmark = pytest.mark.usefixtures("no_grad", "_forget_what_was_compiled")

NEW = 6
# How many tokens the text has, of which the last one is new: the window is not full, fills now, or was passed long ago.
AGES = {"below": 8, "across": W - 2, "past": 40}
TEXT = "a stream without end, told in single bytes"
SIZES: dict[str, Any] = {"num_hidden_layers": 2, "vocab_size": 259}


@dataclass
class Stream:
    """A stream, and how the next call is made."""

    model: Any
    cache: SinkCache
    text: Tensor
    session: SinkSession | None = None
    inputs: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    context: contextlib.AbstractContextManager[Any] = field(default_factory=contextlib.nullcontext)


# Each returns the tokens that it fed, of which the first is the last one of the text, and the logits after each.
Called = tuple[Tensor, Tensor]


def greedily(s: Stream, logits: Tensor) -> Called:
    return torch.cat([s.text[0, -1:], logits.argmax(-1)[:-1]]), logits


def by_generate(s: Stream) -> Called:
    output = s.model.generate(s.inputs, **{CACHE: s.cache}, max_new_tokens=NEW, **OPTIONS, **s.options)
    return greedily(s, torch.cat(output.logits))


def by_sink_generate(s: Stream) -> Called:
    output: Any = sink_generate(s.model, s.inputs, cache=s.cache, max_new_tokens=NEW, **OPTIONS, **s.options)
    return greedily(s, torch.cat(output.logits))


def by_sink_prefill(s: Stream) -> Called:
    new = torch.cat([s.text[:, -1:], random_ids(NEW - 1, seed=5)], dim=1) if s.inputs is s.text else s.inputs
    outputs: list[Any] = list(sink_prefill(s.model, new, s.cache, 4, **s.options))
    return new[0], torch.cat([output.logits[0] for output in outputs])


def by_session(s: Stream) -> Called:
    assert s.session is not None
    logits: list[Tensor] = []

    def note(input_ids: Tensor, scores: Tensor) -> Tensor:
        logits.append(scores.clone())
        return scores

    list(s.session.generate(**{"max_new_tokens": NEW, "do_sample": False, "logits_processor": [note], **s.options}))
    return greedily(s, torch.cat(logits))


def by_loop(s: Stream) -> Called:
    token, logits = s.text[:, -1:], []
    for _ in range(NEW):
        logits.append(s.model(token, **{CACHE: s.cache}, **s.options).logits[:, -1])
        token = logits[-1].argmax(-1, keepdim=True)
    return greedily(s, torch.cat(logits))


WAYS: dict[str, Callable[[Stream], Called]] = {
    "generate": by_generate,
    "sink_generate": by_sink_generate,
    "sink_prefill": by_sink_prefill,
    "session": by_session,
    "loop": by_loop,
}


def session_of(model: Any, age: str) -> SinkSession:
    session = SinkSession(model, byte_tokenizer(None), W, S)
    session.feed(TEXT[: AGES[age]])
    return session


def stream(way: str, age: str) -> Stream:
    model = build_model(build_config("llama", **SIZES))
    if way == "session":
        session = session_of(model, age)
        return Stream(
            model, session.cache, session.tokenizer(TEXT[: AGES[age]], return_tensors="pt").input_ids, session
        )
    text, cache = random_ids(AGES[age]), SinkCache(model.config, W, S)
    prefilled(model, text[:, :-1], cache, 4)
    return Stream(model, cache, text, inputs=text)


def check_right(s: Stream, called: Called) -> None:
    new, logits = called
    rule = StreamingLlama(s.model, W, S)
    expected = [rule.step(int(token)) for token in [*s.text[0, :-1], *new]]
    assert relative_error(logits, torch.stack(expected[-NEW:])) < 1e-4


# --- what people do


def with_model(wrap: Callable[[Any], Any]) -> Callable[[Stream], None]:
    def change(s: Stream) -> None:
        s.model = wrap(s.model)
        if s.session is not None:
            s.session = session_of(s.model, {length: age for age, length in AGES.items()}[s.text.shape[1]])
            s.cache = s.session.cache

    return change


def with_cache(make: Callable[[SinkCache], SinkCache]) -> Callable[[Stream], None]:
    def change(s: Stream) -> None:
        s.cache = make(s.cache)

    return change


def with_inputs(make: Callable[[Tensor], Any], **options: Any) -> Callable[[Stream], None]:
    def change(s: Stream) -> None:
        s.inputs, s.options = make(s.text), options

    return change


def with_options(**options: Any) -> Callable[[Stream], None]:
    def change(s: Stream) -> None:
        s.options = options

    return change


def adapted(model: Any) -> Any:
    """A LoRA adapter that has learned nothing."""
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).eval()


def prompt_tuned(model: Any) -> Any:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(model, config).eval()


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def replaced(cache: SinkCache) -> SinkCache:
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    return cache


def moved(cache: SinkCache) -> SinkCache:
    return cache.to(torch.float64).to("cpu", torch.float32)


def resumed(cache: SinkCache) -> SinkCache:
    with tempfile.TemporaryDirectory() as folder:
        cache.save(Path(folder) / "stream")
        return SinkCache.load(Path(folder) / "stream", build_config("llama", **SIZES))


def of_another_config(**changes: Any) -> Callable[[SinkCache], SinkCache]:
    def make(cache: SinkCache) -> SinkCache:
        config = build_config("llama", **{**SIZES, **changes})
        other = SinkCache(config, W, S)
        prefilled(build_model(config), random_ids(cache.get_seq_length()), other, 4)
        return other

    return make


def fail_before_the_layers(s: Stream) -> None:
    fail(s.model, s.model.model.layers[0], s)


def fail_between_the_layers(s: Stream) -> None:
    fail(s.model, s.model.model.layers[1], s)


def fail(model: Any, layer: Any, s: Stream) -> None:
    def raising(*_: Any) -> None:
        raise MemoryError

    hook = layer.register_forward_pre_hook(raising)
    with pytest.raises(MemoryError):
        model(s.text[:, -1:], **{CACHE: s.cache})
    hook.remove()


def in_inference_mode(s: Stream) -> None:
    s.context = torch.inference_mode()


CALLS, ALL = ("generate", "sink_generate"), tuple(WAYS)
PROMPTS = ("sink_generate", "sink_prefill")
# What is done, and by which ways.
RIGHT: dict[str, tuple[Callable[[Stream], None], tuple[str, ...]]] = {
    "nothing else": (lambda s: None, ALL),
    "the model is compiled": (with_model(compiled), ALL),
    "the model has an adapter": (with_model(adapted), ALL),
    "the model is a replica": (with_model(torch.nn.DataParallel), (*PROMPTS, "session", "loop")),
    "the model trains": (with_model(lambda model: model.train()), ALL),
    "keys and values are replaced": (with_cache(replaced), ALL),
    "the cache is moved and comes back": (with_cache(moved), ALL),
    "the cache is copied": (with_cache(copy.deepcopy), (*PROMPTS, "generate", "loop")),
    "the cache is forked": (with_cache(lambda cache: cache.fork()), (*PROMPTS, "generate", "loop")),
    "the cache is saved and resumed": (with_cache(resumed), (*PROMPTS, "generate", "loop")),
    "only what is new": (with_inputs(lambda text: text[:, -1:]), ("sink_generate",)),
    "a mask of ones": (lambda s: s.options.update(attention_mask=torch.ones_like(s.text)), CALLS),
    "without gradients": (in_inference_mode, ALL),
    "an error before anything was stored": (fail_before_the_layers, ALL),
}
# What is done, by which ways, and what the error says.
REFUSED: dict[str, tuple[Callable[[Stream], None], tuple[str, ...], str]] = {
    "a prompt is tuned": (with_model(prompt_tuned), PROMPTS, "`model` must not have a learned prompt.*inputs_embeds"),
    "`**` is forgotten": (with_inputs(lambda text: BatchEncoding({"input_ids": text})), PROMPTS, r"pass it as `\*\*"),
    "a list": (with_inputs(lambda text: text.tolist()), PROMPTS, "`input.*got a list: pass `torch.tensor`"),
    "a string": (with_inputs(lambda text: "text"), PROMPTS, "`input.*got a str: pass .*tokenizer"),
    "one dimension": (with_inputs(lambda text: text[0]), PROMPTS, "`input.*Add a dimension"),
    "three dimensions": (with_inputs(lambda text: text[None]), PROMPTS, "`input.*must have the shape"),
    "numbers that are no ids": (with_inputs(lambda text: text.float()), PROMPTS, r"`input.*\.long\(\)"),
    "ids beyond the vocabulary": (with_inputs(lambda text: text + 259), PROMPTS, "`input.*must be from 0 to 258"),
    "nothing at all": (with_inputs(lambda text: text[:, :0]), ("sink_generate",), "`inputs` must have tokens"),
    "nothing that is new": (
        with_inputs(lambda text: text[:, :-1]),
        CALLS,
        "`input_ids` (of .* may be|begin like the stream).*attention_mask",
    ),
    "two rows for one": (with_inputs(lambda text: text.repeat(2, 1)), (*CALLS, "sink_prefill"), "batch|rows|sequences"),
    "labels": (with_options(labels=random_ids(3)), PROMPTS, "`labels` must be left out"),
    "positions": (with_options(position_ids=random_ids(3)), PROMPTS, "`position_ids`"),
    "no use of the cache": (with_options(use_cache=False), PROMPTS, "`use_cache`"),
    "a cache of another kind": (with_cache(lambda cache: DynamicCache()), PROMPTS, "`cache` must be a SinkCache"),  # type: ignore[return-value,arg-type]
    "another `rope_theta`": (
        with_cache(of_another_config(rope_parameters={"rope_type": "default", "rope_theta": 5e5})),
        PROMPTS,
        "`cache` must be made with the config of `model`: rope_parameters",
    ),
    "fewer layers": (
        with_cache(of_another_config(num_hidden_layers=1)),
        PROMPTS,
        "`cache` must be made with the config of `model`: num_hidden_layers",
    ),
    "a wider head": (
        with_cache(of_another_config(head_dim=32)),
        (*PROMPTS, "generate", "loop"),
        "`cache` must be made with the config|`key_states` must keep",
    ),
    "half of the precision": (with_model(lambda model: copy.deepcopy(model).half()), ("generate", "loop"), r"`to\("),
    "the cache went elsewhere": (with_cache(lambda cache: cache.to(torch.float64)), ALL, r"`to\(.*torch.float32"),
    "many answers": (with_options(num_return_sequences=2, do_sample=True), ("session",), "`num_return_sequences` must"),
    "pages": (with_options(cache_implementation="paged"), (*PROMPTS[:1], "session"), "`cache_implementation` must be"),
}


def cells(table: dict[str, Any]) -> list[Any]:
    return [
        pytest.param(age, way, *row[::2], id=f"{what}-{way}-{age}")
        for what, row in table.items()
        for way in row[1]
        for age in AGES
    ]


@pytest.mark.parametrize(("age", "way", "change"), cells(RIGHT))
def test_the_outcome_is_right(age: str, way: str, change: Callable[[Stream], None]) -> None:
    s = stream(way, age)
    as_it_was = dataclasses.replace(s)
    change(s)
    with s.context:
        called = WAYS[way](s)
    check_right(as_it_was, called)


@pytest.mark.parametrize(("age", "way", "change", "message"), cells(REFUSED))
def test_the_outcome_is_refused(age: str, way: str, change: Callable[[Stream], None], message: str) -> None:
    s = stream(way, age)
    as_it_was, at_rest = dataclasses.replace(s), set(vars(s.model))
    change(s)
    seen = s.cache.get_seq_length()
    with pytest.raises((TypeError, ValueError, NotImplementedError, RuntimeError), match=message):
        WAYS[way](s)
    assert s.cache.get_seq_length() == seen
    assert set(vars(as_it_was.model)) == at_rest
    as_it_was.cache.to(torch.float32)
    check_right(as_it_was, WAYS[way](as_it_was))
