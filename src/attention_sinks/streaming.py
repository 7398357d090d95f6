"""Text piece by piece: a worker thread computes, its reader iterates over the results.

`Worker` owns the thread, `Detokenizer` turns tokens into text, `TokenStreamer` takes the tokens from `generate`, which
`AnswerCriteria` stops.
"""

import atexit
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import (
    MaxTimeCriteria,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from .openmp import gnu_openmp
from .prompt import GenerationSettings

# How many items may wait for their reader before the worker pauses.
_CAPACITY = 8
# Detokenizer: how many tokens are decoded at once, and the most tokens without any text that it remembers.
_DECODED, _REMEMBERED = 8, 16
# A character of UTF-8 has at most four bytes, hence at most four tokens. More tokens than this never become one.
_LONGEST_CHARACTER = 8

# Hands an item to the reader. Returns False if the reader has left.
Emit = Callable[[Any], bool]
_T = TypeVar("_T")


class Worker:
    """One thread that computes what iterators return, one iterator after the other.

    The thread starts with the first iterator and ends when the worker is collected. While it is idle it holds no
    reference to what it ran. At exit the interpreter waits for the forward pass in progress. A process that was forked
    gets a thread of its own.

    It is a thread of its own because `generate` calls its streamer instead of returning tokens, and because Ctrl-C must
    not end a forward pass half-way. It is always the same one because CUDA graphs belong to a thread.
    """

    def __init__(self) -> None:
        self._thread: _Thread | None = None
        self._channel: _Channel | None = None
        self._iterator: weakref.ref[Generator[Any]] | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None

    def iterate(self, produce: Callable[[Emit], object]) -> Generator[Any]:
        """Return an iterator over what `produce(emit)` emits, without empty items; it starts with the first item.

        `emit` waits while too many items are unread. It returns False once the reader has left; `produce` must then
        return at the next point where all state is consistent, which closing the iterator waits for. An iterator that
        nobody holds is closed.
        """
        iterator = self._iterate(produce)
        self._iterator = weakref.ref(iterator)
        return iterator

    def call(self, function: Callable[..., _T], *args: Any) -> _T:
        """Close the open iterator, if there is one, and return what a function returns on the thread.

        The reader itself must not compute: if it is a daemon thread, the interpreter may end without waiting for it.

        Raises:
            RuntimeError: see `end`; or if the interpreter is shutting down.
        """
        self.end()
        _check_running()
        returned: list[_T] = []
        for _ in self.iterate(lambda emit: returned.append(function(*args))):
            pass
        return returned[0]

    def end(self) -> None:
        """Close the open iterator, if there is one.

        Raises:
            RuntimeError: if another thread uses it, or if the process was forked while it was open.
        """
        self._check_usable()
        iterator = None if self._iterator is None else self._iterator()
        if iterator is not None:
            try:
                iterator.close()
            except ValueError as error:  # the generator is already executing
                raise RuntimeError("The session is in use by another thread; only one at a time may use it.") from error
        if self._channel is not None:  # whose reader may have been interrupted while it left
            self._channel.close()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is computed, and all state is consistent. An open iterator goes on afterwards.

        Raises:
            RuntimeError: if this thread computes for the session, or if the process was forked while it was open.
        """
        self._check_usable()
        # Held, since the garbage collector would otherwise close it here, and wait for the thread that is paused.
        iterator = None if self._iterator is None else self._iterator()
        with contextlib.nullcontext() if self._channel is None else self._channel.paused():
            yield
        del iterator

    def _check_usable(self) -> None:
        if self._thread is threading.current_thread():
            raise RuntimeError("The session is in use by another thread, for which this one computes.")
        if self._channel is not None:
            self._channel.check_process()

    def _iterate(self, produce: Callable[[Emit], object]) -> Generator[Any]:
        self._channel = channel = _Channel(torch.get_num_threads())
        try:
            release_thread_pool()
            self._running_thread().submit(channel, produce)
            while (item := channel.receive()) is not _END:
                if item:
                    yield item
        finally:
            channel.close()
            error, channel.error = channel.error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback refers to this frame

    def _running_thread(self) -> "_Thread":
        if self._thread is None or self._thread not in _threads:
            thread = _Thread()
            try:
                _threads.add(thread)  # before the question, since `_end_threads` ends those that it finds
                _check_running()
                thread.start()
            except BaseException:
                _threads.discard(thread)
                thread.end()
                raise
            if self._finalizer is not None:
                self._finalizer.detach()
            self._thread = thread
            self._finalizer = weakref.finalize(self, thread.end)
            self._finalizer.atexit = False  # `_end_threads` does it, and waits
        return self._thread


class _Thread(threading.Thread):
    """The thread of a worker. It does not know the worker, so that the worker can be collected."""

    def __init__(self) -> None:
        super().__init__(name="SinkSession", daemon=True)
        self._tasks: SimpleQueue[tuple[_Channel, Callable[[Emit], object]] | None] = SimpleQueue()
        self._channel: _Channel | None = None

    def submit(self, channel: "_Channel", produce: Callable[[Emit], object]) -> None:
        self._channel = channel
        self._tasks.put((channel, produce))

    def end(self) -> None:
        """Ask the thread to end at the next consistent point."""
        if self._channel is not None:
            self._channel.leave()
        self._tasks.put(None)

    def run(self) -> None:
        while (task := self._tasks.get()) is not None:
            channel, produce = task
            channel.run(produce)
            release_thread_pool()
            del task, channel, produce  # an idle thread keeps nobody's session alive
        _threads.discard(self)


_threads: set[_Thread] = set()
_exiting = False
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.clear)


@atexit.register
def _end_threads() -> None:
    """A daemon thread that computes while the interpreter is torn down would abort the process."""
    global _exiting
    _exiting = True
    threads = list(_threads)
    for thread in threads:
        thread.end()
    for thread in threads:
        with contextlib.suppress(RuntimeError):  # it starts only now, and finds that it shall end
            _uninterrupted(thread.join)


def _check_running() -> None:
    if _exiting:
        raise RuntimeError("The interpreter is shutting down: a session can be saved, but generates no more.")


def _uninterrupted(wait: Callable[[], object]) -> None:
    """Wait to the end even if Ctrl-C is pressed, and raise KeyboardInterrupt then."""
    interrupt = None
    while True:
        try:
            wait()
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


_END = object()


class _Channel:
    """The way of items from a thread that produces them to one that reads them."""

    def __init__(self, num_threads: int) -> None:
        # Queues written in C: an item wakes its reader once, and nobody polls. Each entry of `_room` is an item that
        # may be sent.
        self._items: SimpleQueue[Any] = SimpleQueue()
        self._room: SimpleQueue[None] = SimpleQueue()
        for _ in range(_CAPACITY):
            self._room.put(None)
        self._left = False
        self._done = threading.Event()
        # Who came first: the producer, that begins, or the reader, that leaves before. `setdefault` is atomic, and may
        # be repeated after an interrupt.
        self._first: dict[str, str] = {}
        # The producer's, except while it sends. Who waits for it holds the gate, so that the producer waits there.
        self._turn, self._gate = threading.Lock(), threading.Lock()
        self._producer: int | None = None
        self._process = os.getpid()
        self._num_threads = num_threads
        self.error: BaseException | None = None

    # The producer's thread

    def run(self, produce: Callable[[Emit], object]) -> None:
        """Produce all items; an error is kept for the reader."""
        self._producer = threading.get_ident()
        try:
            # PyTorch keeps the number of threads per thread: use the reader's.
            if torch.get_num_threads() != self._num_threads:
                torch.set_num_threads(self._num_threads)
            if self._first.setdefault("", "producer") == "producer":
                with self._turn:
                    produce(self._send)
        except BaseException as error:
            if not self._left:
                self.error = error
        self._done.set()
        self._items.put(_END)

    def _send(self, item: Any) -> bool:
        self._turn.release()
        with self._gate:
            pass
        if not self._left:
            self._room.get()
        self._turn.acquire()
        if self._left:
            return False
        self._items.put(item)
        return True

    # The reader's thread

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, the producer waits where it sends an item, or has not begun."""
        with self._gate, self._turn:
            yield

    def receive(self) -> Any:
        """Return the next item, `_END` after the last one."""
        self.check_process()
        item = self._items.get()
        self._room.put(None)
        return item

    def leave(self) -> None:
        """Want no more items."""
        self._left = True
        self._room.put(None)

    def close(self) -> None:
        """Want no more items, and wait until the producer has returned."""
        self.leave()
        if self._first.setdefault("", "reader") == "reader":
            self._done.set()
        # The garbage collector may close an iterator in any thread, that of its producer included.
        elif self._producer != threading.get_ident() and self._process == os.getpid():
            _uninterrupted(self._done.wait)

    def check_process(self) -> None:
        if self._process != os.getpid() and not self._done.is_set():
            raise RuntimeError(
                "This process was forked while an answer was open, and only the parent process goes on with it. Close "
                "the answer before the fork, or `save` the session there and `load` it here."
            )


class Detokenizer:
    """Turns tokens into text piece by piece, decoding only a few of them at a time.

    Args:
        tokenizer: of the tokens.
        before: the last tokens of the text that the first piece continues.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(before)
        self._num_told = len(self._ids)  # how many of them are part of an earlier piece
        self._last_piece = 0  # where the tokens of the last piece with a text begin
        self._told = self._decode(self._ids)

    def push(self, tokens: list[int]) -> str:
        """Return the text that is certain after these tokens; the rest of a character may still be missing."""
        pieces = []
        for token in tokens:  # one by one, because a complete character ends the dependence on earlier tokens
            self._ids.append(token)
            pieces.append(self._next_piece(final=False))
        return "".join(pieces)

    def flush(self) -> str:
        """Return the rest, whether or not it is complete."""
        return self._next_piece(final=True)

    def _next_piece(self, final: bool) -> str:
        text = self._decode(self._ids)
        num_new = len(self._ids) - self._num_told
        complete = not text.endswith("\N{REPLACEMENT CHARACTER}") or num_new > _LONGEST_CHARACTER
        if not (complete or final):
            return ""
        piece = text[len(self._told) :]
        if piece:
            self._last_piece = self._num_told
        self._told, self._num_told = text, len(self._ids)
        # The last tokens with a text stay: they tell whether a space precedes the next one.
        first = self._last_piece if len(self._ids) - self._last_piece <= _REMEMBERED else self._num_told
        if len(self._ids) > _DECODED and first > 0:
            self._ids = self._ids[first:]
            self._num_told, self._last_piece = len(self._ids), 0
            self._told = self._decode(self._ids)
        return piece

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


class AnswerCriteria(StoppingCriteria):
    """The stopping criteria of one answer, which `generate` would apply anew in each part of it.

    Args:
        settings: of the answer.
        tokenizer: for its stop strings.

    Attributes:
        reader_left: True if nobody reads the answer any more.
        met: True if the answer is complete, for this or for another reason.
    """

    def __init__(self, settings: GenerationSettings, tokenizer: Any) -> None:
        self._criteria = StoppingCriteriaList(settings["stopping_criteria"] or [])
        if settings["stop_strings"] is not None:
            self._criteria.append(StopStringCriteria(tokenizer, settings["stop_strings"]))
        if settings["max_time"] is not None:
            self._criteria.append(MaxTimeCriteria(settings["max_time"], time.time()))
        self.reader_left = self.met = False

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.met = self.reader_left or (
            len(self._criteria) > 0 and bool(self._criteria(input_ids, scores, **kwargs).all())
        )
        return torch.full(input_ids.shape[:1], self.met, device=input_ids.device)


class TokenStreamer(BaseStreamer):
    """Calls a function with the new tokens of `generate`, without the prompt."""

    def __init__(self, take: Callable[[list[int]], None]) -> None:
        self._take = take
        self._begun = False

    def put(self, value: Tensor) -> None:
        if self._begun:
            self._take(value.flatten().tolist())
        self._begun = True

    def end(self) -> None: ...


def release_thread_pool() -> None:
    """Let GNU OpenMP end the idle threads of the calling thread; its next parallel operation starts them again.

    Every thread that computes has a pool of OpenMP threads. When the pools of two threads together exceed the CPUs, GNU
    OpenMP lets its threads sleep after each parallel operation instead of spinning. To wake them costs a decoding step
    of SmolLM2-135M a tenth of its time. So a pool ends when another thread takes over.
    """
    openmp = gnu_openmp()
    if openmp is not None and torch.get_num_threads() > 1:
        openmp.omp_pause_resource_all(1)  # `omp_pause_soft`, of OpenMP 5.0; in GNU OpenMP of the calling thread alone


# Which models a session generates with at this moment.
_in_use: weakref.WeakKeyDictionary[PreTrainedModel, threading.Lock] = weakref.WeakKeyDictionary()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_use.clear)


@contextlib.contextmanager
def compile_permission(model: PreTrainedModel) -> Iterator[bool]:
    """True inside if `generate` may compile the model by itself.

    Compiled code records CUDA graphs once per model. Two threads that replay them at the same time would overwrite each
    other's outputs, and before version 2.13 PyTorch records none outside of the thread that compiled first.
    """
    lock = _in_use.setdefault(model, threading.Lock())
    alone = lock.acquire(blocking=False)
    try:
        yield alone and torch.__version__ >= "2.13"
    finally:
        if alone:
            lock.release()
