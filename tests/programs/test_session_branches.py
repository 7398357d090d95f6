"""A copy of a session is a branch of its stream; a session is not pickled, and a model can always be."""

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

from attention_sinks import SinkCache, SinkSession, sink_generate

from ..support.inside import ids_of
from ..support.models import CACHE
from ..support.tokenizer import END, Answer, byte_tokenizer, chat_model


@pytest.fixture(scope="module")
def model() -> Any:
    return chat_model()


def new(model: Any, **options: Any) -> SinkSession:
    return SinkSession(model, byte_tokenizer(), 48, **options)


TOKENIZER = byte_tokenizer()
# Without these every token is a piece of text, and no answer ends by itself.
SILENT = [token for token in range(len(TOKENIZER)) if not str(TOKENIZER.decode([token])).isascii()]
SILENT += TOKENIZER.all_special_ids


def open_answer(session: SinkSession, **options: Any) -> Any:
    return session.chat("Tell me a story.", suppress_tokens=SILENT, **options)


def failed(session: SinkSession) -> None:
    class Fail(LogitsProcessor):
        calls = 0

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            self.calls += 1
            if self.calls == 5:
                raise ArithmeticError("no number")
            return scores

    with pytest.raises(ArithmeticError):
        list(session.chat("Hello", suppress_tokens=[END], logits_processor=[Fail()]))


MOMENTS: dict[str, Callable[[SinkSession], object]] = {
    "new": lambda session: None,
    "after a document": lambda session: session.feed("It was a bright cold day in April. " * 5),
    "after an answer": lambda session: "".join(session.chat("Hello, who are you?", max_new_tokens=9)),
    "after one that the model ended": lambda session: "".join(
        session.chat("Hello!", logits_processor=[Answer(session.tokenizer, "Yes.")])
    ),
    "past the window": lambda session: "".join(session.chat("Tell me more. " * 9, max_new_tokens=90)),
    "after an error": failed,
    "after an answer that was left": lambda session: next(open_answer(session)),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_copy_goes_on_as_the_session_does_and_neither_changes_the_other(model: Any, moment: str) -> None:
    session = new(model, system="Speak like a pirate.")
    MOMENTS[moment](session)
    branch, other = copy.deepcopy(session), copy.copy(session)
    assert (branch.model, branch.tokenizer, branch.system) == (model, session.tokenizer, session.system)
    assert ids_of(branch) == ids_of(other) == ids_of(session)
    "".join(other.chat("Something else.", max_new_tokens=60))
    for message in ("And then?", "Go on, " * 12):
        answers = ["".join(each.chat(message, max_new_tokens=50)) for each in (session, branch)]
        assert answers[0] == answers[1]
    assert (ids_of(branch), branch.tokens_seen) == (ids_of(session), session.tokens_seen)
    assert ids_of(other) != ids_of(session)


@pytest.mark.parametrize("num_pieces", [0, 1, 30, 80])
def test_an_open_answer_goes_on_after_a_copy_which_continues_it_by_itself(model: Any, num_pieces: int) -> None:
    expected = "".join(open_answer(new(model), max_new_tokens=100))
    session = new(model)
    answer = open_answer(session, max_new_tokens=100)
    told = "".join(islice(answer, num_pieces))
    branch = copy.deepcopy(session)
    branched = copy.deepcopy(branch.cache), list(ids_of(branch))
    assert told + "".join(answer) == expected
    assert branched[1] == ids_of(branch)
    if num_pieces == 0:  # it had not begun
        assert branch.tokens_seen == 0
        return
    assert branched[0].get_seq_length() == branch.cache.get_seq_length() == len(branched[1]) - 1
    with torch.no_grad():  # no call of ours runs on a copy
        model(torch.tensor([branched[1][-1:]]), **{CACHE: branched[0]})
    before = branch.tokens_seen
    rest = "".join(branch.generate(suppress_tokens=SILENT, max_new_tokens=session.tokens_seen - before))
    assert branch.tokens_seen == session.tokens_seen
    assert expected.endswith(rest)


def test_a_session_can_be_copied_in_a_thread_beside_its_reader(model: Any) -> None:
    session, stopped = new(model), threading.Event()
    branches: list[SinkSession] = []
    answer = open_answer(session)
    next(answer)

    def branch() -> None:
        while not stopped.is_set() and len(branches) < 100:
            branches.append(copy.deepcopy(session))

    thread = threading.Thread(target=branch)
    thread.start()
    told = "".join(islice(answer, 200))
    stopped.set()
    thread.join()
    answer.close()
    assert branches
    assert len(told) >= 200
    for each in branches[:3]:
        assert each.cache.get_seq_length() == len(ids_of(each)) - 1
        "".join(each.generate(max_new_tokens=3))


def test_a_thread_that_computes_for_a_session_cannot_copy_it(model: Any) -> None:
    session, refused = new(model), []

    def use(input_ids: Any, scores: Any) -> Any:
        try:
            copy.deepcopy(session)
        except RuntimeError as error:
            refused.append(str(error))
        return scores

    "".join(session.chat("Hello", max_new_tokens=2, logits_processor=[use]))
    assert len(refused) == 2
    assert "another thread" in refused[0]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_session_is_not_pickled_and_says_how_it_is_saved(model: Any, moment: str) -> None:
    session = new(model)
    MOMENTS[moment](session)
    with pytest.raises(TypeError, match=r"model would be pickled.*`save\(path\)`.*`SinkSession.load\("):
        pickle.dumps(session)


@contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """Check that a model has the attributes that it had, and that it can be pickled and copied."""
    before = dict(vars(model))
    yield
    assert vars(model) == before
    pickle.dumps(model)
    copy.deepcopy(model)


@pytest.mark.parametrize("own", [False, True], ids=["", "with a method of its own"])
def test_nothing_stays_on_a_model_whatever_ends_an_answer(model: Any, own: bool) -> None:
    model = copy.deepcopy(model)
    if own:
        model.prepare_inputs_for_generation = model.prepare_inputs_for_generation

    def stop(*args: Any) -> Any:
        raise error

    for error in (ArithmeticError(), RuntimeError("CUDA error"), KeyboardInterrupt(), SystemExit(1), GeneratorExit()):
        with unchanged(model), pytest.raises(type(error)):
            list(new(model).chat("Hello", logits_processor=[stop]))
        with unchanged(model):
            hook = model.model.layers[1].register_forward_pre_hook(stop)
            with pytest.raises(type(error)):
                list(new(model).chat("Hello"))
            hook.remove()
    for leave in (lambda answer: answer.close(), lambda answer: None, lambda answer: answer.throw(ArithmeticError)):
        with unchanged(model):
            answer = open_answer(new(model))
            next(answer)
            with suppress(ArithmeticError):
                leave(answer)
            del answer
    with unchanged(model), pytest.raises(ValueError, match="temperature"):
        new(model).chat("Hello", do_sample=True, temperature=-1.0)


def test_a_model_can_be_copied_and_pickled_while_an_answer_is_open(model: Any) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    expected: Any = sink_generate(model, ids, max_new_tokens=5)
    with unchanged(model):
        answer, other = open_answer(new(model)), open_answer(new(model))
        next(answer), next(other)
        copies = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
        copies += [copy.deepcopy(copies[1])]
        answer.close()
        copies.append(copy.deepcopy(model))
        other.close()
    for each in copies:
        output: Any = sink_generate(each, ids, max_new_tokens=5)
        assert torch.equal(output, expected)
        output = each.generate(ids, max_new_tokens=5, **{CACHE: SinkCache(each.config, 16)})
        assert torch.equal(output, expected)
        pickle.dumps(each)
