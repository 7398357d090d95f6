"""A session reads the tokens of its chat template, gives the logits of one stream, and does not grow."""

import copy
import gc
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from attention_sinks import SinkCache, SinkSession

from ..support.inside import FILES, ids_of
from ..support.models import CACHE, build_model, relative_error
from ..support.tokenizer import END, TEMPLATES, Answer, byte_tokenizer, chat_model


@pytest.fixture(scope="module")
def model() -> Any:
    return chat_model()


@contextmanager
def tokens_read(model: Any) -> Iterator[list[int]]:
    """Collect the tokens that the model reads, in order."""
    read: list[int] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        read.extend((kwargs["input_ids"] if "input_ids" in kwargs else args[0])[0].tolist())

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield read
    finally:
        handle.remove()


def say(session: SinkSession, text: str) -> dict[str, Any]:
    return {"logits_processor": LogitsProcessorList([Answer(session.tokenizer, text)])}


@torch.no_grad()
def error_of(session: SinkSession, read: list[int]) -> float:
    """The error of the next logits of a session, compared with all tokens read one by one. Ends the session."""
    config, cache = session.model.config, session.cache
    pending = ids_of(session)[cache.get_seq_length() :]
    assert len(pending) == 1
    fresh = SinkCache(config, cache.window_length, cache.num_sink_tokens)
    for token in [*read, *pending]:
        expected = session.model(torch.tensor([[token]]), **{CACHE: fresh}).logits
    return relative_error(session.model(torch.tensor([pending]), **{CACHE: cache}).logits[:, -1:], expected)


@pytest.mark.parametrize("template", list(TEMPLATES))
@pytest.mark.parametrize("system", [None, "Speak like a pirate."])
def test_a_session_reads_the_tokens_of_the_template_for_the_whole_conversation(
    model: Any, template: str, system: str | None
) -> None:
    session = SinkSession(model, byte_tokenizer(TEMPLATES[template]), 1000, system=system)
    conversation = [] if system is None else [{"role": "system", "content": system}]
    for message, answer in [
        ("Hello?", "Ahoy."),
        ("And <|im_end|> now: ½", "Ünïcode 🐙"),
        ("Bye", "Farewell\n\nfriend"),
    ]:
        # In this template the model has to write the space before an answer.
        answer = " " * (template == "brackets") + answer
        assert "".join(session.chat(message, **say(session, answer))) == answer
        conversation.append({"role": "user", "content": message})
        expected = session.tokenizer.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"]
        said = session.tokenizer(answer, add_special_tokens=False)["input_ids"]
        assert ids_of(session) == [*expected, *said, END]
        conversation.append({"role": "assistant", "content": answer.strip()})


@pytest.mark.parametrize("template", list(TEMPLATES))
def test_an_interrupted_answer_ends_as_the_template_ends_it(model: Any, template: str) -> None:
    session = SinkSession(model, byte_tokenizer(TEMPLATES[template]), 1000)
    answer = session.chat("Tell me a story.", **say(session, " Once" + "upon" * 80))
    assert "".join(islice(answer, 4)) == " Onc"
    answer.close()
    # Tokens that the model made before it stopped belong to the stream.
    answer = session.tokenizer.decode(ids_of(session)).partition(" Once")[2]
    assert len(answer) < 40
    "".join(session.chat("Go on.", **say(session, "Yes.")))
    conversation = [
        {"role": "user", "content": "Tell me a story."},
        {"role": "assistant", "content": "Once" + answer},
        {"role": "user", "content": "Go on."},
    ]
    expected: Any = session.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    text = session.tokenizer.decode(ids_of(session))
    assert text.replace(" Once", "Once") == expected.replace(" Once", "Once") + "Yes.<|im_end|>"


