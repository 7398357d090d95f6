"""The contract of a `SinkCache` in plain Python: a model of it that remembers every token ever fed."""

import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from .models import DEFAULT_ROPE, LATER, build_config

WORDS, POSITIONS = 64, 512


PAD = 0


LONGEST_CHUNK = 30


CONV_KERNEL_SIZE = 4


class Rope(NamedTuple):
    dim: int
    interleaved: bool = False
    theta: float = 10000.0


class States(NamedTuple):
    """The states that a layer caches for a word, `[num_heads, dim]`; `rope` turns the first dimensions, if any."""

    seed: int
    num_heads: int
    dim: int
    rope: Rope | None = None

    def at(self, words: Tensor, positions: Tensor) -> Tensor:
        """Words and positions `[batch_size, length]` as states `[batch_size, num_heads, length, dim]` in float64."""
        by_word = table(self)
        return by_word[words, positions if self.rope is not None else torch.zeros_like(positions)].transpose(1, 2)


@cache
def table(states: States) -> Tensor:
    """`[WORDS, POSITIONS, num_heads, dim]`, or a single position of states that carry none."""
    generator = torch.Generator().manual_seed(states.seed)
    born = torch.randn(WORDS, 1, states.num_heads, states.dim, generator=generator, dtype=torch.float64)
    if states.rope is None:
        return born
    dim, interleaved, theta = states.rope
    # Frequencies as the models round them.
    frequencies = (1.0 / theta ** (torch.arange(0, dim, 2).float() / dim)).double()
    angles = torch.arange(POSITIONS)[:, None, None] * frequencies
    turning = born[..., :dim]
    pairs = turning.unflatten(-1, (-1, 2)) if interleaved else turning.unflatten(-1, (2, -1)).transpose(-1, -2)
    turns = torch.complex(angles.cos(), angles.sin())
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turns)
    turned = turned if interleaved else turned.transpose(-1, -2)
    return torch.cat([turned.flatten(-2), born[..., dim:].expand(-1, POSITIONS, -1, -1)], dim=-1)


@dataclass(frozen=True)
class Layer:
    """What a layer of a model caches.

    Args:
        keys, values: its states; None without attention.
        sliding_window: that of a layer that stays as it is, narrower than the window of the cache.
        indexer: the keys by which it selects tokens.
        conv, recurrent: whether it has such states.
    """

    keys: States | None = None
    values: States | None = None
    sliding_window: int | None = None
    indexer: States | None = None
    conv: bool = False
    recurrent: bool = False

    @property
    def turns(self) -> bool:
        return any(states is not None and states.rope is not None for states in (self.keys, self.values))

    @property
    def is_ring(self) -> bool:
        return self.keys is not None and self.sliding_window is None


@dataclass(frozen=True)
class Model:
    config: PreTrainedConfig
    layers: list[Layer]
    shortest_window: int = 1
    # The model's own sliding window where it is wider than that of the cache, whose mask hides what is further back.
    sliding_window: float = math.inf
    # Whether attention counts tokens instead of positions, and needs them in order always.
    in_order: bool = False

    @property
    def can_rebase(self) -> bool:
        return all(layer.sliding_window is None for layer in self.layers)

    @property
    def can_window(self) -> bool:
        plain = all(layer.is_ring and layer.indexer is None and not layer.conv for layer in self.layers)
        return plain and not self.in_order

    @property
    def initializes_early(self) -> bool:
        """Whether keys and values have one form, the only one that `early_initialization` knows."""
        if self.has_linear_layers:  # they do not take part
            return False
        return all(layer.keys and layer.values and layer.keys.dim == layer.values.dim for layer in self.layers)

    @property
    def has_linear_layers(self) -> bool:
        return any(layer.conv for layer in self.layers)


def attention(seed: int, rope: Rope | None, dim: int = 16, num_heads: int = 2, **more: Any) -> Layer:
    return Layer(States(seed, num_heads, dim, rope), States(seed + 10, num_heads, dim), **more)


def latent_attention(seed: int, **more: Any) -> Layer:
    """The rotating part of the keys of multi-head latent attention is cached as values."""
    return Layer(States(seed, 1, 16), States(seed + 10, 1, 8, Rope(8)), **more)


