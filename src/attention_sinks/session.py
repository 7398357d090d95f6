"""`SinkSession`: one conversation, or one text, without end, in memory that does not grow."""

import contextlib
import os
from collections.abc import Callable, Generator
from typing import Any, NoReturn, Self

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel, StoppingCriteriaList
from transformers.utils import logging

from . import files
from .cache import DEFAULT_NUM_SINK_TOKENS, SinkCache
from .compat import DriftError
from .fields import NoneType, checked
from .generate import ASSISTED, check_arguments, sink_generate
from .inputs import check_vocabulary
from .models import unwrapped
from .prefill import check_model, last_logits_only, sink_prefill
from .prompt import GenerationSettings
from .streaming import AnswerCriteria, Detokenizer, Emit, TokenStreamer, Worker, compile_permission
from .template import ChatTemplate, encode, length_of_system
from .transcript import FIELDS, Transcript, fingerprint, vocabulary

# The arguments of `generate` that the session gives itself.
_OWN_ARGUMENTS = {
    "attention_mask", "cache", "cache_implementation", "custom_generate", "input_ids", "inputs", "inputs_embeds",
    "max_length", "min_length", "past_key_values", "position_ids", "prefill_chunk_size", "return_dict_in_generate",
    "streamer", "use_cache",
}  # fmt: skip

# What a file holds of a session, and of which types.
_FIELDS: dict[str, tuple[type, ...]] = {"model": (str,), "tokenizer": (str,), "system": (str, NoneType), **FIELDS}