@pytest.mark.parametrize("num_sink_tokens", [0, 4])
def test_a_long_conversation_is_one_stream_of_bounded_size(model: Any, num_sink_tokens: int) -> None:
    window_length = 48
    session = SinkSession(model, byte_tokenizer(), window_length, num_sink_tokens)
    widest = 0

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal widest
        mask = kwargs.get("attention_mask")
        position = int(kwargs["position_ids"].max()) if kwargs.get("position_ids") is not None else 0
        widest = max(
            widest, position, mask.shape[1] if isinstance(mask, Tensor) and mask.ndim == 2 else 0, len(ids_of(session))
        )

    torch.manual_seed(0)
    sizes = []
    with tokens_read(model) as read:
        handle = model.register_forward_pre_hook(note, with_kwargs=True)
        for turn in range(16):
            message = f"Message {turn}, " + "and more " * (turn % 5)
            "".join(session.chat(message, max_new_tokens=1 + turn * 7, do_sample=True))
            sizes.append(widest)
        handle.remove()
    assert session.tokens_seen == len(read) + 1 > 20 * window_length
    assert session.kept_length == window_length
    # The window, one window of evicted tokens, one part of an answer, and a message.
    assert max(sizes) < 3 * window_length + 110
    assert error_of(session, read) < 1e-4


def test_a_session_works_with_a_model_whose_positions_cannot_be_rebased() -> None:
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "use_sliding_window": True}
    model = chat_model("qwen3", **layers, head_dim=32)
    session = SinkSession(model, byte_tokenizer(), 24)
    assert not session.cache.can_rebase
    with tokens_read(model) as read:
        for _ in range(4):
            "".join(session.chat("Tell me more.", max_new_tokens=20))
    assert session.tokens_seen == session.cache.get_seq_length() + 1 == len(read) + 1
    assert error_of(session, read) < 1e-4


def adapted(model: Any) -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj", "k_proj"])
    return peft.get_peft_model(model, config).eval()


def offloaded(model: Any) -> Any:
    return pytest.importorskip("accelerate").cpu_offload(copy.deepcopy(model), execution_device="cpu")


OF_OFFLOADING = pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")  # early transformers 5