def build_models() -> dict[str, Model]:
    rope = Rope(16)
    models = {
        "llama": Model(build_config("llama", num_hidden_layers=2), [attention(0, rope), attention(1, rope)]),
        "sliding before rings": Model(
            build_config(
                "qwen2", num_hidden_layers=3, use_sliding_window=True, sliding_window=5,
                layer_types=["sliding_attention", "full_attention", "full_attention"],
            ),
            [attention(0, rope, sliding_window=5), attention(1, rope), attention(2, rope)],
            shortest_window=5,
        ),
        "wider sliding": Model(
            build_config(
                "qwen2", num_hidden_layers=2, use_sliding_window=True, sliding_window=14,
                layer_types=["full_attention", "sliding_attention"],
            ),
            [attention(0, rope), attention(1, rope)],
            sliding_window=14,
        ),
        "some without position": Model(
            build_config("smollm3", num_hidden_layers=3, no_rope_layers=[0, 1, 0], rope_parameters=DEFAULT_ROPE),
            [attention(0, None), attention(1, rope), attention(2, None)],
        ),
        "some without position, some sliding": Model(
            build_config(
                "smollm3", num_hidden_layers=3, no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=5,
                layer_types=["full_attention", "full_attention", "sliding_attention"], rope_parameters=DEFAULT_ROPE,
            ),
            [attention(0, rope), attention(1, None), attention(2, rope, sliding_window=5)],
            shortest_window=5,
        ),
        "interleaved": Model(
            build_config("cohere", num_hidden_layers=2, rope_parameters=DEFAULT_ROPE),
            [attention(seed, Rope(16, interleaved=True)) for seed in (0, 1)],
        ),
        "partial": Model(
            build_config("glm4", num_hidden_layers=2, rope_parameters={**DEFAULT_ROPE, "partial_rotary_factor": 0.5}),
            [attention(seed, Rope(16, interleaved=True), dim=32) for seed in (0, 1)],
        ),
        "in order": Model(
            build_config("mpt", num_hidden_layers=2), [attention(0, None), attention(1, None)], in_order=True
        ),
    }  # fmt: skip
    if not LATER:
        return models
    models["latent"] = Model(
        build_config("deepseek_v3", num_hidden_layers=2), [latent_attention(0), latent_attention(1)]
    )
    models["indexed"] = Model(
        build_config("deepseek_v32", rope_parameters=DEFAULT_ROPE),
        [latent_attention(seed, indexer=States(seed + 20, 1, 16, Rope(8))) for seed in (0, 1)],
    )
    models["convolution before a ring"] = Model(
        build_config("lfm2", rope_parameters=DEFAULT_ROPE), [Layer(conv=True), attention(0, rope, num_heads=4)]
    )
    models["linear and full attention in one layer"] = Model(
        build_config("falcon_h1", rope_parameters=DEFAULT_ROPE),
        [attention(seed, rope, num_heads=4, conv=True, recurrent=True) for seed in (0, 1)],
    )
    return models


MODELS = build_models()


class Token(NamedTuple):
    """A token as it was fed. `exact` while its states are those of its birth, not rounded by a rebase."""

    word: int
    position: int
    is_pad: bool = False
    exact: bool = True


class View:
    """What a query sees of each row, and where attention takes it to be: `[batch_size, kv_length]`, holes first."""

    def __init__(self, tokens: list[list[Token]], ends: list[int], kv_length: int) -> None:
        def filled(numbers: Callable[[int, list[Token]], list[int]]) -> Tensor:
            rows = [numbers(row, seen) for row, seen in enumerate(tokens)]
            return torch.tensor([[0] * (kv_length - len(row)) + row for row in rows], dtype=torch.long)

        self.words = filled(lambda _, seen: [token.word for token in seen])
        # Attention takes what is seen as contiguous, up to the query itself.
        self.positions = filled(lambda row, seen: [*range(ends[row] + 1 - len(seen), ends[row] + 1)])
        self.in_cache = filled(lambda _, seen: [*range(len(seen))])
        self.is_token = filled(lambda _, seen: [1] * len(seen)).bool()
        born = filled(lambda _, seen: [token.position if token.exact else -1 for token in seen])
        # A state that need not turn is that of its birth, bitwise.
        self.is_exact = self.is_token & (born == self.positions)