class SinkSession:
    """One endless stream through a model: a chat, a document and questions to it, or plain text.

    Nothing grows with the stream: the session stores the tokens of at most three windows, and those of a text while it
    is read, and counts the others. (For a model whose positions cannot be rebased, see `SinkCache.can_rebase`, the
    token ids and masks of `generate` grow by a few bytes per token.)

    All forward passes run on one thread of the session. It starts with the first of them and ends with the session.

    Args:
        model: a causal language model, also one that `torch.compile`, PEFT or data parallelism wraps.
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
        config, template = _check_parts(model, tokenizer, system)
        if system is not None and keep_system_prompt:
            num_sink_tokens = max(num_sink_tokens, length_of_system(tokenizer, template, window_length))
        self._bind(model, tokenizer, template, Transcript(SinkCache(config, window_length, num_sink_tokens)))
        self._check_readable([])

    def _bind(self, model: Any, tokenizer: Any, template: ChatTemplate, transcript: Transcript) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._template = template
        self._transcript = transcript
        self._worker = Worker()

    @property
    def system(self) -> str | None:
        """The system prompt."""
        return self._template.system

    @property
    def cache(self) -> SinkCache:
        """What the model remembers of the stream."""
        return self._transcript.cache

    @property
    def tokens_seen(self) -> int:
        """The number of tokens in the stream, evicted ones included."""
        return self._transcript.num_tokens

    @property
    def kept_length(self) -> int:
        """The number of tokens that the cache holds."""
        return self.cache.kept_length

    def reset(self) -> None:
        """Start a new stream with the same system prompt."""
        self._worker.end()
        self.cache.reset()
        self._transcript.restart()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the stream to a safetensors file, from which `load` resumes it bitwise.

        The file replaces an old one in one step, even if the process is killed meanwhile. An open answer ends here.

        Raises:
            RuntimeError: if a forward pass was interrupted half-way, so that there is nothing to resume, or if another
                thread uses the session.
            OSError: if the file cannot be written.
        """
        self._worker.end()
        inner = unwrapped(self.model)
        of = {"model": fingerprint(inner), "tokenizer": vocabulary(self.tokenizer), "system": self.system}
        files.write(path, "session", {**of, **self._transcript.state()})

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
        config, template = _check_parts(model, tokenizer, state["system"])
        inner = unwrapped(model)
        # In a model that accelerate placed, each layer of the cache goes where it was, otherwise to the model's device.
        is_placed = getattr(inner, "hf_device_map", None) or inner.device.type == "meta"
        device = None if is_placed else inner.device
        transcript = Transcript.from_state(state, config, device)
        _check_owner(state, path, model=fingerprint(inner), tokenizer=vocabulary(tokenizer))
        session = cls.__new__(cls)
        session._bind(model, tokenizer, template, transcript)
        session._check_readable([])
        return session

    def fork(self) -> Self:
        """Return a session that goes on by itself from here, with the same model and tokenizer.

        An open answer goes on in this session alone; the fork has the tokens that the model has made so far.

        Raises:
            RuntimeError: if a forward pass was interrupted half-way, if another thread uses the session, or if the
                process was forked while an answer was open.
        """
        fork = type(self).__new__(type(self))
        with self._worker.paused():
            fork._bind(self.model, self.tokenizer, self._template, self._transcript.fork())
        return fork

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.fork()

    def __copy__(self) -> Self:
        return self.fork()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "A SinkSession cannot be pickled, since its model would be pickled with it. Write it to a file by "
            "`save(path)`, and resume it by `SinkSession.load(path, model, tokenizer)`; within a process, `fork()` it."
        )

    def feed(self, text: str) -> int:
        """Read a text of any length, each token with exactly its own window, and return its number of tokens.

        With a chat template the text is the beginning of the next message, without one it stands for itself. A text
        longer than the window shows a progress bar. After an interrupt the session keeps what it has read.

        Raises:
            TypeError, ValueError: if `text` is not a string, or is empty.
        """
        _check_text("text", text)
        tokens, num_before = self._worker.call(self._tokens_of_text, text)
        transcript = self._transcript
        first = transcript.num_tokens - transcript.ended + num_before
        unread = len(transcript.ids) - transcript.ended + len(tokens) - 1 - transcript.num_read

        def produce(emit: Emit) -> None:
            with transcript.appending():
                transcript.append_turn("user", tokens)
                try:
                    self._read_in_chunks(emit)
                finally:
                    del transcript.ids[max(transcript.num_read + 1, first - transcript.forgotten) :]

        with (
            logging.tqdm(total=unread, unit="token", disable=unread <= self.cache.window_length) as bar,
            contextlib.closing(self._worker.iterate(produce)) as counts,
        ):
            for count in counts:
                bar.update(count)
        return transcript.num_tokens - first

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
        tokens = self._worker.call(self._tokens_of_message, message, generate_kwargs)

        def begin() -> Detokenizer:
            self._transcript.append_turn("assistant", tokens)
            return Detokenizer(self.tokenizer)

        return self._pieces(generate_kwargs, begin)

    def generate(self, **generate_kwargs: Any) -> Generator[str]:
        """Continue the stream, in pieces of text as they are generated: after `feed`, or after an answer.

        An answer that was cut off goes on, also one that an error ended; after one that the model has ended, new text
        follows its end.

        Raises:
            TypeError, ValueError: naming the argument and its value; if there is nothing to continue.
        """
        self._worker.call(self._prepare_to_continue, generate_kwargs)
        transcript = self._transcript

        def begin() -> Detokenizer:
            transcript.ended = False
            return Detokenizer(self.tokenizer, transcript.ids[-8:])

        return self._pieces(generate_kwargs, begin)

    # Before anything is read, on the worker's thread

    def _tokens_of_text(self, text: str) -> tuple[list[int], int]:
        """Return the tokens of a text that is fed, and how many of them stand before it."""
        transcript, before, bos = self._transcript, "", []
        is_first = not transcript.ids
        if self._template.exists and transcript.turn != "user":
            before = self._template.before_message(is_first)
        elif is_first and self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id]:
            is_first, bos = False, [self.tokenizer.bos_token_id]
        num_before = len(bos) + len(encode(self.tokenizer, before, is_first))
        tokens = [*bos, *encode(self.tokenizer, before + text, is_first)]
        self._check_readable(tokens)
        return tokens, num_before

    def _tokens_of_message(self, message: str, generate_kwargs: dict[str, Any]) -> list[int]:
        """Return the tokens of a message, up to the beginning of the answer."""
        is_first = not self._transcript.ids
        if self._transcript.turn == "user":  # after `feed`
            text = "\n\n" + message + self._template.after_message(is_first)
        else:
            text = self._template.turn(message, is_first)
        tokens = encode(self.tokenizer, text, is_first)
        self._prepare(tokens, generate_kwargs)
        return tokens

    def _prepare_to_continue(self, generate_kwargs: dict[str, Any]) -> None:
        """Let there be an unread token."""
        if not self._transcript.ids:
            raise ValueError("There is nothing to continue: `feed(text)` first, or `chat(message)`.")
        self._prepare([], generate_kwargs)
        self._transcript.take_back_last()

    def _check_readable(self, tokens: list[int]) -> None:
        """Check that the model can read what is unread, and `tokens` after it."""
        inner, transcript = unwrapped(self.model), self._transcript
        check_model(inner, self.cache)
        unread = [*transcript.ids[transcript.num_read :], *tokens]
        check_vocabulary("tokenizer(text)", torch.tensor([unread], dtype=torch.long), inner)
        transcript.check_room(len(unread))

    def _prepare(self, tokens: list[int], generate_kwargs: dict[str, Any]) -> None:
        """Complete the arguments of an answer to `tokens`, and check them."""
        self._check_readable(tokens)
        inner = unwrapped(self.model)
        if GenerationSettings(inner, generate_kwargs)["stop_strings"] is not None:
            generate_kwargs.setdefault("tokenizer", self.tokenizer)
        _check_generate(inner, self.cache, self._tensor([*self._transcript.ids, *tokens]), generate_kwargs)

    # Reading and generating, on the worker's thread

    def _pieces(self, generate_kwargs: dict[str, Any], begin: Callable[[], Detokenizer]) -> Generator[str]:
        def produce(emit: Emit) -> None:
            with self._transcript.appending():
                detokenizer = begin()
                if self._read_in_chunks(lambda count: emit("")):
                    self._generate_parts(generate_kwargs, detokenizer, emit)

        return self._worker.iterate(produce)

    def _read_in_chunks(self, emit: Emit) -> bool:
        """Read all tokens but the last one, and emit how many at a time. Return True if all were read."""
        transcript, one_logit = self._transcript, last_logits_only(unwrapped(self.model))
        while (unread := len(transcript.ids) - 1 - transcript.num_read) > 0:
            transcript.compact()
            seen = transcript.num_read
            block = self._tensor(transcript.ids[seen : seen + min(unread, self.cache.window_length)])
            for _ in sink_prefill(self.model, block, self.cache, **one_logit):
                before, seen = seen, transcript.num_read
                if not emit(seen - before):
                    return False
        return True

    def _generate_parts(self, generate_kwargs: dict[str, Any], detokenizer: Detokenizer, emit: Emit) -> None:
        """Generate until the model, a stopping criterion or the reader ends the answer, and emit its text.

        Each call of `generate` makes a part of at most a window: it keeps all its tokens and their mask.
        """
        transcript, settings = self._transcript, GenerationSettings(unwrapped(self.model), generate_kwargs)
        most, least = settings["max_new_tokens"], settings["min_new_tokens"] or 0
        ends = settings["eos_token_id"]
        ends = ends if isinstance(ends, list | tuple) else [ends]
        criteria = AnswerCriteria(settings, self.tokenizer)

        def take(tokens: list[int]) -> None:
            transcript.ids.extend(tokens)
            if not emit(detokenizer.push(tokens)):
                criteria.reader_left = True

        generated = 0
        while not criteria.met and (most is None or generated < most):
            transcript.compact()
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
            transcript.ended = transcript.ids[-1] in ends
            if new < length or transcript.ended:
                break
        if (rest := detokenizer.flush()) and not criteria.reader_left:
            emit(rest)

    def _generate_part(self, arguments: dict[str, Any]) -> int:
        """Call `generate` once, and return the number of new tokens."""
        transcript, before = self._transcript, self.tokens_seen
        input_ids = self._tensor(transcript.ids)
        with compile_permission(unwrapped(self.model)) as permitted:
            if not permitted:
                arguments["disable_compile"] = True
            mask = torch.ones_like(input_ids)
            sink_generate(self.model, input_ids, attention_mask=mask, cache=self.cache, **arguments)
        new = self.tokens_seen - before
        if transcript.num_read != len(transcript.ids) - 1:
            raise DriftError(
                f"`generate` handed out {new} tokens after {before}, and the cache counts "
                f"{transcript.forgotten + transcript.num_read}"
            )
        return new

    def _tensor(self, tokens: list[int]) -> Tensor:
        device = unwrapped(self.model).device
        # The weights of an offloaded model are on no device; accelerate moves inputs to where they are needed.
        return torch.tensor([tokens], device="cpu" if device.type == "meta" else device)


