"""`SinkSession`: one conversation, or one text, without end, in memory that does not grow."""

import contextlib
import hashlib
import json
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Generator, Sequence
from typing import Any, Self

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
from transformers.utils import logging

from . import files
from .cache import DEFAULT_NUM_SINK_TOKENS, SinkCache
from .compat import DriftError
from .generate import ASSISTED, check_arguments, sink_generate
from .prefill import last_logits_only, sink_prefill
from .prompt import GenerationSettings as Settings

# What stands in a chat template for the parts of a conversation that are not known yet.
_MESSAGE, _ANSWER = "message-b0b95fa4", "answer-57c1de90"
_OWN_ARGUMENTS = {
    "attention_mask", "cache", "cache_implementation", "custom_generate", "input_ids", "inputs", "inputs_embeds",
    "max_length", "min_length", "past_key_values", "position_ids", "prefill_chunk_size", "return_dict_in_generate",
    "streamer", "use_cache",
}  # fmt: skip
# How many pieces of text may wait for who reads them.
_WAITING = 8


class SinkSession:
    """One endless stream through a model: a chat, a document and questions to it, or plain text.

    Nothing grows with the stream: the session knows no more than the last three windows and counts the rest. (Where
    the positions of a model cannot be wound back, `SinkCache.can_rebase`, token ids and masks of `generate` grow,
    by a few bytes per token.)

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        window_length: the most tokens the model sees.
        num_sink_tokens: how many of the first tokens it never forgets.
        system: a system prompt, for a tokenizer with a chat template.
        keep_system_prompt: make all tokens before the first message, the system prompt's, the sinks.

    Raises:
        TypeError, ValueError: naming the argument and its value; if the system prompt does not fit the window.
        NotImplementedError: for a model that cannot be supported exactly.

    Example:
        >>> session = SinkSession(model, tokenizer, window_length=1024, system="You are a patient teacher.")
        >>> for piece in session.chat("Why is the sky blue?"):
        ...     print(piece, end="", flush=True)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        window_length: int = 1024,
        num_sink_tokens: int = DEFAULT_NUM_SINK_TOKENS,
        *,
        system: str | None = None,
        keep_system_prompt: bool = True,
    ) -> None:
        self._open_on(model, tokenizer, system)
        if system is not None:
            _check_text("system", system)
            if keep_system_prompt:
                kept = len(self._tokens(self._turn(_MESSAGE).partition(_MESSAGE)[0]))
                num_sink_tokens = max(num_sink_tokens, kept)
                if num_sink_tokens >= window_length:
                    raise ValueError(
                        f"`system` must fit the window: it has {kept} tokens with its template, and "
                        f"window_length={window_length} must also hold recent ones. Choose a shorter one or a larger "
                        "window, or let it be forgotten with keep_system_prompt=False."
                    )
        self.cache = SinkCache(model.config, window_length, num_sink_tokens)

    def _open_on(self, model: PreTrainedModel, tokenizer: Any, system: str | None) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.system = system
        self._running: weakref.ref[Generator[Any]] | None = None
        self._start()

    def _start(self) -> None:
        self._ids: list[int] = []  # of the tokens the cache counts, and of those it has yet to read, at least one
        self._forgotten = 0  # how many tokens before these were evicted
        self._open: str | None = None  # whose turn it is that the next token belongs to
        self._ended = False  # whether the last token is the one by which the model ended its answer

    @property
    def tokens_seen(self) -> int:
        """How many tokens the stream has, those that were forgotten included."""
        return self._forgotten + len(self._ids)

    @property
    def kept_length(self) -> int:
        """How many of them the cache holds."""
        return self.cache.kept_length

    def reset(self) -> None:
        """Forget all; the system prompt stays that of the session."""
        self._end_running()
        self.cache.reset()
        self._start()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the stream to a safetensors file, from which `load` resumes it: what follows is bitwise the same.

        An old file of that name is replaced at once and by a whole one only, even if the process is killed meanwhile.
        An answer that is being given ends here.

        Raises:
            RuntimeError: if a forward pass was interrupted half-way, so that there is nothing to resume, or if another
                thread uses the session.
            OSError: if the file cannot be written.
        """
        self._end_running()
        state = {
            "model": _fingerprint(self.model),
            "tokenizer": _vocabulary(self.tokenizer),
            "system": self.system,
            "ids": torch.tensor(self._ids, dtype=torch.long),
            "forgotten": self._forgotten,
            "open": self._open,
            "ended": self._ended,
            "cache": self.cache.state(),
        }
        files.write(path, "session", state)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: PreTrainedModel, tokenizer: Any) -> Self:
        """The session that `save` wrote, to go on where it was.

        Args:
            path: of the file.
            model: the model of the session; the beginning of each of its weights is compared.
            tokenizer: its tokenizer, with the same vocabulary.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is truncated, damaged, of another program or a newer version, or if the stream
                belongs to another model or tokenizer.

        Example:
            >>> session.save("chat.safetensors")
            >>> session = SinkSession.load("chat.safetensors", model, tokenizer)
        """
        state = files.read(path, "session")
        # Of a model that accelerate placed each layer goes where it was, otherwise to where the model is.
        device = None if getattr(model, "hf_device_map", None) else model.device
        cache = SinkCache.from_state(state["cache"], model.config, device)
        for name, ours in (("model", _fingerprint(model)), ("tokenizer", _vocabulary(tokenizer))):
            if state[name] != ours:
                what = "the weights" if name == "model" else "the vocabulary"
                raise ValueError(
                    f"`{name}` must be that of the session in {os.fspath(path)!r}: {what} are not the same."
                )
        session = cls.__new__(cls)
        session._open_on(model, tokenizer, state["system"])
        session.cache = cache
        session._ids = state["ids"].tolist()
        session._forgotten, session._open, session._ended = state["forgotten"], state["open"], state["ended"]
        return session

    def feed(self, text: str) -> int:
        """Read a text of any length, each token with exactly its own window; returns its number of tokens.

        With a chat template it is the beginning of the next message, otherwise it stands for itself. A progress bar
        shows where a text longer than the window is. If it is interrupted, what has been read stays.

        Raises:
            TypeError, ValueError: if `text` is no string, or empty.
        """
        _check_text("text", text)
        self._end_running()
        before = ""
        if self.tokenizer.chat_template is not None and self._open != "user":
            before = self._turn(_MESSAGE).partition(_MESSAGE)[0]
        elif not self._ids and self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id]:
            self._ids.append(self.tokenizer.bos_token_id)
        self._drop_end_of_turn()
        first = self.tokens_seen + len(self._tokens(before))
        tokens = self._tokens(before + text)
        self._ids += tokens
        self._open = "user"
        unread = len(self._ids) - 1 - self.cache.get_seq_length()
        try:
            short = unread <= self.cache.window_length
            with (
                logging.tqdm(total=unread, unit="token", disable=short) as bar,
                contextlib.closing(self._in_thread(self._read)) as counts,
            ):
                for count in counts:
                    bar.update(count)
        finally:
            read = max(self.cache.get_seq_length() + 1, first - self._forgotten)
            del self._ids[read:]
        return self.tokens_seen - first

    def chat(self, message: str, **generate_kwargs: Any) -> Generator[str]:
        """Answer a message, in pieces of text as they come.

        The tokens are those that the chat template gives for the whole conversation; a message longer than the window
        is read as by `feed`. An answer ends where the model ends it, or after `max_new_tokens`; who stops iterating
        stops it, and the conversation goes on from there.

        Args:
            message: what the user says.
            generate_kwargs: of `generate`: `do_sample`, `temperature`, `max_new_tokens`, ... Processors and criteria
                are given the tokens of the window, not of the whole stream.

        Raises:
            TypeError, ValueError: naming the argument and its value. Nothing is changed then.
        """
        _check_text("message", message)
        self._end_running()
        if self._open == "user":  # after what was fed
            text = "\n\n" + message + self._turn(_MESSAGE).partition(_MESSAGE)[2]
        else:
            text = self._turn(message)
        tokens = self._tokens(text)
        self._check_generate(tokens, generate_kwargs)

        def take_turn() -> Detokenizer:
            self._drop_end_of_turn()
            self._ids.extend(tokens)
            self._open = "assistant"
            return Detokenizer(self.tokenizer)

        return self._pieces(generate_kwargs, take_turn)

    def generate(self, **generate_kwargs: Any) -> Generator[str]:
        """Write on from where the stream is, in pieces of text as they come: after `feed`, or after an answer.

        An answer that was cut off goes on; after one that the model has ended, the stream goes on behind its end.

        Raises:
            TypeError, ValueError: naming the argument and its value; if there is nothing to continue.
        """
        self._end_running()
        if len(self._ids) == self.cache.get_seq_length():  # at the start, or where an error ended an answer
            raise ValueError("There is nothing to continue: `feed(text)` first, or `chat(message)`.")
        self._check_generate([], generate_kwargs)

        def go_on() -> Detokenizer:
            self._ended = False
            return Detokenizer(self.tokenizer, self._ids[-8:])

        return self._pieces(generate_kwargs, go_on)

    # Chat templates

    def _turn(self, message: str) -> str:
        """What the chat template writes for a message and the head of its answer, after what came before."""
        if self.tokenizer.chat_template is None:
            raise ValueError(
                "`tokenizer` has no chat template. Set `tokenizer.chat_template` to that of the model, or use "
                "`feed(text)` and `generate()`, which need none."
            )
        first = not self._ids
        messages = []
        if not first:
            # A template is given one earlier turn, whatever the length of the conversation. The system prompt has been
            # said; some templates would say it again in the last message.
            messages += [{"role": "user", "content": _MESSAGE}, {"role": "assistant", "content": _ANSWER}]
        elif self.system is not None:
            messages.append({"role": "system", "content": self.system})
        messages.append({"role": "user", "content": message})
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # jinja's, and whatever a template raises
            raise ValueError(f"The chat template of the tokenizer refuses the conversation: {error}") from error
        if first:
            if self.system is not None and self.system.strip() not in text:
                raise ValueError("`system` is left out by the chat template of the tokenizer. Say it in a message.")
            return text
        if text.count(_ANSWER) != 1:
            raise ValueError(
                "The chat template of the tokenizer does not show earlier answers as they were, so that a conversation "
                "cannot be continued turn by turn."
            )
        return text.partition(_ANSWER)[2]

    def _drop_end_of_turn(self) -> None:
        """Leave it to the template to end the answer that the model ended with its last token."""
        if self._ended:
            self._ids.pop()
        self._ended = False

    def _tokens(self, text: str) -> list[int]:
        """The tokens of a text that follows what is there: some tokenizers begin one that follows nothing otherwise."""

        def tokens(text: str) -> list[int]:
            found: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return found

        before = tokens("a")
        if self._ids and (joined := tokens("a" + text))[: len(before)] == before:
            return joined[len(before) :]
        return tokens(text)

    # Reading and writing

    def _read(self, emit: Callable[[int], bool]) -> bool:
        """Read all tokens but the last one, and tell whether it was done; emits how many were read."""
        while (unread := len(self._ids) - 1 - self.cache.get_seq_length()) > 0:
            self._compact()
            seen = self.cache.get_seq_length()
            block = self._tensor(self._ids[seen : seen + min(unread, self.cache.window_length)])
            for _ in sink_prefill(self.model, block, self.cache, **last_logits_only(self.model)):
                before, seen = seen, self.cache.get_seq_length()
                if not emit(seen - before):
                    return False
        return True

    def _write(self, generate_kwargs: dict[str, Any], text: "Detokenizer", emit: Callable[[str], bool]) -> None:
        """Generate until the model, or a criterion, ends it; emits pieces of `text`."""
        settings = Settings(self.model, generate_kwargs)
        most, least = settings["max_new_tokens"], settings["min_new_tokens"] or 0
        ends = settings["eos_token_id"]
        ends = ends if isinstance(ends, list | tuple) else [ends]
        going = True

        def take(tokens: list[int]) -> None:
            nonlocal going
            self._ids.extend(tokens)
            going = emit(text.push(tokens)) and going

        criteria = _Criteria(self.tokenizer, settings, lambda: not going)
        made = 0
        # `generate` in parts, for it keeps all its tokens and their mask.
        while going and not criteria.met and (most is None or made < most):
            self._compact()
            before = self.tokens_seen
            part = self.cache.window_length if most is None else min(self.cache.window_length, most - made)
            input_ids = self._tensor(self._ids)
            arguments = {
                **generate_kwargs,
                "attention_mask": torch.ones_like(input_ids),
                "cache": self.cache,
                "max_new_tokens": part,
                "min_new_tokens": min(part, max(least - made, 0)),
                "stopping_criteria": StoppingCriteriaList([criteria]),
                "streamer": _Tokens(take),
                # CUDA graphs belong to the thread that recorded them.
                "disable_compile": True,
            }
            sink_generate(self.model, input_ids, **arguments)
            new = self.tokens_seen - before
            if self.cache.get_seq_length() != len(self._ids) - 1:
                raise DriftError(
                    f"`generate` handed out {new} tokens after {before}, and the cache counts "
                    f"{self.cache.get_seq_length() + self._forgotten}"
                )
            made += new
            self._ended = self._ids[-1] in ends
            if new < part or self._ended:
                break
        if (rest := text.flush()) and going:
            emit(rest)

    def _compact(self) -> None:
        """Forget what is evicted, once as much was as is recent: no key is wound back more than once in its life."""
        cache = self.cache
        evicted = cache.get_seq_length() - cache.kept_length
        if evicted >= cache.window_length - cache.num_sink_tokens and cache.can_rebase:
            cache.compact()
            del self._ids[cache.num_sink_tokens : cache.num_sink_tokens + evicted]
            self._forgotten += evicted

    def _tensor(self, tokens: list[int]) -> Tensor:
        device = self.model.device
        # Of a model that is offloaded nothing need be on a device; what it is given goes where it is needed.
        return torch.tensor([tokens], device="cpu" if device.type == "meta" else device)

    def _check_generate(self, tokens: list[int], generate_kwargs: dict[str, Any]) -> None:
        for name in sorted(generate_kwargs.keys() & _OWN_ARGUMENTS):
            remedy = f" Bound an answer by `{name[:3]}_new_tokens`." if name.endswith("_length") else ""
            raise TypeError(
                f"`{name}` must be left out, got {generate_kwargs[name]!r:.80}: it is the session's.{remedy}"
            )
        settings = Settings(self.model, generate_kwargs)
        for name in ("num_beams", "num_return_sequences"):
            if (settings[name] or 1) != 1:
                raise ValueError(f"`{name}` must be 1, got {settings[name]}: a session is one stream.")
        for name in ASSISTED:
            if settings[name] is not None:
                raise ValueError(
                    f"`{name}` must be left out, got {settings[name]!r:.80}: sessions choose token by token."
                )
        if settings["stop_strings"] is not None:
            generate_kwargs.setdefault("tokenizer", self.tokenizer)
        most = settings["max_new_tokens"]
        if not isinstance(most, int | None):
            raise TypeError(f"`max_new_tokens` must be an int, got {most!r}.")
        bounded = {**generate_kwargs, "max_new_tokens": self.cache.window_length if most is None else most}
        check_arguments(self.model, self._tensor([*self._ids, *tokens]), self.cache, bounded)

    def _pieces(self, generate_kwargs: dict[str, Any], begin: "Callable[[], Detokenizer]") -> Generator[str]:
        def work(emit: Callable[[str], bool]) -> None:
            text = begin()
            if self._read(lambda count: emit("")):
                self._write(generate_kwargs, text, emit)

        pieces = self._in_thread(work)
        self._running = weakref.ref(pieces)  # who drops it ends it
        return pieces

    def _in_thread(self, work: Callable[[Callable[[Any], bool]], object]) -> Generator[Any]:
        """What `work` emits. It is told when nobody wants more, and stops where the cache is whole.

        In a thread, because `generate` calls who streams, and because Ctrl-C must not end a forward pass half-way.
        """
        items: queue.Queue[Any] = queue.Queue(_WAITING)
        left, done, end = threading.Event(), threading.Event(), object()
        failed: list[BaseException] = []

        def emit(item: Any) -> bool:
            while not left.is_set():
                try:
                    items.put(item, timeout=0.05)
                    return True
                except queue.Full:
                    continue
            return False

        def run() -> None:
            try:
                work(emit)
            except BaseException as error:
                failed.append(error)
            done.set()
            emit(end)

        threading.Thread(target=run, daemon=True).start()
        try:
            while (item := items.get()) is not end:
                if item:
                    yield item
        finally:
            left.set()
            interrupt = None
            while not done.is_set():  # whatever is pressed, the forward pass that runs is the session's
                try:
                    done.wait()
                except KeyboardInterrupt as error:
                    interrupt = error
            if interrupt is not None:
                raise interrupt
        if failed:
            raise failed[0]

    def _end_running(self) -> None:
        """End the answer that is being given, if one is."""
        running = None if self._running is None else self._running()
        if running is not None:
            try:
                running.close()
            except ValueError as error:  # in the words of Python: it is already executing
                raise RuntimeError(
                    "An answer is being read in another thread; a session is used by one at a time."
                ) from error


