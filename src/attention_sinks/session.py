"""`SinkSession`: one conversation, or one text, without end, in memory that does not grow."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Generator
from typing import Any, Self

import torch
from torch import Tensor
from transformers import (
    MaxTimeCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.utils import logging

from . import files
from .cache import DEFAULT_NUM_SINK_TOKENS, SinkCache
from .compat import DriftError
from .fields import NoneType, checked
from .generate import ASSISTED, check_arguments, sink_generate
from .prefill import last_logits_only, sink_prefill
from .prompt import GenerationSettings
from .streaming import AnswerCriteria, Detokenizer, Emit, TokenStreamer, Worker, compile_permission
from .template import ChatTemplate, encode

# The arguments of `generate` that the session gives itself.
_OWN_ARGUMENTS = {
    "attention_mask", "cache", "cache_implementation", "custom_generate", "input_ids", "inputs", "inputs_embeds",
    "max_length", "min_length", "past_key_values", "position_ids", "prefill_chunk_size", "return_dict_in_generate",
    "streamer", "use_cache",
}  # fmt: skip

# What a file holds of a session, and of which types.
_FIELDS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "tokenizer": (str,),
    "system": (str, NoneType),
    "ids": (Tensor,),
    "forgotten": (int,),
    "open": (str, NoneType),
    "ended": (bool,),
    "cache": (dict,),
}


class SinkSession:
    """One endless stream through a model: a chat, a document and questions to it, or plain text.

    Nothing grows with the stream: the session stores the tokens of at most three windows, and those of a text while it
    is read, and counts the others. (For a
    model whose positions cannot be rebased, see `SinkCache.can_rebase`, the token ids and masks of `generate` grow by a
    few bytes per token.)

    All forward passes run on one thread of the session. It starts with the first of them and ends with the session.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        window_length: the most tokens that the model sees.
        num_sink_tokens: how many of the first tokens are never evicted.
        system: a system prompt, for a tokenizer with a chat template.
        keep_system_prompt: make all tokens before the first message sinks, the system prompt's among them.

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
        self._bind(model, tokenizer, system)
        if system is not None:
            _check_text("system", system)
            if keep_system_prompt:
                kept = len(self._encode(self._template.before_message(first=True)))
                num_sink_tokens = max(num_sink_tokens, kept)
                if num_sink_tokens >= window_length:
                    raise ValueError(
                        f"`system` must fit the window: it has {kept} tokens with its template, and "
                        f"window_length={window_length} must also hold recent ones. Choose a shorter one or a larger "
                        "window, or let it be forgotten with keep_system_prompt=False."
                    )
        self.cache = SinkCache(model.config, window_length, num_sink_tokens)

    def _bind(self, model: PreTrainedModel, tokenizer: Any, system: str | None) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.system = system
        self._template = ChatTemplate(tokenizer, system)
        self._worker = Worker()
        self._start()

    def _start(self) -> None:
        self._ids: list[int] = []  # the tokens that the cache counts, then the unread ones, at least one
        self._forgotten = 0  # how many tokens before these were evicted
        self._open: str | None = None  # whose turn the next token belongs to
        self._ended = False  # True if the last token is the one by which the model ended its answer

    @property
    def tokens_seen(self) -> int:
        """The number of tokens in the stream, evicted ones included."""
        return self._forgotten + len(self._ids)

    @property
    def kept_length(self) -> int:
        """The number of tokens that the cache holds."""
        return self.cache.kept_length

    def reset(self) -> None:
        """Start a new stream with the same system prompt."""
        self._worker.end()
        self.cache.reset()
        self._start()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the stream to a safetensors file, from which `load` resumes it bitwise.

        The file replaces an old one in one step, even if the process is killed meanwhile. An open answer ends here.

        Raises:
            RuntimeError: if a forward pass was interrupted half-way, so that there is nothing to resume, or if another
                thread uses the session.
            OSError: if the file cannot be written.
        """
        self._worker.end()
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
        """Return the session that `save` wrote; it continues where it was.

        Args:
            path: of the file.
            model: the model of the session; the first values of each weight are compared.
            tokenizer: its tokenizer, with the same vocabulary.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is truncated, damaged, of another program or a newer version, or if the stream
                belongs to another model or tokenizer.

        Example:
            >>> session.save("chat.safetensors")
            >>> session = SinkSession.load("chat.safetensors", model, tokenizer)
        """
        state = checked(files.read(path, "session"), _FIELDS, "a session")
        # In a model that accelerate placed, each layer of the cache goes where it was, otherwise to the model's device.
        device = None if getattr(model, "hf_device_map", None) else model.device
        cache = SinkCache.from_state(state["cache"], model.config, device)
        for name, ours in (("model", _fingerprint(model)), ("tokenizer", _vocabulary(tokenizer))):
            if state[name] != ours:
                what = "the weights" if name == "model" else "the vocabulary"
                raise ValueError(
                    f"`{name}` must be that of the session in {os.fspath(path)!r}: {what} are not the same."
                )
        session = cls.__new__(cls)
        session._bind(model, tokenizer, state["system"])
        session.cache = cache
        session._ids = state["ids"].tolist()
        session._forgotten, session._open, session._ended = state["forgotten"], state["open"], state["ended"]
        return session

    def feed(self, text: str) -> int:
        """Read a text of any length, each token with exactly its own window, and return its number of tokens.

        With a chat template the text is the beginning of the next message, without one it stands for itself. A text
        longer than the window shows a progress bar. After an interrupt the session keeps what it has read.

        Raises:
            TypeError, ValueError: if `text` is not a string, or is empty.
        """
        _check_text("text", text)
        self._worker.end()
        before = ""
        if self._template.exists and self._open != "user":
            before = self._template.before_message(first=not self._ids)
        elif not self._ids and self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id]:
            self._ids.append(self.tokenizer.bos_token_id)
        self._drop_end_of_turn()
        first = self.tokens_seen + len(self._encode(before))
        tokens = self._encode(before + text)
        self._ids += tokens
        self._open = "user"
        unread = len(self._ids) - 1 - self.cache.get_seq_length()
        try:
            short = unread <= self.cache.window_length
            with (
                logging.tqdm(total=unread, unit="token", disable=short) as bar,
                contextlib.closing(self._worker.iterate(self._read_in_chunks)) as counts,
            ):
                for count in counts:
                    bar.update(count)
        finally:
            read = max(self.cache.get_seq_length() + 1, first - self._forgotten)
            del self._ids[read:]
        return self.tokens_seen - first

    def chat(self, message: str, **generate_kwargs: Any) -> Generator[str]:
        """Answer a message, in pieces of text as they are generated.

        The model reads the tokens that the chat template gives for the whole conversation; a message longer than the
        window is read as by `feed`. An answer ends where the model ends it, or after `max_new_tokens`, or when the
        caller stops iterating. The conversation continues from there.

        Args:
            message: what the user says.
            generate_kwargs: of `generate`: `do_sample`, `temperature`, `max_new_tokens`, ... Logits processors and
                stopping criteria get the latest tokens of the stream, not all of them.

        Raises:
            TypeError, ValueError: naming the argument and its value, before anything is read.
        """
        _check_text("message", message)
        self._worker.end()
        if self._open == "user":  # after `feed`
            text = "\n\n" + message + self._template.after_message(first=not self._ids)
        else:
            text = self._template.turn(message, first=not self._ids)
        tokens = self._encode(text)
        self._prepare(tokens, generate_kwargs)

        def begin() -> Detokenizer:
            self._drop_end_of_turn()
            self._ids.extend(tokens)
            self._open = "assistant"
            return Detokenizer(self.tokenizer)

        return self._pieces(generate_kwargs, begin)

    def generate(self, **generate_kwargs: Any) -> Generator[str]:
        """Continue the stream, in pieces of text as they are generated: after `feed`, or after an answer.

        An answer that was cut off goes on; after one that the model has ended, new text follows its end.

        Raises:
            TypeError, ValueError: naming the argument and its value; if there is nothing to continue.
        """
        self._worker.end()
        if len(self._ids) == self.cache.get_seq_length():  # at the start, or where an error ended an answer
            raise ValueError("There is nothing to continue: `feed(text)` first, or `chat(message)`.")
        self._prepare([], generate_kwargs)

        def begin() -> Detokenizer:
            self._ended = False
            return Detokenizer(self.tokenizer, self._ids[-8:])

        return self._pieces(generate_kwargs, begin)

    # Text to tokens

    def _drop_end_of_turn(self) -> None:
        """Remove the token by which the model ended its answer: the template writes it again."""
        if self._ended:
            self._ids.pop()
        self._ended = False

    def _encode(self, text: str) -> list[int]:
        return encode(self.tokenizer, text, first=not self._ids)

    def _prepare(self, tokens: list[int], generate_kwargs: dict[str, Any]) -> None:
        """Complete the arguments of an answer to `tokens`, and check them before anything is read."""
        if GenerationSettings(self.model, generate_kwargs)["stop_strings"] is not None:
            generate_kwargs.setdefault("tokenizer", self.tokenizer)
        _check_generate(self.model, self.cache, self._tensor([*self._ids, *tokens]), generate_kwargs)

    # Reading and generating, on the worker's thread

    def _pieces(self, generate_kwargs: dict[str, Any], begin: Callable[[], Detokenizer]) -> Generator[str]:
        def produce(emit: Emit) -> None:
            detokenizer = begin()
            if self._read_in_chunks(lambda count: emit("")):
                self._generate_parts(generate_kwargs, detokenizer, emit)

        return self._worker.iterate(produce)

    def _read_in_chunks(self, emit: Emit) -> bool:
        """Read all tokens but the last one, and emit how many at a time. Return True if all were read."""
        while (unread := len(self._ids) - 1 - self.cache.get_seq_length()) > 0:
            self._compact()
            seen = self.cache.get_seq_length()
            block = self._tensor(self._ids[seen : seen + min(unread, self.cache.window_length)])
            for _ in sink_prefill(self.model, block, self.cache, **last_logits_only(self.model)):
                before, seen = seen, self.cache.get_seq_length()
                if not emit(seen - before):
                    return False
        return True

    def _generate_parts(self, generate_kwargs: dict[str, Any], detokenizer: Detokenizer, emit: Emit) -> None:
        """Generate until the model, a stopping criterion or the reader ends the answer, and emit its text.

        Each call of `generate` makes a part of at most a window: it keeps all its tokens and their mask.
        """
        settings = GenerationSettings(self.model, generate_kwargs)
        most, least = settings["max_new_tokens"], settings["min_new_tokens"] or 0
        ends = settings["eos_token_id"]
        ends = ends if isinstance(ends, list | tuple) else [ends]
        criteria = AnswerCriteria(_criteria_of(settings, self.tokenizer))

        def take(tokens: list[int]) -> None:
            self._ids.extend(tokens)
            if not emit(detokenizer.push(tokens)):
                criteria.reader_left = True

        generated = 0
        while not criteria.met and (most is None or generated < most):
            self._compact()
            length = self.cache.window_length if most is None else min(self.cache.window_length, most - generated)
            arguments = {
                **generate_kwargs,
                "max_new_tokens": length,
                "min_new_tokens": min(length, max(least - generated, 0)),
                "stopping_criteria": StoppingCriteriaList([criteria]),
                "streamer": TokenStreamer(take),
            }
            new = self._generate_part(arguments)
            generated += new
            self._ended = self._ids[-1] in ends
            if new < length or self._ended:
                break
        if (rest := detokenizer.flush()) and not criteria.reader_left:
            emit(rest)

    def _generate_part(self, arguments: dict[str, Any]) -> int:
        """Call `generate` once, and return the number of new tokens."""
        before = self.tokens_seen
        input_ids = self._tensor(self._ids)
        with compile_permission(self.model) as permitted:
            if not permitted:
                arguments["disable_compile"] = True
            mask = torch.ones_like(input_ids)
            sink_generate(self.model, input_ids, attention_mask=mask, cache=self.cache, **arguments)
        new = self.tokens_seen - before
        if self.cache.get_seq_length() != len(self._ids) - 1:
            raise DriftError(
                f"`generate` handed out {new} tokens after {before}, and the cache counts "
                f"{self.cache.get_seq_length() + self._forgotten}"
            )
        return new

    def _compact(self) -> None:
        """Compact the cache once all recent tokens were evicted once, so that each key is rounded at most once."""
        cache = self.cache
        evicted = cache.get_seq_length() - cache.kept_length
        if evicted >= cache.window_length - cache.num_sink_tokens and cache.can_rebase:
            cache.compact()
            del self._ids[cache.num_sink_tokens : cache.num_sink_tokens + evicted]
            self._forgotten += evicted

    def _tensor(self, tokens: list[int]) -> Tensor:
        device = self.model.device
        # The weights of an offloaded model are on no device; accelerate moves inputs to where they are needed.
        return torch.tensor([tokens], device="cpu" if device.type == "meta" else device)


def _check_generate(model: Any, cache: SinkCache, input_ids: Tensor, generate_kwargs: dict[str, Any]) -> None:
    """Refuse the arguments of an answer to `input_ids` that a session or `generate` cannot take.

    Raises:
        TypeError, ValueError: naming the argument and its value.
    """
    for name in sorted(generate_kwargs.keys() & _OWN_ARGUMENTS):
        remedy = f" Bound an answer by `{name[:3]}_new_tokens`." if name.endswith("_length") else ""
        raise TypeError(f"`{name}` must be left out, got {generate_kwargs[name]!r:.80}: the session sets it.{remedy}")
    settings = GenerationSettings(model, generate_kwargs)
    for name in ("num_beams", "num_return_sequences"):
        if (settings[name] or 1) != 1:
            raise ValueError(f"`{name}` must be 1, got {settings[name]}: a session is one stream.")
    for name in ASSISTED:
        if settings[name] is not None:
            raise ValueError(
                f"`{name}` must be left out, got {settings[name]!r:.80}: sessions generate token by token."
            )
    most = settings["max_new_tokens"]
    if not isinstance(most, int | None):
        raise TypeError(f"`max_new_tokens` must be an int, got {most!r}.")
    bounded = {**generate_kwargs, "max_new_tokens": cache.window_length if most is None else most}
    check_arguments(model, input_ids, cache, bounded)


def _criteria_of(settings: GenerationSettings, tokenizer: Any) -> StoppingCriteriaList:
    """Return the stopping criteria that `generate` would apply anew in each part of an answer."""
    criteria = StoppingCriteriaList(settings["stopping_criteria"] or [])
    if settings["stop_strings"] is not None:
        criteria.append(StopStringCriteria(tokenizer, settings["stop_strings"]))
    if settings["max_time"] is not None:
        criteria.append(MaxTimeCriteria(settings["max_time"], time.time()))
    return criteria


def _fingerprint(model: PreTrainedModel) -> str:
    """Return a digest of the first values of each weight, which tells one set of weights from another."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(json.dumps([name, weight.shape, str(weight.dtype)]).encode())
        if weight.device.type != "meta" and weight.numel() > 0:  # the values of offloaded weights are not at hand
            local = weight.to_local() if hasattr(weight, "to_local") else weight  # sharded over several processes
            start = local.detach()[(0,) * (local.ndim - 1)].reshape(-1)[:64]
            digest.update(start.contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _vocabulary(tokenizer: Any) -> str:
    """Return a digest of the vocabulary."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise TypeError(f"`{name}` must be a string, got {text!r:.80}.")
    if not text.strip():
        raise ValueError(f"`{name}` must not be empty, got {text!r:.80}.")