@pytest.mark.parametrize(
    "wrap",
    [
        adapted,
        pytest.param(offloaded, marks=OF_OFFLOADING),
        torch.nn.DataParallel,
    ],
)
def test_a_session_with_a_wrapped_model_is_that_of_what_it_wraps(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    plain = chat_model(num_hidden_layers=1)
    wrapped = wrap(plain)
    at_rest = dict(vars(wrapped)), dict(vars(plain))
    sessions = [SinkSession(each, byte_tokenizer(), 24) for each in (plain, wrapped)]
    for message in ("A message that is longer than the window.", "Hi"):
        answers = ["".join(each.chat(message, max_new_tokens=4)) for each in sessions]
        assert answers[0] == answers[1]
    if wrap is not offloaded:  # whose values are not at hand
        sessions[0].save(tmp_path / "chat")
        sessions[0] = SinkSession.load(tmp_path / "chat", wrapped, byte_tokenizer())
    sessions[1].save(tmp_path / "chat")
    sessions[1] = SinkSession.load(tmp_path / "chat", wrapped, byte_tokenizer())
    answers = ["".join(each.chat("And now?", max_new_tokens=4)) for each in sessions]
    assert answers[0] == answers[1]
    assert (vars(wrapped), vars(plain)) == at_rest
    pickle.dumps(plain)


@pytest.mark.usefixtures("_forget_what_was_compiled")
def test_a_session_with_a_compiled_model_is_that_of_the_model_and_changes_neither() -> None:
    plain = chat_model(num_hidden_layers=1)
    compiled: Any = torch.compile(plain, backend="eager")
    at_rest = dict(vars(compiled)), dict(vars(plain))
    sessions = [SinkSession(each, byte_tokenizer(None), 24) for each in (plain, compiled)]
    answers = []
    for session in sessions:
        session.feed("Once")
        answers.append("".join(session.generate(max_new_tokens=3)))
    assert answers[0] == answers[1]
    assert (vars(compiled), vars(plain)) == at_rest
    pickle.dumps(plain)


def test_a_model_with_a_learned_prompt_is_refused() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model: Any = peft.get_peft_model(chat_model(), config)
    with pytest.raises(NotImplementedError, match="learned prompt"):
        SinkSession(model, byte_tokenizer())


def test_a_fed_document_is_the_beginning_of_the_next_message(model: Any) -> None:
    session = SinkSession(model, byte_tokenizer(), 40)
    document = "Es war einmal ein König. " * 30
    with tokens_read(model) as read:
        assert session.feed(document[:300]) == len(document[:300].encode())
        session.feed(document[300:])
        assert session.kept_length == 40
        "".join(session.chat("Who?", **say(session, "A king.")))
    expected: Any = session.tokenizer.apply_chat_template(
        [{"role": "user", "content": document + "\n\nWho?"}, {"role": "assistant", "content": "A king."}]
    )
    assert [*read, *ids_of(session)[session.cache.get_seq_length() :]] == expected["input_ids"][
        :-1
    ]  # without the newline at its end
    assert error_of(session, read) < 1e-4


def test_without_a_template_a_session_reads_and_writes_plain_text(model: Any) -> None:
    session = SinkSession(model, byte_tokenizer(None), 32)
    with pytest.raises(ValueError, match="no chat template.*feed"):
        session.chat("Hello")
    with pytest.raises(ValueError, match="no chat template"):
        SinkSession(model, byte_tokenizer(None), 32, system="Be brief.")
    with pytest.raises(ValueError, match="nothing to continue"):
        session.generate()
    session.feed("Once upon a time ")
    session.feed("there was")
    assert session.tokenizer.decode(ids_of(session)) == "Once upon a time there was"
    text = "".join(session.generate(**say(session, " a cat")))
    assert text == " a cat"
    with tokens_read(model) as read:
        "".join(session.generate(max_new_tokens=70, suppress_tokens=[END]))
    assert len(read) == 70
    session.reset()
    assert (session.tokens_seen, session.kept_length) == (0, 0)
    session.feed("Once")
    assert session.tokens_seen == 4


def test_the_system_prompt_is_never_evicted(model: Any) -> None:
    system = "Answer in rhymes."
    session = SinkSession(model, byte_tokenizer(), 80, system=system)
    head = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
    head_ids = session.tokenizer(head)["input_ids"]
    assert session.cache.num_sink_tokens == len(head_ids)
    for _ in range(5):
        "".join(session.chat("More!", max_new_tokens=40))
    assert session.tokens_seen > 3 * 80
    assert ids_of(session)[: len(head_ids)] == head_ids
    assert SinkSession(model, byte_tokenizer(), 80, system=system, keep_system_prompt=False).cache.num_sink_tokens == 4
    with pytest.raises(ValueError, match=r"`system` must fit the window: it has 3\d tokens.*window_length=33"):
        SinkSession(model, byte_tokenizer(), 33, system=system)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: s.chat(""), ValueError, "`message` must not be empty"),
        (lambda s: s.chat("  \n"), ValueError, "`message` must not be empty"),
        (lambda s: s.chat(["Hi"]), TypeError, "`message` must be a string"),
        (lambda s: s.feed(""), ValueError, "`text` must not be empty"),
        (lambda s: s.feed(b"x"), TypeError, "`text` must be a string"),
        (lambda s: s.chat("Hi", temprature=1.0), ValueError, "temprature"),
        (lambda s: s.chat("Hi", max_length=10), TypeError, "`max_length` must be left out, got 10.*max_new_tokens"),
        (lambda s: s.chat("Hi", streamer=print), TypeError, "`streamer` must be left out"),
        (lambda s: s.chat("Hi", num_beams=3), ValueError, "`num_beams` must be 1, got 3"),
        (lambda s: s.chat("Hi", guidance_scale=1.5), ValueError, "`guidance_scale` must be 1, got 1.5"),
        (lambda s: s.chat("Hi", use_mtp=True), NotImplementedError, "`use_mtp` is not supported, got True"),
        (lambda s: s.chat("Hi", labels=[1]), TypeError, "`labels` must be left out, got"),
        (lambda s: s.generate(num_return_sequences=2, do_sample=True), ValueError, "`num_return_sequences` must be 1"),
        (lambda s: s.chat("Hi", prompt_lookup_num_tokens=3), ValueError, "`prompt_lookup_num_tokens` must be left out"),
        (lambda s: s.chat("Hi", cache_implementation="static"), TypeError, "`cache_implementation` must be left out"),
        (lambda s: s.generate(max_new_tokens=0), ValueError, "max_new_tokens"),
        (lambda s: s.generate(max_new_tokens=2.5), TypeError, "`max_new_tokens` must be an int, got 2.5"),
        (lambda s: s.generate(temperature=-1.0, do_sample=True), ValueError, "temperature"),
    ],
)
def test_bad_arguments_are_refused_at_once_and_change_nothing(
    model: Any, call: Callable[[SinkSession], Any], error: type[Exception], message: str
) -> None:
    session = SinkSession(model, byte_tokenizer(), 64)
    "".join(session.chat("Hello", max_new_tokens=5))
    before = list(ids_of(session)), session.tokens_seen, session.cache.get_seq_length()
    with pytest.raises(error, match=message):
        call(session)
    assert (list(ids_of(session)), session.tokens_seen, session.cache.get_seq_length()) == before