@dataclass
class Row:
    """One sequence of a batch.

    Args:
        pads: how many columns of padding it begins with.
        fed: every column ever fed, pads included.
        held: the tokens that a ring holds.
        recorded: those of the last update, while it can be taken back whatever it evicts.
        position: where the model is told that the next token stands.
    """

    pads: int = 0
    fed: list[Token] = field(default_factory=list)
    held: list[Token] = field(default_factory=list)
    recorded: list[Token] = field(default_factory=list)
    position: int = 0


@dataclass
class Stream:
    """What a cache must hold and show, by the contract; columns are the tokens and pads of all rows."""

    model: Model
    window_length: int
    num_sink_tokens: int
    rows: list[Row]
    is_padded: bool = False
    dtype: torch.dtype = torch.float32
    is_initialized: bool = False
    seen: int = 0
    # Of the seen columns those that rings hold, and those that they have only recorded.
    held: int = 0
    recorded: int = 0
    # Of the seen columns those that the other layers hold.
    held_sliding: int = 0
    held_conv: int = CONV_KERNEL_SIZE
    is_recording: bool = False
    is_rebased: bool = False
    num_rebases: int = 0

    def evicted(self, tokens: list[Token], length: int) -> list[Token]:
        surplus = max(len(tokens) - length, 0)
        return tokens[: self.num_sink_tokens] + tokens[self.num_sink_tokens + surplus :]

    @property
    def kept_length(self) -> int:
        return min(self.held + self.recorded, self.window_length)

    @property
    def num_evicted(self) -> int:
        """How many columns were evicted, or had been when a crop left a gap."""
        return self.seen - self.recorded - self.held

    @property
    def has_gap(self) -> bool:
        return self.kept_length < min(self.seen, self.window_length)

    def announced(self, layer: Layer, query_length: int, windowed: bool = False) -> tuple[int, int]:
        """What `get_mask_sizes` must say: how many keys an update will give, and the column of the first of them."""
        past = min(self.kept_length, self.window_length - 1)
        if layer.sliding_window is not None:
            past = min(self.seen, layer.sliding_window - 1)
        if windowed:  # the sinks once for each query
            past = min(self.seen, self.window_length - 1 - self.num_sink_tokens) + query_length * self.num_sink_tokens
        return past + query_length, self.seen - past

    def hides_sinks(self, query_length: int) -> bool:
        """Whether the model's own sliding window would hide the sinks from the end of a chunk."""
        past = min(self.kept_length, self.window_length - 1)
        return past > 0 and past + query_length > self.model.sliding_window

    def mask(self, length: int) -> Tensor:
        """The last columns of the mask of `generate`, `[batch_size, length]`."""
        columns = torch.arange(self.seen - length, self.seen)
        return columns >= torch.tensor([[row.pads] for row in self.rows])

    def new_tokens(self, query_length: int, source: random.Random) -> list[list[Token]]:
        """The next columns of each row: other words than those in reach, or pads as `generate` gives them."""
        chunk = []
        for row in self.rows:
            pads = max(min(row.pads - self.seen, query_length), 0)
            recent = {token.word for token in row.fed[-LONGEST_CHUNK // 2 :] + row.held + row.recorded}
            words = source.sample([word for word in range(1, WORDS) if word not in recent], query_length - pads)
            tokens = [Token(word, row.position + i) for i, word in enumerate(words)]
            chunk.append([Token(PAD, 0, is_pad=True)] * pads + tokens)
        return chunk

    def feed(self, chunk: list[list[Token]], windowed: bool) -> list[View]:
        """What the last query sees, or what each query does if it has a window of its own."""
        query_length = len(chunk[0])
        kv_length = min(self.kept_length, self.window_length - 1) + query_length
        self.store_recorded()
        if windowed:
            views = [self._view([new[: i + 1] for new in chunk], 1, None) for i in range(query_length)]
        else:
            views = [self._view(chunk, query_length, kv_length)]
        for row, new in zip(self.rows, chunk, strict=True):
            tokens = [token for token in new if not token.is_pad]
            row.fed += new
            row.recorded = tokens
            row.position += len(tokens)
        self.seen += query_length
        self.recorded = query_length
        self.is_initialized = True
        self.held_sliding += query_length
        self.held_conv += query_length
        if windowed or not self.is_recording:
            self.store_recorded()
        if not self.is_recording:
            self.trim()
        return views

    def _view(self, chunk: list[list[Token]], query_length: int, kv_length: int | None) -> View:
        """What the last of the chunk sees if the first of its last `query_length` tokens sees exactly its window."""
        tokens, ends = [], []
        for row, new in zip(self.rows, chunk, strict=True):
            before, queries = row.held + new[:-query_length], new[-query_length:]
            past = self.evicted([token for token in before if not token.is_pad], self.window_length - 1)
            tokens.append(past + [token for token in queries if not token.is_pad])
            ends.append(row.position + sum(not token.is_pad for token in new) - 1)
            if queries[-1].is_pad:
                tokens[-1] = []  # nobody asks for what a pad sees
        return View(tokens, ends, max(map(len, tokens)) if kv_length is None else kv_length)

    def store_recorded(self) -> None:
        for row in self.rows:
            row.held, row.recorded = self.evicted(row.held + row.recorded, self.window_length), []
        self.held, self.recorded = min(self.held + self.recorded, self.window_length), 0

    def trim(self) -> None:
        """Let the layers of other kinds hold no more than the next token needs."""
        self.held_conv = CONV_KERNEL_SIZE
        for layer in self.model.layers:
            if layer.sliding_window is not None and self.seen >= layer.sliding_window:
                self.held_sliding = min(self.held_sliding, layer.sliding_window - 1)

    def can_crop(self, removed: int) -> bool:
        """Whether the last columns can be taken back so that what is left is exact."""
        if removed > self.seen:
            return False
        if removed > self.recorded and self.num_evicted > 0:
            held = 0 if self.is_padded else self.held - self.num_sink_tokens
            if removed - self.recorded > held:
                return False
        return removed == 0 or all(self._can_crop(layer, removed) for layer in self.model.layers)

    def _can_crop(self, layer: Layer, removed: int) -> bool:
        if layer.recurrent and self.is_initialized:
            return False
        if layer.conv and self.held_conv < CONV_KERNEL_SIZE + removed:
            return False
        if layer.sliding_window is not None and self.seen >= layer.sliding_window:
            needed = min(self.seen - removed, layer.sliding_window - 1)
            return self.is_recording and self.held_sliding - removed >= needed
        return True

    def crop(self, removed: int) -> None:
        accepted = max(self.recorded - removed, 0)
        from_held = removed - (self.recorded - accepted)
        for row in self.rows:
            tokens = row.held + row.recorded
            taken = max(removed - max(row.pads - (self.seen - removed), 0), 0)
            del tokens[len(tokens) - taken :]
            row.held = self.evicted(tokens, self.window_length)
            row.recorded = []
            row.position -= taken
            del row.fed[len(row.fed) - removed :]
        self.held = min(self.held - from_held + accepted, self.window_length)
        self.recorded = 0
        self.seen -= removed
        self.held_sliding -= removed
        self.held_conv -= removed
        if self.is_recording:
            self.trim()

    def rebase(self) -> None:
        self.store_recorded()
        for row in self.rows:
            row.held = [Token(token.word, place, exact=False) for place, token in enumerate(row.held)]
            row.position = len(row.held)
        self.is_rebased = True
        self.num_rebases += 1

    def offsets(self) -> list[int]:
        """How much lower than `generate` counts them positions are given."""
        return [max(self.seen - row.pads, 0) - row.position for row in self.rows]

    def compact(self) -> None:
        self.rebase()
        evicted = self.num_evicted
        for row in self.rows:
            row.pads = max(row.pads - evicted, 0)
        self.seen -= evicted
        self.is_rebased = False

    def choose(self, rows: list[int]) -> None:
        self.store_recorded()
        self.rows = [copy.deepcopy(self.rows[row]) for row in rows]


CONVOLVED, RECURRENT = States(40, 1, 6), States(41, 2, 4)


def tensors_of(tokens: list[list[Token]]) -> tuple[Tensor, Tensor]:
    """Words and positions, `[batch_size, length]`."""
    return (
        torch.tensor([[token.word for token in row] for row in tokens]),
        torch.tensor([[token.position for token in row] for row in tokens]),
    )


def mask_of(pads: list[int]) -> Tensor:
    """The mask `[batch_size, most pads + 1]` of a prompt."""
    return (torch.arange(max(pads) + 1) >= torch.tensor(pads)[:, None]).long()
