"""All forward passes of a session run on one thread, which ends with the session, the process or a fork of it."""

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList

from attention_sinks import SinkSession, sink_generate

from ..support.compiling import Compiler, compile_everywhere
from ..support.inside import Worker, gnu_openmp, thread_of
from ..support.tokenizer import END, Answer, byte_tokenizer, chat_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model() -> Any:
    return chat_model()


@contextmanager
def passes(model: Any, note: Callable[[], Any]) -> Iterator[list[Any]]:
    """What `note` returns in each forward pass."""
    noted: list[Any] = []
    handle = model.register_forward_pre_hook(lambda *_: noted.append(note()))
    try:
        yield noted
    finally:
        handle.remove()


def fail(input_ids: Any, scores: Any) -> Any:
    raise ArithmeticError("no number")


def open_answer(session: SinkSession) -> Any:
    answer = session.chat("Hello", suppress_tokens=[END])
    next(answer)
    return answer


def ends(thread: threading.Thread) -> bool:
    thread.join(30)
    return not thread.is_alive()


def run(script: str, before: str = "") -> subprocess.CompletedProcess[str]:
    header = before + "from tests.programs.test_session_thread import *\nmodel = chat_model()\n"
    command = [sys.executable, "-c", header + script]
    env = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}  # early transformers 5 warns of a missing mask
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=False, timeout=300)


def test_all_forward_passes_of_a_session_run_on_one_thread(model: Any) -> None:
    sessions = [SinkSession(model, byte_tokenizer(), 16) for _ in range(2)]
    threads = []
    for session in sessions:
        with passes(model, threading.get_ident) as noted:
            session.feed("A text longer than the window. " * 3)
            "".join(session.chat("Hello", max_new_tokens=40))
            with pytest.raises(ArithmeticError, match="no number"):
                list(session.chat("Hello", logits_processor=LogitsProcessorList([fail])))
            open_answer(session).close()
            "".join(session.chat("And now?", max_new_tokens=3))
            "".join(session.generate(max_new_tokens=3))
            session.reset()
            session.feed("Another text.")
        assert len(set(noted)) == 1
        threads.append(noted[0])
    assert len({threading.get_ident(), *threads}) == 3


def test_a_session_runs_with_the_number_of_threads_that_its_reader_has(model: Any) -> None:
    before = torch.get_num_threads()
    session = SinkSession(model, byte_tokenizer(), 16)
    try:
        for number in (2, 1, 3):
            torch.set_num_threads(number)
            with passes(model, torch.get_num_threads) as noted:
                "".join(session.chat("Hello", max_new_tokens=3))
            assert set(noted) == {number}
    finally:
        torch.set_num_threads(before)


def check_pools(model: Any) -> None:
    """Check that a session's thread and its reader never have a pool of OpenMP threads at the same time."""
    numbers = torch.ones(2**20)

    def threads() -> int:
        numbers.add(1)  # in parallel
        return len(list(Path("/proc/self/task").iterdir()))

    "".join(
        SinkSession(model, byte_tokenizer(), 16).chat("Hello", max_new_tokens=3)
    )  # threads of other libraries begin
    gc.collect()
    session = SinkSession(model, byte_tokenizer(), 16)
    torch.set_num_threads(4)
    alone = threads()
    with passes(model, threads) as noted:
        "".join(session.chat("Hello", max_new_tokens=3))
    assert set(noted) == {alone + 1}, f"the session's thread: {noted} after {alone}"
    deadline = time.monotonic() + 30
    while threads() > alone + 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threads() == alone + 1, "the reader's thread"


@pytest.mark.skipif(gnu_openmp() is None, reason="PyTorch uses another OpenMP")
def test_no_two_threads_have_a_pool_of_openmp_threads() -> None:
    result = run("check_pools(model)")  # in a process whose other threads neither begin nor end
    assert result.returncode == 0, result.stderr[-2000:]


ABANDONED: dict[str, Callable[[SinkSession], Any]] = {
    "after a text": lambda session: session.feed("Once upon a time"),
    "after an answer": lambda session: "".join(session.chat("Hello", max_new_tokens=40)),
    "with an open answer": open_answer,
    "after an answer that was closed": lambda session: open_answer(session).close(),
    "after an error": lambda session: list(session.chat("Hello", logits_processor=LogitsProcessorList([fail]))),
}


@pytest.mark.parametrize("moment", ABANDONED)
def test_an_abandoned_session_leaves_no_thread(model: Any, moment: str) -> None:
    session = SinkSession(model, byte_tokenizer(), 16)
    left = None
    try:
        left = ABANDONED[moment](session)
    except ArithmeticError:
        assert moment == "after an error"
    thread: Any = thread_of(session)
    assert thread.is_alive()
    gone = weakref.ref(session)
    del session, left
    gc.collect()
    assert gone() is None
    assert ends(thread)


def test_a_session_in_a_cycle_may_be_collected_in_its_own_thread(model: Any) -> None:
    session = SinkSession(model, byte_tokenizer(), 16)
    abandoned, collected = threading.Event(), []
    speak = Answer(session.tokenizer, "Hello, you.")

    def collect(input_ids: Any, scores: Any) -> Any:
        if speak.said == 1:  # the first piece can be read
            abandoned.wait(30)
            collected.append(gc.collect())
        return speak(input_ids, scores)

    answer = session.chat("Hello", logits_processor=LogitsProcessorList([collect]))
    assert next(answer) == "H"
    worker: Any = thread_of(session)
    cycle: list[Any] = [answer, session]
    cycle.append(cycle)
    gc.disable()
    try:
        del answer, session, cycle
        abandoned.set()
        assert ends(worker)
    finally:
        gc.enable()
    assert collected