def test_an_error_names_a_template_that_refuses_or_rewrites_messages(model: Any) -> None:
    template = "{{ raise_exception('System role not supported') if messages[0].role == 'system' }}"
    with pytest.raises(ValueError, match="refuses the conversation: System role not supported"):
        SinkSession(model, byte_tokenizer(template), system="Be brief.")
    last_only = byte_tokenizer("{{ messages[-1].content }}:")
    with pytest.raises(ValueError, match="`system` is left out by the chat template"):
        SinkSession(model, last_only, system="Be brief.")
    with pytest.raises(ValueError, match="does not show earlier answers"):
        SinkSession(model, last_only, 64)
    session = SinkSession(model, byte_tokenizer(), 64)
    "".join(session.chat("Hello", max_new_tokens=2))
    session.tokenizer.chat_template = last_only.chat_template
    before = session.tokens_seen
    with pytest.raises(ValueError, match="does not show earlier answers"):
        session.chat("And now?")
    assert session.tokens_seen == before


def test_a_reader_who_stops_stops_the_model_and_the_stream_continues(model: Any) -> None:
    session = SinkSession(model, byte_tokenizer(), 32)
    with tokens_read(model) as read:
        answer = session.chat("Hello", suppress_tokens=[END])
        assert len(list(islice(answer, 5))) == 5
        time.sleep(0.5)
        ahead = session.tokens_seen
        time.sleep(0.3)
        assert session.tokens_seen == ahead  # the model waits for a reader who pauses
        answer.close()
        kept = session.tokens_seen
        time.sleep(0.2)
        assert session.tokens_seen == kept
        abandoned = session.chat("Again", suppress_tokens=[END])
        next(abandoned)
        "".join(session.chat("And again", max_new_tokens=3))  # ends the abandoned answer
        assert list(abandoned) == []
        never_read = session.chat("Never")
        del never_read
    assert session.tokens_seen == len(read) + 1
    assert error_of(session, read) < 1e-4


def test_an_error_during_generation_reaches_the_reader_and_the_stream_continues(model: Any) -> None:
    def fail(input_ids: Any, scores: Any) -> Any:
        raise ArithmeticError("no number")

    session = SinkSession(model, byte_tokenizer(), 32)
    with tokens_read(model) as read:
        for _ in range(2):
            with pytest.raises(ArithmeticError, match="no number"):
                list(session.chat("Hello", logits_processor=LogitsProcessorList([fail])))
        assert session.tokens_seen == len(read)
        assert "".join(session.chat("Hello?", **say(session, "Hm."))) == "Hm."
    assert session.tokens_seen == len(read) + 1
    assert error_of(session, read) < 1e-4


def test_an_eos_token_of_the_caller_is_ended_as_the_template_ends_it() -> None:
    model = chat_model(eos_token_id=None)
    session = SinkSession(model, byte_tokenizer(), 1000)
    "".join(session.chat("Hi", eos_token_id=END, **say(session, "Yo")))
    "".join(session.chat("So?", eos_token_id=[END], **say(session, "Well")))
    assert session.tokenizer.decode(ids_of(session)).count("Yo<|im_end|>\n<|im_start|>user\nSo?<|im_end|>\n") == 1


def test_the_model_stops_for_an_absent_reader_even_if_tokens_have_no_text(model: Any) -> None:
    session = SinkSession(model, byte_tokenizer(), 32)
    session.feed("Hello")
    answer = session.generate(**say(session, "a" + "<|im_start|>" * 2000))
    assert next(answer) == "a"
    answer.close()
    assert session.tokens_seen < 1000


