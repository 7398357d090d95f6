"""`ChatTemplate`: what a chat template writes for one turn of a conversation; `encode`: its tokens."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

# Placeholders for the parts of a conversation that are not known yet.
_MESSAGE, _ANSWER = "message-b0b95fa4", "answer-57c1de90"


class ChatTemplate:
    """Writes a conversation turn by turn, although a template is made to write all of it at once.

    Args:
        owner: a tokenizer or a processor. Its `chat_template` is used; it may be replaced at any time.
        system: the system prompt, which belongs to the first turn.

    Attributes:
        kind: "tokenizer" or "processor".
    """

    def __init__(self, owner: Any, system: str | None) -> None:
        self._owner = owner
        self.system = system
        self.kind = "processor" if is_processor(owner) else "tokenizer"

    @property
    def exists(self) -> bool:
        """True if there is a chat template."""
        return getattr(self._owner, "chat_template", None) is not None

    def check(self) -> None:
        """Check, before a conversation, that it can be written turn by turn.

        Raises:
            TypeError, ValueError: naming the tokenizer, or the system prompt.
        """
        if not isinstance(self._owner, PreTrainedTokenizerBase) and self.kind == "tokenizer":
            remedy = " Pass its `tokenizer`." if hasattr(self._owner, "tokenizer") else ""
            raise TypeError(
                f"`tokenizer` must be a tokenizer of transformers, got {type(self._owner).__name__}.{remedy}"
            )
        if not self.exists and self.system is None:
            return
        for first in (True, False):
            if self.turn(_MESSAGE, first).count(_MESSAGE) != 1:
                raise ValueError(
                    f"The chat template of the {self.kind} does not show messages as they are, so that a conversation "
                    f"cannot be written turn by turn. Set `{self.kind}.chat_template` to another one, or to None for "
                    "`feed(text)` and `generate()`."
                )

    def before_message(self, first: bool, media: Sequence[str] = ()) -> str:
        """Return the part of a turn before the text of the user's message, with the placeholders of its media."""
        return self.turn(_MESSAGE, first, media).partition(_MESSAGE)[0]

    def within_message(self, first: bool, media: Sequence[str]) -> str:
        """Return the placeholders of media that follow others in a message that has begun.

        Raises:
            ValueError: if the template puts something behind all media.
        """
        before, with_media = self.before_message(first, media), self.before_message(first, [*media, *media])
        if not with_media.startswith(before):
            raise ValueError(
                "The chat template of the processor does not write the media of a message one after the other, so that "
                "a message that has begun cannot get more of them. Give all to one call, or `chat` before."
            )
        return with_media[len(before) :]

    def after_message(self, first: bool) -> str:
        """Return the part of a turn after the user's message, up to the beginning of the answer."""
        return self.turn(_MESSAGE, first).partition(_MESSAGE)[2]

    def turn(self, message: str, first: bool, media: Sequence[str] = ()) -> str:
        """Return a user's message with all that surrounds it, up to the beginning of the answer.

        Args:
            message: what the user says.
            first: True at the start of a conversation. Otherwise the text begins with the end of the previous answer.
            media: the types of what stands before the text of the message: "image", "video" or "audio".

        Raises:
            ValueError: if there is no template, or if it cannot write this conversation turn by turn.
        """
        if not self.exists:
            raise ValueError(
                f"`{self.kind}` has no chat template. Set `{self.kind}.chat_template` to that of the model, or use "
                "`feed(text)` and `generate()`, which need none."
            )
        messages = []
        if not first:
            # One earlier turn stands for the whole conversation. It has no system prompt, because some templates
            # write it into the last message.
            messages += [self._message("user", _MESSAGE), self._message("assistant", _ANSWER)]
        elif self.system is not None:
            messages.append(self._message("system", self.system))
        messages.append(self._message("user", message, media))
        try:
            text: str = self._owner.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # of Jinja, or raised by the template itself
            raise ValueError(f"The chat template of the {self.kind} refuses the conversation: {error}") from error
        if first:
            if self.system is not None and self.system.strip() not in text:
                raise ValueError(f"`system` is left out by the chat template of the {self.kind}. Say it in a message.")
            return text
        if text.count(_ANSWER) != 1:
            raise ValueError(
                f"The chat template of the {self.kind} does not show earlier answers as they were, so that a "
                f"conversation cannot be continued turn by turn. Set `{self.kind}.chat_template` to another one, or to "
                "None for `feed(text)` and `generate()`."
            )
        return text.partition(_ANSWER)[2]

    def _message(self, role: str, text: str, media: Sequence[str] = ()) -> dict[str, Any]:
        """Return a message as templates take it: those of processors take a list of parts."""
        if self.kind == "tokenizer":
            return {"role": role, "content": text}
        return {"role": role, "content": [*({"type": each} for each in media), {"type": "text", "text": text}]}


def is_processor(owner: Any) -> bool:
    """Return True for a processor: it has a tokenizer, and writes conversations itself."""
    return hasattr(owner, "apply_chat_template") and isinstance(
        getattr(owner, "tokenizer", None), PreTrainedTokenizerBase
    )


def encode(tokenizer: Any, text: str, first: bool) -> list[int]:
    """Return the tokens of a text at the start of a stream, if `first`, or of a text that follows others.

    Some tokenizers treat the start of a text differently.
    """

    def tokens_of(text: str) -> list[int]:
        tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return tokens

    before = tokens_of("a")
    if not first and (joined := tokens_of("a" + text))[: len(before)] == before:
        return joined[len(before) :]
    return tokens_of(text)


def length_of_system(tokenizer: Any, template: ChatTemplate, window_length: int) -> int:
    """Return the number of tokens of the system prompt, which must fit the window."""
    length = len(encode(tokenizer, template.before_message(first=True), first=True))
    if length >= window_length:
        raise ValueError(
            f"`system` must fit the window: it has {length} tokens with its template, and "
            f"window_length={window_length} must also hold recent ones. Choose a shorter one or a larger window, or "
            "let it be forgotten with keep_system_prompt=False."
        )
    return length
