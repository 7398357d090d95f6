"""`SinkSession`: one conversation, or one text, without end, in memory that does not grow."""

import contextlib
import os
from collections.abc import Callable, Generator, Sequence
from typing import Any, NoReturn, Self

import torch
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from . import files
from .architecture.settings import own_text_config
from .cache import DEFAULT_NUM_SINK_TOKENS, SinkCache
from .fields import NoneType, checked
from .inputs import check_vocabulary
from .messages import Message, MessageWriter, checked_media
from .models import unwrapped
from .passes import Passes
from .prefill import check_model
from .prompt import GenerationSettings
from .streaming import Detokenizer, Emit, Worker
from .template import length_of_system
from .transcript import FIELDS, Transcript, fingerprint, vocabulary

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
        tokenizer: its tokenizer; or its processor, for messages with images, videos or sound.
        window_length: the most tokens that the model sees.
        num_sink_tokens: how many of the first tokens are never evicted.
        system: a system prompt, if there is a chat template.
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
        config, writer = _check_parts(model, tokenizer, system)
        if system is not None and keep_system_prompt:
            length = length_of_system(writer.tokenizer, writer.template, window_length)
            num_sink_tokens = max(num_sink_tokens, length)
        self._bind(model, writer, Transcript(SinkCache(config, window_length, num_sink_tokens)))
        self._check_readable(Message([]))

    def _bind(self, model: Any, writer: MessageWriter, transcript: Transcript) -> None:
        self.model = model
        self.tokenizer = writer.tokenizer
        self._writer = writer
        self._transcript = transcript
        self._worker = Worker()

    @property
    def system(self) -> str | None:
        """The system prompt."""
        return self._writer.template.system

    @property
    def processor(self) -> Any:
        """The processor of the model, or None if the session was made with a tokenizer."""
        return self._writer.processor

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
            tokenizer: its tokenizer, with the same vocabulary, or its processor.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is truncated, damaged, of another program or a newer version, or if the stream
                belongs to another model or tokenizer.

        Example:
            >>> session.save("chat.safetensors")
            >>> session = SinkSession.load("chat.safetensors", model, tokenizer)
        """
        state = checked(files.read(path, "session"), _FIELDS, "a session")
        config, writer = _check_parts(model, tokenizer, state["system"])
        inner = unwrapped(model)
        # In a model that accelerate placed, each layer of the cache goes where it was, otherwise to the model's device.
        is_placed = getattr(inner, "hf_device_map", None) or inner.device.type == "meta"
        device = None if is_placed else inner.device
        transcript = Transcript.from_state(state, config, device)
        _check_owner(state, path, model=fingerprint(inner), tokenizer=vocabulary(writer.tokenizer))
        session = cls.__new__(cls)
        session._bind(model, writer, transcript)
        session._check_readable(Message([]))
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
            fork._bind(self.model, self._writer, self._transcript.fork())
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

    def feed(
        self,
        text: str | None = None,
        *,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        audio: Sequence[Any] | None = None,
    ) -> int:
        """Read images, videos, sound, and a text of any length, and return the number of their tokens.

        With a chat template they are the beginning of the next message, without one a text stands for itself. Each
        token of a text has exactly its own window; one longer than the window shows a progress bar. After an interrupt
        the session keeps what it has read.

        Args:
            text: a text, which may be left out beside images, videos or sound.
            images, videos, audio: see `chat`.

        Raises:
            TypeError, ValueError: naming the argument and its value, before anything is read.
        """
        media = checked_media(images=images, videos=videos, audio=audio)
        if text is not None or not media:
            _check_text("text", text)
        message, transcript = self._worker.call(self._prepare_beginning, text, media), self._transcript
        first = transcript.num_tokens - transcript.ended + message.num_before
        unread = len(transcript.ids) - transcript.ended + len(message.ids) - 1 - transcript.num_read

        def produce(emit: Emit) -> None:
            with transcript.appending():
                try:
                    if self._passes.read_at_once(message, emit):
                        transcript.append_turn("media" if text is None else "user", message.rest)
                        self._passes.read_in_chunks(emit)
                finally:
                    del transcript.ids[max(transcript.num_read + 1, first - transcript.forgotten) :]

        with (
            logging.tqdm(total=unread, unit="token", disable=unread <= self.cache.window_length) as bar,
            contextlib.closing(self._worker.iterate(produce)) as counts,
        ):
            for count in counts:
                bar.update(count)
        return transcript.num_tokens - first

    def chat(
        self,
        message: str,
        *,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        audio: Sequence[Any] | None = None,
        **generate_kwargs: Any,
    ) -> Generator[str]:
        """Answer a message, in pieces of text as they are generated.

        The model reads the tokens that the chat template gives for the whole conversation; a message longer than the
        window is read as by `feed`. An answer ends where the model ends it, or after `max_new_tokens`, or when the
        caller stops iterating. The conversation continues from there.

        Args:
            message: what the user says.
            images: the images of the message, which stand before its text: of PIL, arrays or tensors.
            videos: its videos: lists of frames, arrays or tensors.
            audio: its sounds: arrays or tensors with the sampling rate of the processor.
            generate_kwargs: of `generate`: `do_sample`, `temperature`, `max_new_tokens`, ... Logits processors and
                stopping criteria get the latest tokens of the stream, not all of them.

        Raises:
            TypeError, ValueError: naming the argument and its value, before anything is read.
        """
        _check_text("message", message)
        media = checked_media(images=images, videos=videos, audio=audio)
        unread = self._worker.call(self._prepare_message, message, media, generate_kwargs)

        def begin(emit: Emit) -> Detokenizer | None:
            if not self._passes.read_at_once(unread, emit):
                return None
            self._transcript.append_turn("assistant", unread.rest)
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

        def begin(emit: Emit) -> Detokenizer:
            transcript.ended = False
            return Detokenizer(self.tokenizer, transcript.ids[-8:])

        return self._pieces(generate_kwargs, begin)

    @property
    def _passes(self) -> Passes:
        return Passes(self.model, self._transcript)

    # Before anything is read, on the worker's thread

    def _prepare_beginning(self, text: str | None, media: dict[str, list[Any]]) -> Message:
        """Return the beginning of a message that can be read."""
        message = self._writer.beginning(unwrapped(self.model), self._transcript, text, media)
        self._check_readable(message)
        return message

    def _prepare_message(self, text: str, media: dict[str, list[Any]], generate_kwargs: dict[str, Any]) -> Message:
        """Return a message that can be read and answered."""
        message = self._writer.whole(unwrapped(self.model), self._transcript, text, media)
        self._prepare(message, generate_kwargs)
        return message

    def _prepare_to_continue(self, generate_kwargs: dict[str, Any]) -> None:
        """Let there be an unread token."""
        transcript = self._transcript
        if not transcript.ids:
            raise ValueError("There is nothing to continue: `feed(text)` first, or `chat(message)`.")
        placeholders = self._writer.placeholders(unwrapped(self.model))
        if transcript.num_read == len(transcript.ids) and transcript.ids[-1] in placeholders:
            raise ValueError("There is no text to continue after an image: `feed(text)` first, or `chat(message)`.")
        self._prepare(Message([]), generate_kwargs)
        transcript.take_back_last()

    def _check_readable(self, message: Message) -> None:
        """Check that the model can read what is unread, and a message after it."""
        inner, transcript = unwrapped(self.model), self._transcript
        check_model(inner, self.cache)
        unread = transcript.ids[transcript.num_read :]
        texts = [*unread, *message.ids[: message.at_once.start], *message.rest]
        check_vocabulary("tokenizer(text)", torch.tensor([texts], dtype=torch.long), inner)
        transcript.check_room(len(unread) + len(message.ids))

    def _prepare(self, message: Message, generate_kwargs: dict[str, Any]) -> None:
        """Complete the arguments of an answer to a message, and check them."""
        self._check_readable(message)
        inner = unwrapped(self.model)
        if GenerationSettings(inner, generate_kwargs)["stop_strings"] is not None:
            generate_kwargs.setdefault("tokenizer", self.tokenizer)
        self._passes.check_generate(message.ids, generate_kwargs)

    # Reading and generating, on the worker's thread

    def _pieces(self, generate_kwargs: dict[str, Any], begin: Callable[[Emit], Detokenizer | None]) -> Generator[str]:
        def produce(emit: Emit) -> None:
            def nothing(count: int) -> bool:
                return emit("")

            with self._transcript.appending():
                detokenizer = begin(nothing)
                if detokenizer is not None and self._passes.read_in_chunks(nothing):
                    self._passes.generate(generate_kwargs, self.tokenizer, detokenizer, emit)

        return self._worker.iterate(produce)


def _check_owner(state: dict[str, Any], path: str | os.PathLike[str], **ours: str) -> None:
    """Check that a saved session is of this model and this tokenizer."""
    for name, what in (("model", "the weights"), ("tokenizer", "the vocabulary")):
        if state[name] != ours[name]:
            raise ValueError(f"`{name}` must be that of the session in {os.fspath(path)!r}: {what} are not the same.")


def _check_parts(model: Any, tokenizer: Any, system: str | None) -> tuple[PreTrainedConfig, MessageWriter]:
    """Check what a session is made of; return the config of its text, and what writes its messages."""
    inner, writer = unwrapped(model), MessageWriter(tokenizer, system)
    if not isinstance(inner, GenerationMixin):
        raise TypeError(f"`model` must be a model that can generate, got {type(inner).__name__}.")
    if system is not None:
        _check_text("system", system)
    writer.template.check()
    writer.check(inner, "system", system, {})
    return own_text_config(inner.config), writer


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise TypeError(f"`{name}` must be a string, got {text!r:.80}.")
    if not text.strip():
        raise ValueError(f"`{name}` must not be empty, got {text!r:.80}.")