def test_a_dropped_answer_ends_its_thread(model: Any) -> None:
    session = SinkSession(model, byte_tokenizer(), 32)
    gc.collect()  # the sessions of other tests
    threads = threading.active_count()

    def ended() -> bool:
        for _ in range(100):
            if threading.active_count() <= threads:
                return True
            time.sleep(0.05)
        return False

    for _ in session.chat("Hello", suppress_tokens=[END]):
        break
    seen = session.tokens_seen
    time.sleep(0.2)
    assert session.tokens_seen == seen
    kept = session.chat("Hello", suppress_tokens=[END])
    next(kept)
    dropped = weakref.ref(session.cache)
    del session, kept
    gc.collect()
    assert ended()
    assert dropped() is None


@pytest.mark.processes
def test_ctrl_c_waits_for_the_forward_pass_however_often_it_is_pressed(tmp_path: Path) -> None:
    """In a process, since signals go to the main thread."""
    script = """
import os, signal, threading, time
from attention_sinks import SinkSession
from tests.support.inside import ids_of
from tests.support.tokenizer import byte_tokenizer, chat_model
model = chat_model()
session = SinkSession(model, byte_tokenizer(), 32)
model.register_forward_pre_hook(lambda *_: time.sleep(1.0))
for call in (lambda: session.feed("a" * 200), lambda: list(session.chat("b" * 200))):
    for delay in (0.5, 0.7, 0.9):
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        call()
    except KeyboardInterrupt:
        print("interrupted")
    seen = session.cache.get_seq_length()
    time.sleep(1.5)
    assert session.cache.get_seq_length() == seen < 150
    assert len(ids_of(session)) > seen
"""
    root = Path(__file__).parents[2]
    launched = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)" + script
    result = subprocess.run([sys.executable, "-c", launched], capture_output=True, text=True, cwd=root, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["interrupted"] * 2


def test_limits_hold_for_the_whole_answer(model: Any) -> None:
    session = SinkSession(model, byte_tokenizer(), 16)
    before = session.tokens_seen
    "".join(session.chat("Hi", max_new_tokens=50, min_new_tokens=50))
    turn: Any = session.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    head = len(turn["input_ids"])
    assert session.tokens_seen - before == head + 50
    text = "tick " * 10 + "stop and more"
    assert "".join(session.chat("Hi", stop_strings=["stop"], **say(session, text))) == "tick " * 10 + "stop"
    seen: list[int] = []

    def at_most_20(input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return torch.tensor([len(seen) == 20])

    assert len("".join(session.chat("Hi", stopping_criteria=[at_most_20], **say(session, text)))) == 20
    began = time.monotonic()
    "".join(session.chat("Hi", max_time=0.3, suppress_tokens=[END]))
    assert 0.2 < time.monotonic() - began < 30


# --- files


def begun(session: SinkSession) -> None:
    next(session.chat("Tell me a very long story.", suppress_tokens=[END]))


SAVED: dict[str, Callable[[SinkSession], object]] = {
    "new": lambda session: None,
    "after a document": lambda session: session.feed("It was a bright cold day in April. " * 5),
    "after an answer": lambda session: "".join(session.chat("Hello, who are you?", max_new_tokens=9)),
    "after one that the model ended": lambda session: "".join(session.chat("Hello!", **say(session, "Yes."))),
    "past the window": lambda session: "".join(session.chat("Tell me more. " * 9, max_new_tokens=90)),
    "in the middle of an answer": begun,
}


@pytest.mark.parametrize("moment", SAVED)
@pytest.mark.parametrize("system", [None, "Speak like a pirate."])
def test_a_resumed_session_and_a_fork_are_bitwise_equal_to_one_that_never_stopped(
    model: Any, moment: str, system: str | None, tmp_path: Path
) -> None:
    session = SinkSession(model, byte_tokenizer(), 64, system=system)
    SAVED[moment](session)
    session.save(tmp_path / "chat")
    resumed, fork = SinkSession.load(tmp_path / "chat", model, byte_tokenizer()), session.fork()
    assert fork.model is model
    assert fork.tokenizer is session.tokenizer
    for other in (resumed, fork):
        assert (other.tokens_seen, other.kept_length) == (session.tokens_seen, session.kept_length)
    sessions = session, resumed, fork
    if moment == "after an answer":
        assert len({"".join(each.generate(max_new_tokens=5)) for each in sessions}) == 1
    for message in ("And then?", "Go on, " * 12):
        assert len({"".join(each.chat(message, max_new_tokens=50)) for each in sessions}) == 1
    for other in (resumed, fork):
        assert (ids_of(other), other.tokens_seen) == (ids_of(session), session.tokens_seen)
    pending = torch.tensor([ids_of(session)[session.cache.get_seq_length() :]])
    with torch.no_grad():
        logits = [model(pending, **{CACHE: each.cache}).logits for each in sessions]
    assert all(torch.equal(each, logits[0]) for each in logits)


def test_forks_of_a_session_answer_at_the_same_time(model: Any) -> None:
    """Each on a thread of its own; what one reads the others do not see."""
    session = SinkSession(model, byte_tokenizer(), 64)
    session.feed("It was a bright cold day in April. " * 5)
    seen, messages = session.tokens_seen, ["What day?", "Which month was it?", "And the clocks?"]
    alone = ["".join(session.fork().chat(message, max_new_tokens=30)) for message in messages]
    answers = [session.fork().chat(message, max_new_tokens=30) for message in messages]
    pieces = list(zip_longest(*answers, fillvalue=""))
    assert ["".join(texts) for texts in zip(*pieces, strict=True)] == alone
    assert session.tokens_seen == seen


def test_a_session_is_resumed_whatever_the_memory_layout_of_the_weights(tmp_path: Path) -> None:
    model = chat_model()
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data.T.contiguous().T
    session = SinkSession(model, byte_tokenizer(), 64)
    session.feed("Once upon a time")
    session.save(tmp_path / "chat")
    weight.data = weight.data.contiguous()
    assert SinkSession.load(tmp_path / "chat", model, byte_tokenizer()).tokens_seen == session.tokens_seen


def test_a_session_in_use_by_another_thread_is_not_saved(model: Any, tmp_path: Path) -> None:
    session, refused = SinkSession(model, byte_tokenizer(), 64), []

    def save() -> None:
        try:
            session.save(tmp_path / "chat")
        except RuntimeError as error:
            refused.append(str(error))

    class Saving(LogitsProcessor):  # runs while the reader waits for the next piece
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            if not refused:
                save()
            return scores

    "".join(session.chat("Hello!", max_new_tokens=5, logits_processor=LogitsProcessorList([Saving()])))
    assert "another thread" in refused[0]
    save()
    assert len(refused) == 1


def test_a_session_of_another_model_or_tokenizer_is_refused(model: Any, tmp_path: Path) -> None:
    session, path = SinkSession(model, byte_tokenizer(), 64), tmp_path / "chat"
    "".join(session.chat("Hello!", max_new_tokens=3))
    session.save(path)
    with pytest.raises(ValueError, match="`config` must be that of the model .*: num_hidden_layers was 2, got 1"):
        SinkSession.load(path, chat_model(num_hidden_layers=1), byte_tokenizer())
    with pytest.raises(
        ValueError, match="`model` must be that of the session in .*chat': the weights are not the same"
    ):
        SinkSession.load(path, build_model(model.config, scale=3.0), byte_tokenizer())
    other = byte_tokenizer()
    other.add_tokens(["another"])
    with pytest.raises(ValueError, match="`tokenizer` must be that of the session in .*: the vocabulary"):
        SinkSession.load(path, model, other)
    with pytest.raises(ValueError, match="must be a file that `save` of a cache wrote, got .*: it contains a session"):
        SinkCache.load(path, model.config)
    session.cache.save(path)
    with pytest.raises(ValueError, match="must be a file that `save` of a session wrote, got .*: it contains a cache"):
        SinkSession.load(path, model, byte_tokenizer())


def test_a_file_of_a_session_with_an_entry_missing_unknown_or_of_another_type_is_refused(
    model: Any, tmp_path: Path
) -> None:
    session, path = SinkSession(model, byte_tokenizer(), 64), tmp_path / "chat"
    "".join(session.chat("Hello!", max_new_tokens=3))
    session.save(path)
    state = FILES.read(path, "session")
    for name in state:
        others = {key: value for key, value in state.items() if key != name}
        for wrong in (others, {**state, "another": 1}, {**state, name: 1.5}):
            FILES.write(path, "session", wrong)
            with pytest.raises(ValueError, match="must be a file that `save` wrote"):
                SinkSession.load(path, model, byte_tokenizer())
