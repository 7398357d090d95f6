"""What a session needs is checked before anything is read; what is refused or fails leaves a stream that goes on."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaModel

from attention_sinks import SinkSession

from ..support.inside import ids_of
from ..support.models import LATER
from ..support.tokenizer import END, Answer, byte_tokenizer, chat_model


@pytest.fixture
def model() -> Any:
    return chat_model()


def rounded(model: Any) -> Any:
    return model.to(torch.bfloat16)


class Processor:
    """As of a model with images: it has a template, and is called like a tokenizer."""

    def __init__(self) -> None:
        self.tokenizer = byte_tokenizer()
        self.chat_template = self.tokenizer.chat_template


LAST_ONLY = "{{ messages[-1].content }}:"
SHOUTING = "{% for m in messages %}{{ m.content if m.role == 'assistant' else m.content | upper }}{% endfor %}"


@pytest.mark.parametrize(
    ("change", "tokenizer", "options", "error", "message"),
    [
        (lambda model: "llama", byte_tokenizer(), {}, TypeError, "`model` must be .*, got str"),
        (lambda model: model.model, byte_tokenizer(), {}, TypeError, "`model` must be .* generate, got LlamaModel"),
        (rounded, byte_tokenizer(), {}, ValueError, "`model` has rotary frequencies rounded to torch.bfloat16"),
        (None, None, {}, TypeError, "`tokenizer` must be a tokenizer of transformers, got NoneType"),
        (None, "llama", {}, TypeError, "`tokenizer` must be a tokenizer of transformers, got str"),
        (None, Processor(), {}, TypeError, "`tokenizer` must be .*, got Processor. Pass its `tokenizer`"),
        (None, byte_tokenizer(LAST_ONLY), {}, ValueError, "not show earlier answers.*`tokenizer.chat_template`.*`feed"),
        (None, byte_tokenizer(SHOUTING), {}, ValueError, "not show messages as they are.*`tokenizer.chat_template`"),
        (None, byte_tokenizer(None), {"system": "Be brief."}, ValueError, "`tokenizer` has no chat template"),
        (None, byte_tokenizer(), {"system": 5}, TypeError, "`system` must be a string, got 5"),
        (None, byte_tokenizer(), {"system": " "}, ValueError, "`system` must not be empty"),
        (None, byte_tokenizer(), {"window_length": 0}, ValueError, "`window_length` must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_what_a_session_cannot_be_made_of_is_refused(
    model: Any, change: Any, tokenizer: Any, options: Any, error: type[Exception], message: str
) -> None:
    assert LlamaModel is type(model.model)
    with pytest.raises(error, match=message):
        SinkSession(model if change is None else change(model), tokenizer, **options)


CALLS: dict[str, Callable[[SinkSession], object]] = {
    "feed": lambda session: session.feed("Some text, longer than the window. " * 3),
    "chat": lambda session: "".join(session.chat("Hello", max_new_tokens=5)),
    "generate": lambda session: "".join(session.generate(max_new_tokens=5)),
}
STARTS: dict[str, Callable[[SinkSession], object]] = {
    "new": lambda session: None,
    "after a text": lambda session: session.feed("Once"),
    "past the window": lambda session: "".join(session.chat("Tell me more. " * 5, max_new_tokens=30)),
    "after an answer that the model ended": lambda session: "".join(
        session.chat("Hello!", logits_processor=[Answer(session.tokenizer, "Yes.")])
    ),
}


def state(session: SinkSession) -> Any:
    """What tells streams apart; a compacted one is the same."""
    return session.tokens_seen, session.kept_length, ids_of(session)[-12:]


def test_a_model_that_a_session_can_read_with_no_more_is_refused_and_changes_nothing(model: Any) -> None:
    for start in STARTS:
        session, well = SinkSession(model, byte_tokenizer(), 32), model
        STARTS[start](session)
        before = state(session)
        session.model = rounded(copy.deepcopy(model))
        for call in CALLS:
            if (call, start) != ("generate", "new"):
                with pytest.raises(ValueError, match="`model` has rotary frequencies rounded to torch.bfloat16"):
                    CALLS[call](session)
        assert state(session) == before
        session.model = well
        "".join(session.chat("And now?", max_new_tokens=3))


def test_tokens_without_embeddings_are_refused_before_anything_is_read(model: Any) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["tea"])
    session = SinkSession(model, tokenizer, 32)
    session.feed("Once")
    before = state(session)
    for call in (session.feed, session.chat):
        with pytest.raises(
            ValueError, match=r"`tokenizer\(text\)` must be from 0 to 258.* got 259. Use the tokenizer of the model"
        ):
            call("Some tea? " * 20)
    assert state(session) == before
    session.feed("Some coffee?")


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("call", CALLS)
def test_an_error_before_anything_is_read_changes_nothing(model: Any, start: str, call: str) -> None:
    session, untouched = (SinkSession(model, byte_tokenizer(), 32) for _ in range(2))
    for each in (session, untouched):
        STARTS[start](each)
    before = state(session)

    def fail(*_: Any) -> None:
        raise ArithmeticError

    hook = model.register_forward_pre_hook(fail)
    if not (call == "generate" and start == "new"):
        with pytest.raises(ArithmeticError):
            CALLS[call](session)
    hook.remove()
    assert state(session) == before
    answers = ["".join(each.chat("And now?", max_new_tokens=20)) for each in (session, untouched)]
    assert answers[0] == answers[1]


def test_a_text_beyond_the_last_position_of_a_model_is_refused_before_any_of_it_is_read() -> None:
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "use_sliding_window": True}
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = chat_model("qwen3", **layers, head_dim=32, max_position_embeddings=200, rope_parameters=rope)
    session = SinkSession(model, byte_tokenizer(), 24)
    assert not session.cache.can_rebase
    limit = session.cache.position_limit
    "".join(session.chat("Hello", max_new_tokens=3))
    before, left = state(session), limit - session.cache.get_seq_length()
    for call in (session.feed, session.chat):
        with pytest.raises(ValueError, match=rf"at most {left} tokens now, got \d+: the positions.*at {limit}"):
            call("a" * left)
    assert state(session) == before
    session.feed("a" * (left - 60))


def failing(kind: str) -> dict[str, Any]:
    """A logits processor or a stopping criterion that fails in its fifth call."""
    calls = []

    def fail(input_ids: Any, scores: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise ArithmeticError("no number")
        return scores

    def criterion(input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        fail(input_ids, scores)
        return torch.zeros(1, dtype=torch.bool)

    return {kind: [fail if kind == "logits_processor" else criterion]}


def failing_tokenizer() -> Any:
    """Fails in its 30th decoding, and never again."""
    tokenizer = byte_tokenizer()
    decode, decoded = tokenizer.decode, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        decoded.append(1)
        if len(decoded) == 30:
            raise ArithmeticError("no text")
        return decode(*args, **kwargs)

    tokenizer.decode = failing  # type: ignore[method-assign]
    return tokenizer


@pytest.mark.parametrize("window_length", [24, 500])
@pytest.mark.parametrize("culprit", ["logits_processor", "stopping_criteria", "tokenizer"])
def test_an_answer_that_an_error_ended_goes_on_as_if_there_had_been_none(
    model: Any, culprit: str, window_length: int
) -> None:
    options: dict[str, Any] = {"suppress_tokens": [END], "max_new_tokens": 40}
    whole = SinkSession(model, byte_tokenizer(), window_length)
    text = "".join(whole.chat("Tell me a story.", **options))
    fails = {} if culprit == "tokenizer" else failing(culprit)
    tokenizer = failing_tokenizer() if culprit == "tokenizer" else byte_tokenizer()
    session = SinkSession(model, tokenizer, window_length)
    with pytest.raises(ArithmeticError):
        list(session.chat("Tell me a story.", **options, **fails))
    missing = whole.tokens_seen - session.tokens_seen
    assert 0 < missing < 40
    again = copy.deepcopy(session)
    with pytest.raises(ValueError, match="temperature"):
        session.generate(do_sample=True, temperature=-1.0)
    for each in (session, again):
        rest = "".join(each.generate(**{**options, "max_new_tokens": missing}))
        assert text.endswith(rest)
        assert state(each) == state(whole)
    answers = ["".join(each.chat("And now?", **options)) for each in (session, whole)]
    assert answers[0] == answers[1]


@pytest.mark.skipif("qwen3_next" not in LATER, reason="early transformers 5 has no such model")
def test_an_answer_that_cannot_go_on_after_an_error_says_what_can() -> None:
    session = SinkSession(chat_model("qwen3_next"), byte_tokenizer(), 24)
    with pytest.raises(ArithmeticError):
        list(session.chat("Hello", suppress_tokens=[END], **failing("logits_processor")))
    before = state(session)
    with pytest.raises(ValueError, match=r"cannot be continued.*'qwen3_next'.*`chat\(message\)` goes on"):
        session.generate()
    assert state(session) == before
    "".join(session.chat("And now?", max_new_tokens=3))
