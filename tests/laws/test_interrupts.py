"""After an exception a cache continues exactly, or the next call reports that it cannot. It is never shifted silently.

Every line of this library and of the layers of `transformers` that a forward pass or a change of the cache executes is
made to raise, one after the other.
"""

import copy
import dis
import functools
import itertools
import sys
from collections.abc import Callable, Container, Iterable
from types import CodeType, FrameType
from typing import Any, Self

import pytest
import torch
from torch import Tensor
from transformers import cache_utils

from attention_sinks import SinkCache, SinkSession, sink_prefill

from ..support import inside
from ..support.models import CACHE, LATER, build_config, build_model, random_ids, relative_error, tiny_model
from ..support.streams import S, W, read
from ..support.tokenizer import END, byte_tokenizer, chat_model

FILES = (*inside.library_files(), cache_utils.__file__)
RESTORING = inside.restoring_functions()

pytestmark = pytest.mark.usefixtures("no_grad")


@functools.cache
def is_safe(code: CodeType, line: int) -> bool:
    """True for lines that restore a flag without a call: Python looks for Ctrl-C at calls and in loops only."""
    if code not in RESTORING:
        return False
    names = [each.opname for each in dis.get_instructions(code) if each.positions and each.positions.lineno == line]
    return not any(name.startswith(("CALL", "JUMP_BACKWARD", "RESUME", "SEND", "YIELD")) for name in names)