def test_a_session_is_refused_to_the_thread_that_computes_for_it(model: Any) -> None:
    session = SinkSession(model, byte_tokenizer(), 16)
    refused = []

    def use(input_ids: Any, scores: Any) -> Any:
        try:
            session.feed("more")
        except RuntimeError as error:
            refused.append(str(error))
        return scores

    answer = session.chat("Hello", suppress_tokens=[END], logits_processor=LogitsProcessorList([use]))
    next(answer)
    deadline = time.monotonic() + 30
    while not refused and time.monotonic() < deadline:  # the reader pauses
        time.sleep(0.01)
    assert "another thread" in refused[0]
    answer.close()
    session.feed("more")


def test_an_interpreter_with_an_open_answer_exits(model: Any) -> None:
    for ending, code in (("", 0), ("raise SystemExit(3)", 3), ("session.worker = model.session = session", 0)):
        result = run("session = SinkSession(model, byte_tokenizer(), 16)\nanswer = open_answer(session)\n" + ending)
        assert (result.returncode, result.stderr) == (code, "")


LATE = {
    "a daemon thread that asks on and on": """
def ask():
    while True:
        "".join(SinkSession(model, byte_tokenizer(), 16).chat("Hello", max_new_tokens=5))

threading.excepthook = lambda error: time.sleep(60)
for _ in range(3):
    threading.Thread(target=ask, daemon=True).start()
time.sleep(0.5)
""",
    "answers at exit": """
session = SinkSession(model, byte_tokenizer(), 16)
answer = open_answer(session)
""",
}
AT_EXIT = """
import atexit

def late():  # after ours
    global answer
    try:
        answer = open_answer(session)
    except (NameError, RuntimeError) as error:
        print(error)

atexit.register(late)
"""


@pytest.mark.parametrize("ending", LATE)
def test_nothing_begins_while_the_interpreter_ends(ending: str) -> None:
    result = run(LATE[ending], before=AT_EXIT)
    assert (result.returncode, result.stderr) == (0, "")
    assert "shutting down: a session can be saved" in result.stdout or ending != "answers at exit"


FORK = """
import copy, os, signal, warnings
warnings.simplefilter("ignore")  # newer versions of Python warn of a fork beside threads

def in_child(use):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        signal.alarm(100)
        try:
            print("child", use())
        except RuntimeError as error:
            print("child", error)
        raise SystemExit(0)
    assert os.waitpid(child, 0)[1] == 0

def ask(session):
    return len("".join(session.chat("Hello", max_new_tokens=5, suppress_tokens=[END])))

session = SinkSession(model, byte_tokenizer(), 16)
ask(session)
in_child(lambda: session.tokens_seen + 0 * ask(session))
print("parent", session.tokens_seen + 0 * ask(session))
answer = open_answer(session)
in_child(lambda: next(answer))
in_child(lambda: session.feed("more"))
in_child(lambda: answer.close())
in_child(lambda: ask(SinkSession(model, byte_tokenizer(), 16)) > 0)
in_child(lambda: copy.deepcopy(session))
print("parent", next(answer) != "")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_fork_has_a_thread_of_its_own_and_no_open_answer(model: Any) -> None:
    result = run(FORK)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].removeprefix("child") == lines[1].removeprefix("parent")
    assert all("forked while an answer was open" in line and "`load`" in line for line in (*lines[2:4], lines[6]))
    assert lines[4:6] == ["child None", "child True"]
    assert lines[7:] == ["parent True"]


@pytest.mark.usefixtures("_as_on_cuda", "_forget_what_was_compiled")
def test_a_session_is_compiled_where_generate_compiles_by_itself(model: Any) -> None:
    compiler, answers = Compiler(), {}
    each: dict[str, dict[str, Any]] = {
        "eager": {"disable_compile": True},
        "compiled": {"compile_config": compile_everywhere(compiler)},
    }
    for name, settings in each.items():
        session = SinkSession(model, byte_tokenizer(), 16)
        session.feed("A text longer than the window. " * 3)
        options: Any = {"max_new_tokens": 40, "suppress_tokens": [END], **settings}
        answers[name] = ["".join(session.chat("Hello", **options)) for _ in range(3)]
    assert answers["eager"] == answers["compiled"]
    assert compiler.compiled == 1


def test_two_sessions_at_once_do_not_share_cuda_graphs(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    disabled = []

    def generate(*args: Any, **kwargs: Any) -> Any:
        disabled.append(kwargs.get("disable_compile", False))
        return sink_generate(*args, **kwargs)

    monkeypatch.setattr("attention_sinks.passes.sink_generate", generate)
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.13.0"))
    one, other = (SinkSession(model, byte_tokenizer(), 16) for _ in range(2))
    answer = open_answer(one)
    "".join(other.chat("Hello", max_new_tokens=3))
    answer.close()
    "".join(other.chat("Hello", max_new_tokens=3))
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.12.1"))
    "".join(other.chat("Hello", max_new_tokens=3))
    assert disabled == [False, True, False, True]


def test_a_worker_gives_items_in_order_and_waits_for_its_reader() -> None:
    worker, sent = Worker(), []

    def produce(emit: Callable[[Any], bool]) -> None:
        for number in range(1, 1000):
            sent.append(number)
            if not emit(number):
                return

    assert list(worker.iterate(produce)) == list(range(1, 1000))
    sent.clear()
    items = worker.iterate(produce)
    assert [next(items) for _ in range(3)] == [1, 2, 3]
    time.sleep(0.2)
    assert 3 < len(sent) < 20
    items.close()
    never_begun = worker.iterate(produce)
    never_begun.close()
    assert len(sent) < 20
