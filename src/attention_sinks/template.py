"""`ChatTemplate`: what a chat template writes for one turn of a conversation; `encode`: its tokens."""

from typing import Any

from transformers import PreTrainedTokenizerBase

# Placeholders for the parts of a conversation that are not known yet.
_MESSAGE, _ANSWER = "message-b0b95fa4", "answer-57c1de90"


class ChatTemplate:
    """Writes a conversation turn by turn, although a template is made to write all of it at once.

    Args:
        tokenizer: its `chat_template` is used; it may be replaced at any time.
        system: the system prompt, which belongs to the first turn.
    """

    def __init__(self, tokenizer: Any, system: str | None) -> None:
        self._tokenizer = tokenizer
        self.system = system

    @property
    def exists(self) -> bool:
        """True if the tokenizer has a chat template."""
        return self._tokenizer.chat_template is not None

    def check(self) -> None:
        """Check, before a conversation, that it can be written turn by turn.

        Raises:
            TypeError, ValueError: naming the tokenizer, or the system prompt.
        """
        if not isinstance(self._tokenizer, PreTrainedTokenizerBase):
            remedy = " Pass its `tokenizer`." if hasattr(self._tokenizer, "tokenizer") else ""
            raise TypeError(
                f"`tokenizer` must be a tokenizer of transformers, got {type(self._tokenizer).__name__}.{remedy}"
            )
        if not self.exists and self.system is None:
            return
        for first in (True, False):
            if self.turn(_MESSAGE, first).count(_MESSAGE) != 1:
                raise ValueError(
                    "The chat template of the tokenizer does not show messages as they are, so that a conversation "
                    "cannot be written turn by turn. Set `tokenizer.chat_template` to another one, or to None for "
                    "`feed(text)` and `generate()`."
                )

    def before_message(self, first: bool) -> str:
        """Return the part of a turn before the user's message."""
        return self.turn(_MESSAGE, first).partition(_MESSAGE)[0]

    def after_message(self, first: bool) -> str:
        """Return the part of a turn after the user's message, up to the beginning of the answer."""
        return self.turn(_MESSAGE, first).partition(_MESSAGE)[2]

    def turn(self, message: str, first: bool) -> str:
        """Return a user's message with all that surrounds it, up to the beginning of the answer.

        Args:
            message: what the user says.
            first: True at the start of a conversation. Otherwise the text begins with the end of the previous answer.

        Raises:
            ValueError: if there is no template, or if it cannot write this conversation turn by turn.
        """
        if not self.exists:
            raise ValueError(
                "`tokenizer` has no chat template. Set `tokenizer.chat_template` to that of the model, or use "
                "`feed(text)` and `generate()`, which need none."
            )
        messages = []
        if not first:
            # One earlier turn stands for the whole conversation. It has no system prompt, because some templates
            # write it into the last message.
            messages += [{"role": "user", "content": _MESSAGE}, {"role": "assistant", "content": _ANSWER}]
        elif self.system is not None:
            messages.append({"role": "system", "content": self.system})
        messages.append({"role": "user", "content": message})
        try:
            text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # of Jinja, or raised by the template itself
            raise ValueError(f"The chat template of the tokenizer refuses the conversation: {error}") from error
        if first:
            if self.system is not None and self.system.strip() not in text:
                raise ValueError("`system` is left out by the chat template of the tokenizer. Say it in a message.")
            return text
        if text.count(_ANSWER) != 1:
            raise ValueError(
                "The chat template of the tokenizer does not show earlier answers as they were, so that a conversation "
                "cannot be continued turn by turn. Set `tokenizer.chat_template` to another one, or to None for "
                "`feed(text)` and `generate()`."
            )
        return text.partition(_ANSWER)[2]


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