class Interrupt:
    """Counts the lines that are executed inside, and raises KeyboardInterrupt at line number `at`."""

    def __init__(self, at: int) -> None:
        self.at, self.lines = at, 0

    def __enter__(self) -> Self:
        self._before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> bool:
        sys.settrace(self._before)
        return kind is KeyboardInterrupt

    def _called(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename in FILES else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line" and not is_safe(frame.f_code, frame.f_lineno):
            self.lines += 1
            if self.lines == self.at:
                self.where = frame.f_code.co_qualname, frame.f_lineno
                raise KeyboardInterrupt
        return self._line


Change = Callable[[Any, SinkCache], object]
CHANGES: dict[str, Change] = {
    "a token": lambda model, cache: read(model, cache, random_ids(1, max(inside.num_rows(cache), 1), seed=3)),
    "a chunk": lambda model, cache: read(model, cache, random_ids(5, max(inside.num_rows(cache), 1), seed=3)),
    "a long chunk": lambda model, cache: read(model, cache, random_ids(30, max(inside.num_rows(cache), 1), seed=3)),
    "a chunk with a window for each token": lambda model, cache: inside.read_windowed(
        model, cache, random_ids(5, seed=3)
    ),
    "reorder": lambda model, cache: cache.reorder_cache(torch.tensor([1, 0])),
    "select": lambda model, cache: cache.batch_select_indices(torch.tensor([1, 1])),
    "crop": lambda model, cache: cache.crop(-3),
    "rebase": lambda model, cache: cache.rebase(),
    "compact": lambda model, cache: cache.compact(),
    "move": lambda model, cache: cache.to("cpu", torch.float32),
    "reset": lambda model, cache: cache.reset(),
}


def started(model: Any, lengths: list[int], rows: int = 1, pads: int = 0) -> SinkCache:
    mask = None
    if pads:
        mask = torch.ones(rows, lengths[0], dtype=torch.long)
        mask[0, :pads] = 0
    cache = SinkCache(model.config, W, S, attention_mask=mask)
    for ids in random_ids(sum(lengths), rows).split(lengths, dim=1):
        read(model, cache, ids)
    return cache


def continued(model: Any, cache: SinkCache) -> list[Tensor]:
    rows = max(inside.num_rows(cache), 1)
    return [read(model, cache, random_ids(length, rows, seed=9)) for length in (1, 1, 4, 1)]


def check_everywhere(model: Any, cache: SinkCache, change: Change) -> tuple[int, int]:
    """Interrupt a change at every line; return how often the cache continued, and how often it refused."""
    done, undone = copy.deepcopy(cache), copy.deepcopy(cache)
    change(model, done)
    expected = [continued(model, each) for each in (undone, done)]
    exact = refused = at = 0
    while True:
        at += 1
        broken = copy.deepcopy(cache)
        with Interrupt(at) as interrupt:
            change(model, broken)
        if interrupt.lines < at:
            return exact, refused
        try:
            logits = continued(model, broken)
        except RuntimeError as error:
            assert "interrupted" in str(error), f"at {interrupt.where}"  # noqa: PT017
            refused += 1
            broken.reset()
            read(model, broken, random_ids(20))
            continue
        errors = [
            max(relative_error(mine, others) for mine, others in zip(logits, each, strict=True)) for each in expected
        ]
        assert min(errors) < 1e-5, f"at {interrupt.where}: {errors}"
        exact += 1


HYBRIDS = sorted(LATER.keys() - {"lfm2"})
STREAMS = {"empty": [], "below the window": [5], "past it": [20, 1, 1]}
FORWARD = [
    *itertools.product(["llama", "sliding beside full", "deepseek_v3"], STREAMS, list(CHANGES)[:4]),
    *itertools.product(HYBRIDS, ["empty", "past it"], ["a token", "a chunk"]),
]
QUICK = [("llama", "past it", "a token"), ("llama", "past it", "a chunk")]


def exhaustive(cases: Iterable[Any], quick: Container[Any]) -> list[Any]:
    """Mark all cases but a few quick ones."""
    return [pytest.param(*case, marks=[] if case in quick else [pytest.mark.exhaustive]) for case in cases]


@pytest.mark.parametrize(("name", "stream", "change"), exhaustive(FORWARD, QUICK))
def test_a_forward_pass_interrupted_at_any_line_is_exact_or_noticed(name: str, stream: str, change: str) -> None:
    model = tiny_model(name)
    cache = started(model, STREAMS[stream])
    if "window for each" in change and not cache.supports_windowed_chunks:
        pytest.skip("its masks cannot be replaced")
    exact, refused = check_everywhere(model, cache, CHANGES[change])
    assert exact > 0, "before the first layer"
    assert refused > 0, "between layers"


def test_a_token_after_replaced_states_interrupted_at_any_line_is_exact_or_noticed() -> None:
    model = tiny_model("llama")
    cache = started(model, [20, 1])
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.double(), layer.values.double()
    check_everywhere(model, cache, CHANGES["a token"])


@pytest.mark.exhaustive
@pytest.mark.parametrize("change", ["a token", "a chunk"])
@pytest.mark.parametrize("lengths", [[10], [10, *[1] * 12]], ids=["with pads", "past them"])
def test_a_padded_forward_pass_interrupted_at_any_line_is_exact_or_noticed(change: str, lengths: list[int]) -> None:
    model = tiny_model("llama", 2)
    check_everywhere(model, started(model, lengths, rows=2, pads=4), CHANGES[change])


BETWEEN = [
    *itertools.product(
        ["llama", "deepseek_v3", *sorted(LATER.keys() - {"qwen3_next", "lfm2"})],
        ["reorder", "select", "crop", "rebase", "compact", "move", "reset"],
    )
]


@pytest.mark.parametrize(("name", "change"), exhaustive(BETWEEN, [case for case in BETWEEN if case[0] == "llama"]))
def test_a_change_interrupted_at_any_line_is_exact_or_noticed(name: str, change: str) -> None:
    if (name, change) == ("falcon_h1", "crop"):
        pytest.skip("its linear attention cannot be cropped")
    model = tiny_model(name)
    rows = 2 if change in ("reorder", "select") else 1
    exact, _ = check_everywhere(model, started(model, [20, 1, 1], rows), CHANGES[change])
    assert exact > 0


PLACES = ["before", "in its mixer", "after"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("CUDA error")])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["llama", "sliding beside full", *HYBRIDS])
def test_an_error_of_the_model_in_any_layer_is_harmless_or_noticed(name: str, place: str, error: Any) -> None:
    """Hooks raise, not lines of the library: as an error of a kernel, or as Ctrl-C while a kernel runs."""
    model = tiny_model(name)
    base = started(model, [20, 1])
    undone, done = copy.deepcopy(base), copy.deepcopy(base)
    CHANGES["a token"](model, done)
    expected = [continued(model, each) for each in (undone, done)]

    def fail(*_: object) -> None:
        raise error

    refused = 0
    for k, layer in enumerate(model.model.layers):
        mixer = next(m for n, m in layer.named_modules() if n.endswith(("o_proj", "out_proj")))
        hook = {"before": layer.register_forward_pre_hook, "in its mixer": mixer.register_forward_pre_hook}.get(
            place, layer.register_forward_hook
        )(fail)
        broken = copy.deepcopy(base)
        with pytest.raises((KeyboardInterrupt, RuntimeError)):
            CHANGES["a token"](model, broken)
        hook.remove()
        try:
            logits = continued(model, broken)
        except RuntimeError as said:
            assert "interrupted" in str(said)  # noqa: PT017
            refused += 1
            continue
        assert (k, place) in (
            (0, "before"),
            (len(model.model.layers) - 1, "after"),
            (len(model.model.layers) - 1, PLACES[1]),
        )
        assert torch.equal(torch.cat(logits, 1), torch.cat(expected[place != "before"], 1))
    assert refused >= len(model.model.layers) - 1


