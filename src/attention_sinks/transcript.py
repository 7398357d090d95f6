"""`Transcript`: the tokens of a session, read and unread; `fingerprint` and `vocabulary`: whose tokens they are."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .cache import SinkCache
from .fields import NoneType

# What is saved of a transcript, and of which types.
FIELDS: dict[str, tuple[type, ...]] = {
    "ids": (Tensor,),
    "forgotten": (int,),
    "open": (str, NoneType),
    "ended": (bool,),
    "cache": (dict,),
}


class Transcript:
    """The tokens of a stream without end, beside the cache that reads them.

    Attributes:
        cache: what was read.
        ids: the tokens that the cache counts, then the unread ones: at least one, unless an error ended an answer.
        forgotten: how many tokens before these were evicted.
        turn: whose turn the next token belongs to: "user", "assistant", or "media", the user's so far ending in images.
        ended: True if the last token is the one by which the model ended its answer.
    """

    def __init__(self, cache: SinkCache) -> None:
        self.cache = cache
        self.restart()

    def restart(self) -> None:
        """Begin a new stream; the cache is empty."""
        self.ids: list[int] = []
        self.forgotten = 0
        self.turn: str | None = None
        self.ended = False

    def fork(self) -> Self:
        """Return a transcript that goes on by itself from here."""
        fork = type(self)(self.cache.fork())
        fork.ids, fork.forgotten = self.ids.copy(), self.forgotten
        fork.turn, fork.ended = self.turn, self.ended
        return fork

    @property
    def num_tokens(self) -> int:
        """The number of tokens, evicted ones included."""
        return self.forgotten + len(self.ids)

    @property
    def num_read(self) -> int:
        """How many of `ids` the cache has read."""
        return self.cache.get_seq_length()

    def check_room(self, num_unread: int) -> None:
        """Check that the model can read so many tokens.

        Raises:
            ValueError: if its positions end before, and cannot be rebased.
        """
        left = self.cache.positions_left(self.num_read)
        if num_unread > left and not self.cache.can_rebase:
            raise ValueError(
                f"A text must have at most {left} tokens now, got {num_unread}: the positions of this model end, or "
                f"change their meaning, at {self.cache.position_limit}. Start a new stream with `reset()`."
            )

    @contextlib.contextmanager
    def appending(self) -> Iterator[None]:
        """Inside, tokens are appended and read. If an error comes before any of them is read, none was appended."""
        read, unread, turn, ended = self.forgotten + self.num_read, self.ids[self.num_read :], self.turn, self.ended
        try:
            yield
        except BaseException:
            if self.forgotten + self.num_read == read:
                self.ids[self.num_read :], self.turn, self.ended = unread, turn, ended
            raise

    def append_turn(self, turn: str, tokens: Sequence[int]) -> None:
        """Append tokens of a turn; the next token belongs to it too."""
        if self.ended:
            self.ids.pop()  # the token by which the model ended its answer: a chat template writes it again
        self.ended = False
        self.ids.extend(tokens)
        self.turn = turn

    def take_back_last(self) -> None:
        """Let the last token be read once more, if an error ended the answer before the next one was chosen.

        Raises:
            ValueError: if the model cannot take back what it has read.
        """
        if len(self.ids) > self.num_read:
            return
        try:
            self.cache.crop(-1)
        except ValueError as error:
            raise ValueError(
                "The answer cannot be continued: an error ended it after its last token was read, and this "
                f"{self.cache.config.model_type!r} model cannot take that back. `chat(message)` goes on from here."
            ) from error

    def compact(self) -> None:
        """Compact the cache once all recent tokens were evicted once, so that each key is rounded at most once."""
        cache = self.cache
        evicted = cache.get_seq_length() - cache.kept_length
        if evicted >= cache.window_length - cache.num_sink_tokens and cache.can_rebase:
            cache.compact()
            del self.ids[cache.num_sink_tokens : cache.num_sink_tokens + evicted]
            self.forgotten += evicted

    def state(self) -> dict[str, Any]:
        """Return the stream as plain values and tensors."""
        return {
            "ids": torch.tensor(self.ids, dtype=torch.long),
            "forgotten": self.forgotten,
            "open": self.turn,
            "ended": self.ended,
            "cache": self.cache.state(),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], config: PreTrainedConfig, device: str | torch.device | None) -> Self:
        """Return the transcript of a checked state, see `SinkCache.from_state`."""
        transcript = cls(SinkCache.from_state(state["cache"], config, device))
        transcript.ids, transcript.forgotten = state["ids"].tolist(), state["forgotten"]
        transcript.turn, transcript.ended = state["open"], state["ended"]
        return transcript


def fingerprint(model: PreTrainedModel) -> str:
    """Return a digest of the first values of each weight, which tells one set of weights from another."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(json.dumps([name, weight.shape, str(weight.dtype)]).encode())
        if weight.device.type != "meta" and weight.numel() > 0:  # the values of offloaded weights are not at hand
            local = weight.to_local() if hasattr(weight, "to_local") else weight  # sharded over several processes
            start = local.detach()[(0,) * (local.ndim - 1)].reshape(-1)[:64]
            digest.update(start.contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def vocabulary(tokenizer: Any) -> str:
    """Return a digest of the vocabulary."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