def _check_owner(state: dict[str, Any], path: str | os.PathLike[str], **ours: str) -> None:
    """Check that a saved session is of this model and this tokenizer."""
    for name, what in (("model", "the weights"), ("tokenizer", "the vocabulary")):
        if state[name] != ours[name]:
            raise ValueError(f"`{name}` must be that of the session in {os.fspath(path)!r}: {what} are not the same.")


def _check_parts(model: Any, tokenizer: Any, system: str | None) -> tuple[PreTrainedConfig, ChatTemplate]:
    """Check what a session is made of; return the config of the model, and the template."""
    inner, template = unwrapped(model), ChatTemplate(tokenizer, system)
    if not isinstance(inner, GenerationMixin):
        raise TypeError(f"`model` must be a model that can generate, got {type(inner).__name__}.")
    if system is not None:
        _check_text("system", system)
    template.check()
    return inner.config, template


def _check_generate(model: Any, cache: SinkCache, input_ids: Tensor, generate_kwargs: dict[str, Any]) -> None:
    """Refuse the arguments of an answer to `input_ids` that a session or `generate` cannot take.

    Raises:
        TypeError, ValueError: naming the argument and its value.
    """
    for name in sorted(generate_kwargs.keys() & _OWN_ARGUMENTS):
        remedy = f" Bound an answer by `{name[:3]}_new_tokens`." if name.endswith("_length") else ""
        raise TypeError(f"`{name}` must be left out, got {generate_kwargs[name]!r:.80}: the session sets it.{remedy}")
    settings = GenerationSettings(model, generate_kwargs)
    for name in ("guidance_scale", "num_beams", "num_return_sequences"):
        if settings[name] not in (None, 1):
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


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise TypeError(f"`{name}` must be a string, got {text!r:.80}.")
    if not text.strip():
        raise ValueError(f"`{name}` must not be empty, got {text!r:.80}.")