def test_layers_that_disagree_are_noticed() -> None:
    cache = started(tiny_model("llama", 2), [20])
    inside.make_layers_disagree(cache)
    with pytest.raises(RuntimeError, match="interrupted between two layers: they have seen 19 and 20 tokens"):
        read(tiny_model("llama", 2), cache, random_ids(1))
    calls: list[Callable[[], object]] = [
        cache.rebase, cache.compact, lambda: cache.crop(-1), lambda: cache.reorder_cache(torch.tensor([0]))
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(RuntimeError, match=r"interrupted.*`reset\(\)`"):
            call()


def test_a_refused_change_of_the_batch_changes_nothing() -> None:
    model = tiny_model("llama")
    cache, untouched = started(model, [20, 1], rows=2), started(model, [20, 1], rows=2)
    calls: list[Callable[[], object]] = [
        lambda: cache.batch_select_indices(torch.tensor([0, 5])),
        lambda: cache.reorder_cache(torch.tensor([2, 0])),
        lambda: cache.batch_repeat_interleave(0),
    ]
    for refused in calls:
        with pytest.raises((IndexError, ValueError)):
            refused()
    for mine, others in zip(continued(model, cache), continued(model, untouched), strict=True):
        assert torch.equal(mine, others)


@pytest.mark.parametrize("failing_layer", [1, 3])
def test_the_next_forward_pass_notices_an_interrupted_one(failing_layer: int) -> None:
    model = build_model(build_config("llama", num_hidden_layers=4))
    cache, ids = SinkCache(model.config, 8, 2), random_ids(31)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        model(ids[:, :30], **{CACHE: cache})
        hook = model.model.layers[failing_layer].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 30:], **{CACHE: cache})
        hook.remove()
        where = rf"interrupted between layer {failing_layer - 1} and layer 3.*`reset\(\)`"
        with pytest.raises(RuntimeError, match=where):
            model(ids[:, 30:], **{CACHE: cache})
        cache.reset()
        model(ids, **{CACHE: cache})
    assert cache.kept_length == 8


def leave(session: SinkSession) -> None:
    answer = session.chat("Hello", suppress_tokens=[END])
    next(answer)
    answer.close()


SESSION_CALLS: dict[str, Callable[[SinkSession], object]] = {
    "feed": lambda session: session.feed("It was a cold day. " * 3),
    "chat": lambda session: "".join(session.chat("Hello", max_new_tokens=30)),
    "generate": lambda session: "".join(session.generate(max_new_tokens=30)),
    "an answer that is left": leave,
}


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a generator that is dropped
@pytest.mark.parametrize("call", SESSION_CALLS)
def test_a_session_whose_reader_is_interrupted_at_any_line_goes_on(call: str) -> None:
    """The lines of the reader alone: the thread where the forward passes run gets no Ctrl-C."""
    model, tokenizer, read = chat_model(num_hidden_layers=1), byte_tokenizer(), list[int]()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: read.extend(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    for at in itertools.count(1, 7):
        session = SinkSession(model, tokenizer, 32)
        read.clear()
        "".join(session.chat("Hi", max_new_tokens=3))
        with Interrupt(at) as interrupt:
            SESSION_CALLS[call](session)
        "".join(session.chat("And now?", max_new_tokens=10))
        if interrupt.lines < at:
            assert at > 50
            return
        ids = [*read, *inside.ids_of(session)[-1:]]
        assert session.tokens_seen == len(ids), f"at {interrupt.where}"
        expected: Any = list(sink_prefill(model, torch.tensor([ids]), SinkCache(model.config, 32)))[-1].logits
        mine = model(input_ids=torch.tensor([ids[-1:]]), **{CACHE: session.cache}).logits
        assert relative_error(mine, expected[:, -1:]) < 1e-4, f"at {interrupt.where}"