class Detokenizer:
    """Tokens to text, piece by piece, by decoding a few tokens at a time.

    Args:
        tokenizer: of the tokens.
        before: the last tokens before those that will come.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(before)
        self._told = len(self._ids)  # how many of them are part of what was returned

    def push(self, tokens: list[int]) -> str:
        """The text that is certain now; the rest of a character may still be missing."""
        # One by one, for with each character that is complete the tokens before it are done with.
        pieces = []
        for token in tokens:
            self._ids.append(token)
            pieces.append(self._take(final=False))
        return "".join(pieces)

    def flush(self) -> str:
        """The rest."""
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        told, text = self._decode(self._ids[: self._told]), self._decode(self._ids)
        # A character of four bytes has at most four tokens; more than a few are none.
        whole = not text.endswith("\N{REPLACEMENT CHARACTER}") or len(self._ids) - self._told > 8
        if not (whole or final):
            return ""
        # The last tokens with a text stay, for they say whether a space belongs before the next one.
        if len(text) > len(told) or len(self._ids) > 16:
            self._ids = self._ids[self._told :]
        self._told = len(self._ids)
        return text[len(told) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


class _Tokens(BaseStreamer):
    """Gives the new tokens of `generate` to a function, without the prompt."""

    def __init__(self, take: Callable[[list[int]], None]) -> None:
        self._take = take
        self._begun = False

    def put(self, value: Tensor) -> None:
        if self._begun:
            self._take(value.flatten().tolist())
        self._begun = True

    def end(self) -> None: ...


class _Criteria(StoppingCriteria):
    """The criteria of a call, over all parts in which it is generated; `met` tells whether one of them was."""

    def __init__(self, tokenizer: Any, settings: Settings, left: Callable[[], bool]) -> None:
        self.met = False
        self._left = left
        self._criteria = StoppingCriteriaList(settings["stopping_criteria"] or [])
        if settings["stop_strings"] is not None:
            self._criteria.append(StopStringCriteria(tokenizer, settings["stop_strings"]))
        if settings["max_time"] is not None:
            self._criteria.append(MaxTimeCriteria(settings["max_time"], time.time()))

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        done = torch.full(input_ids.shape[:1], self._left(), device=input_ids.device)
        if len(self._criteria) > 0:
            done |= self._criteria(input_ids, scores, **kwargs)
        self.met = bool(done.all())
        return done


def _fingerprint(model: PreTrainedModel) -> str:
    """What tells one set of weights from another: the beginning of each."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(json.dumps([name, weight.shape, str(weight.dtype)]).encode())
        if weight.device.type != "meta" and weight.numel() > 0:  # one that is offloaded is not at hand
            own = weight.to_local() if hasattr(weight, "to_local") else weight  # if processes share it
            start = own.detach()[(0,) * (own.ndim - 1)].reshape(-1)[:64]
            digest.update(start.contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _vocabulary(tokenizer: Any) -> str:
    """What tells one vocabulary from another."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise TypeError(f"`{name}` must be a string, got {text!r:.80}.")
    if not text.strip():
        raise ValueError(f"`{name}` must not be empty, got {text!r:.80}.")
