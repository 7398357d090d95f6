"""The contract of a `SinkCache` in plain Python: a model that remembers every token ever fed."""

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


# Sinks act before position 0 if recent tokens of their image stand before them.
LOWEST_POSITION = -LONGEST_CHUNK


CONV_KERNEL_SIZE = 4


class Rope(NamedTuple):
    dim: int
    interleaved: bool = False
    theta: float = 10000.0


class States(NamedTuple):
    """The states `[num_heads, dim]` that a layer caches for a word; `rope` rotates the first dimensions."""

    seed: int
    num_heads: int
    dim: int
    rope: Rope | None = None

    def at(self, words: Tensor, positions: Tensor) -> Tensor:
        """States `[batch_size, num_heads, length, dim]` in float64 for words and positions `[batch_size, length]`."""
        by_word = table(self)
        places = positions - LOWEST_POSITION if self.rope is not None else torch.zeros_like(positions)
        return by_word[words, places].transpose(1, 2)


@cache
def table(states: States) -> Tensor:
    """All states, `[WORDS, positions, num_heads, dim]`; one position is enough for states without rotation."""
    generator = torch.Generator().manual_seed(states.seed)
    unrotated = torch.randn(WORDS, 1, states.num_heads, states.dim, generator=generator, dtype=torch.float64)
    if states.rope is None:
        return unrotated
    dim, interleaved, theta = states.rope
    # Frequencies are rounded as models round them.
    frequencies = (1.0 / theta ** (torch.arange(0, dim, 2).float() / dim)).double()
    angles = torch.arange(LOWEST_POSITION, POSITIONS)[:, None, None] * frequencies
    rotating = unrotated[..., :dim]
    pairs = rotating.unflatten(-1, (-1, 2)) if interleaved else rotating.unflatten(-1, (2, -1)).transpose(-1, -2)
    rotation = torch.complex(angles.cos(), angles.sin())
    rotated = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * rotation)
    rotated = rotated if interleaved else rotated.transpose(-1, -2)
    return torch.cat([rotated.flatten(-2), unrotated[..., dim:].expand(-1, len(angles), -1, -1)], dim=-1)


@dataclass(frozen=True)
class Layer:
    """What a layer of a model caches.

    Args:
        keys, values: the states of its attention; None without attention.
        sliding_window: the window of a layer that does not become a ring; narrower than that of the cache.
        indexer: the keys by which an indexer selects tokens.
        conv, recurrent: True if it has states of a convolution, or recurrent ones.
    """

    keys: States | None = None
    values: States | None = None
    sliding_window: int | None = None
    indexer: States | None = None
    conv: bool = False
    recurrent: bool = False

    @property
    def rotates(self) -> bool:
        return any(states is not None and states.rope is not None for states in (self.keys, self.values))

    @property
    def is_ring(self) -> bool:
        return self.keys is not None and self.sliding_window is None


@dataclass(frozen=True)
class Model:
    config: PreTrainedConfig
    layers: list[Layer]
    shortest_window: int = 1
    # The sliding window of the model if it is wider than that of the cache. Its mask hides tokens further back.
    sliding_window: float = math.inf
    # True if attention counts tokens instead of positions, and always needs them in order.
    in_order: bool = False
    # True if the model gives images positions that are no token counts.
    has_images: bool = False

    @property
    def can_rebase(self) -> bool:
        return all(layer.sliding_window is None for layer in self.layers)

    @property
    def can_window(self) -> bool:
        plain = all(layer.is_ring and layer.indexer is None and not layer.conv for layer in self.layers)
        return plain and not self.in_order

    @property
    def initializes_early(self) -> bool:
        """True if keys and values have the same shape, which `early_initialization` assumes."""
        if self.has_linear_layers:  # linear layers do not take part
            return False
        return all(layer.keys and layer.values and layer.keys.dim == layer.values.dim for layer in self.layers)

    @property
    def has_linear_layers(self) -> bool:
        return any(layer.conv for layer in self.layers)


def attention(seed: int, rope: Rope | None, dim: int = 16, num_heads: int = 2, **more: Any) -> Layer:
    return Layer(States(seed, num_heads, dim, rope), States(seed + 10, num_heads, dim), **more)


def latent_attention(seed: int, **more: Any) -> Layer:
    """Multi-head latent attention caches the rotating part of its keys as values."""
    return Layer(States(seed, 1, 16), States(seed + 10, 1, 8, Rope(8)), **more)


def build_models() -> dict[str, Model]:
    rope = Rope(16)
    models = {
        "llama": Model(build_config("llama", num_hidden_layers=2), [attention(0, rope), attention(1, rope)]),
        "images": Model(
            build_config("llama", num_hidden_layers=2), [attention(0, rope), attention(1, rope)], has_images=True
        ),
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
    """A token as it was fed; `exact` is True until a rebase rounds its states."""

    word: int
    position: int
    is_pad: bool = False
    exact: bool = True


def image(length: int, source: random.Random) -> list[int]:
    """The positions of an image, counted from where it begins: fewer than tokens, in any order, and repeated.

    The last token is the furthest, as on a grid: text goes on behind it.
    """
    if length == 0:
        return []
    size = source.randint(1, length)
    return [*source.choices(range(size), k=length - 1), size - 1]


class View:
    """The words that a query sees and their positions, `[batch_size, kv_length]`; empty places come first.

    Args:
        tokens: what the query of each row sees.
        shifts: by how many positions the sinks of each row act further on than they were fed.
        num_sink_tokens: how many of the tokens are sinks.
        kv_length: the number of places.
    """

    def __init__(self, tokens: list[list[Token]], shifts: list[int], num_sink_tokens: int, kv_length: int) -> None:
        def filled(number: Callable[[Token, int, int], int]) -> Tensor:
            rows = [
                [number(token, shift, 0) for token in seen[:num_sink_tokens]]
                + [number(token, 0, shift) for token in seen[num_sink_tokens:]]
                for seen, shift in zip(tokens, shifts, strict=True)
            ]
            return torch.tensor([[0] * (kv_length - len(row)) + row for row in rows], dtype=torch.long)

        self.words = filled(lambda token, up, down: token.word)
        # Attention sees sinks and recent tokens as contiguous: the sinks act where they touch the recent ones, ...
        self.positions = filled(lambda token, up, down: token.position + up)
        # ... as if these had been moved back to the sinks.
        self.in_cache = filled(lambda token, up, down: token.position - down)
        self.is_token = filled(lambda token, up, down: 1).bool()
        # A state that is not rotated is bitwise the one that was fed.
        self.is_exact = filled(lambda token, up, down: token.exact and up == 0).bool()


def position_after(tokens: list[Token]) -> int:
    """Where text goes on: behind the last token."""
    return 0 if not tokens or tokens[-1].is_pad else tokens[-1].position + 1


@dataclass
class Row:
    """One sequence of a batch.

    Args:
        pads: the number of pads that it begins with.
        fed: every column ever fed, pads included.
        counted: the same, as far as the cache counts them; compacting drops what was evicted. They stand where a rebase
            has moved them.
        held: the tokens that a ring holds.
        recorded: the tokens of the last update, while it can be taken back completely.
    """

    pads: int = 0
    fed: list[Token] = field(default_factory=list)
    counted: list[Token] = field(default_factory=list)
    held: list[Token] = field(default_factory=list)
    recorded: list[Token] = field(default_factory=list)

    @property
    def position(self) -> int:
        """The position of text that follows, as the model gets it."""
        return position_after(self.counted)


@dataclass
class Stream:
    """The state that a cache must have by the contract. A column is a token or a pad of each row."""

    model: Model
    window_length: int
    num_sink_tokens: int
    rows: list[Row]
    is_padded: bool = False
    dtype: torch.dtype = torch.float32
    is_initialized: bool = False
    seen: int = 0
    # How many columns the rings hold, and how many they have only recorded.
    held: int = 0
    recorded: int = 0
    # How many columns the other layers hold.
    held_sliding: int = 0
    held_conv: int = CONV_KERNEL_SIZE
    is_recording: bool = False
    is_rebased: bool = False
    num_rebases: int = 0
    # True once a token stood at a position that is no token count.
    holds_images: bool = False

    def evicted(self, tokens: list[Token], length: int) -> list[Token]:
        surplus = max(len(tokens) - length, 0)
        return tokens[: self.num_sink_tokens] + tokens[self.num_sink_tokens + surplus :]

    @property
    def kept_length(self) -> int:
        return min(self.held + self.recorded, self.window_length)

    @property
    def num_evicted(self) -> int:
        """The number of evicted columns. A crop does not bring them back, but leaves a gap."""
        return self.seen - self.recorded - self.held

    @property
    def has_gap(self) -> bool:
        return self.kept_length < min(self.seen, self.window_length)

    def announced(self, layer: Layer, query_length: int, windowed: bool = False) -> tuple[int, int]:
        """Return what `get_mask_sizes` must return: the number of keys, and the column of the first one."""
        past = min(self.kept_length, self.window_length - 1)
        if layer.sliding_window is not None:
            past = min(self.seen, layer.sliding_window - 1)
        if windowed:  # a copy of the sinks for each query
            past = min(self.seen, self.window_length - 1 - self.num_sink_tokens) + query_length * self.num_sink_tokens
        return past + query_length, self.seen - past

    def hides_sinks(self, query_length: int) -> bool:
        """True if the sliding window of the model would hide the sinks from the end of a chunk."""
        past = min(self.kept_length, self.window_length - 1)
        return past > 0 and past + query_length > self.model.sliding_window

    def mask(self, length: int) -> Tensor:
        """The last columns `[batch_size, length]` of the mask of `generate`."""
        columns = torch.arange(self.seen - length, self.seen)
        return columns >= torch.tensor([[row.pads] for row in self.rows])

    @property
    def is_announced(self) -> bool:
        """True if the cache must be told of each pass, whose positions `generate` does not know."""
        return self.is_rebased or self.holds_images

    def text_positions(self, query_length: int) -> list[list[int]]:
        """The positions of the next columns of each row if they are text; pads stand where the text begins."""
        numbers = range(self.seen, self.seen + query_length)
        return [[row.position + max(i - max(row.pads, self.seen), 0) for i in numbers] for row in self.rows]

    def new_tokens(self, query_length: int, source: random.Random, images: bool = False) -> list[list[Token]]:
        """Choose the next columns of each row: words that no query sees yet, or pads.

        If there are `images`, some words of each row are one, and what follows goes on behind it.
        """
        chunk = []
        for row in self.rows:
            pads = max(min(row.pads - self.seen, query_length), 0)
            recent = {token.word for token in row.fed[-LONGEST_CHUNK // 2 :] + row.held + row.recorded}
            words = source.sample([word for word in range(1, WORDS) if word not in recent], query_length - pads)
            places = [*range(len(words))]
            if images:
                first = source.randint(0, min(len(words), 2))  # soon, so that sinks are often of an image
                end = source.randint(max(first, len(words) - 4), len(words))
                grid = [first + place for place in image(end - first, source)]
                behind = max(grid, default=first - 1) + 1
                places = [*range(first), *grid, *range(behind, behind + len(words) - end)]
            tokens = [Token(word, row.position + place) for word, place in zip(words, places, strict=True)]
            chunk.append([Token(PAD, 0, is_pad=True)] * pads + tokens)
        return chunk

    def positions_of_images(self, chunk: list[list[Token]]) -> Tensor | None:
        """The positions of a chunk and of what follows, `[1, batch_size, query_length + 1]`; None if all is text."""
        if all(
            token.is_pad or token.position == position
            for new, positions in zip(chunk, self.text_positions(len(chunk[0])), strict=True)
            for token, position in zip(new, positions, strict=True)
        ):
            return None
        return torch.tensor([[[token.position for token in new] + [position_after(new)] for new in chunk]])

    def feed(self, chunk: list[list[Token]], windowed: bool) -> list[View]:
        """Add a chunk; return what its last query sees, or what each query sees in a windowed chunk."""
        query_length = len(chunk[0])
        kv_length = min(self.kept_length, self.window_length - 1) + query_length
        self.holds_images |= self.positions_of_images(chunk) is not None
        self.store_recorded()
        if windowed:
            views = [self._view([new[: i + 1] for new in chunk], 1, None) for i in range(query_length)]
        else:
            views = [self._view(chunk, query_length, kv_length)]
        for row, new in zip(self.rows, chunk, strict=True):
            tokens = [token for token in new if not token.is_pad]
            row.fed += new
            row.counted += new
            row.recorded = tokens
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
        """What the last query of a chunk sees if the first of `query_length` queries sees exactly its window."""
        tokens, shifts = [], []
        for row, new in zip(self.rows, chunk, strict=True):
            before, queries = row.held + new[:-query_length], new[-query_length:]
            past = self.evicted([token for token in before if not token.is_pad], self.window_length - 1)
            tokens.append(past + [token for token in queries if not token.is_pad])
            if queries[-1].is_pad:
                tokens[-1] = []  # nothing is promised for a pad
            shifts.append(self.shift(row, tokens[-1], len(new)))
        kv_length = max(map(len, tokens)) if kv_length is None else kv_length
        view = View(tokens, shifts, self.num_sink_tokens, kv_length)
        if not self.holds_images:  # text has the positions 0, 1, ... in the cache
            assert torch.equal(view.in_cache, (view.is_token.cumsum(dim=1) - 1).clamp(min=0))
        return view

    def shift(self, row: Row, tokens: list[Token], num_new: int = 0) -> int:
        """By how many positions the sinks of a row act further on than they were fed.

        That closes the gap between the sinks and the recent ones of the `tokens` that are kept, or text that follows,
        once something was evicted. For text it is the number of evicted tokens.
        """
        num_fed = max(self.seen + num_new - row.pads, 0)
        if len(tokens) == num_fed:
            return 0
        sinks, recent = tokens[: self.num_sink_tokens], tokens[self.num_sink_tokens :]
        first = min((token.position for token in recent), default=row.position)
        return first - max((token.position + 1 for token in sinks), default=0)

    def store_recorded(self) -> None:
        for row in self.rows:
            row.held, row.recorded = self.evicted(row.held + row.recorded, self.window_length), []
        self.held, self.recorded = min(self.held + self.recorded, self.window_length), 0

    def trim(self) -> None:
        """Let layers of other kinds drop what the next token does not need."""
        self.held_conv = CONV_KERNEL_SIZE
        for layer in self.model.layers:
            if layer.sliding_window is not None and self.seen >= layer.sliding_window:
                self.held_sliding = min(self.held_sliding, layer.sliding_window - 1)

    def can_crop(self, removed: int) -> bool:
        """True if the last columns can be taken back exactly."""
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
            del row.fed[len(row.fed) - removed :]
            del row.counted[len(row.counted) - removed :]
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
            shift = self.shift(row, row.held)
            for tokens in (row.held, row.counted):
                moved = [token for token in tokens if not token.is_pad][self.num_sink_tokens :]
                # Text never goes on before position 0, even if it follows an evicted token of an image after a crop.
                moved = [each._replace(position=max(each.position - shift, -1)) for each in moved]
                tokens[len(tokens) - len(moved) :] = moved
            row.held = [token._replace(exact=False) for token in row.held]
        self.is_rebased = True
        self.num_rebases += 1

    def offsets(self) -> list[int]:
        """How far the positions of each row are below those that `generate` counts."""
        return [max(self.seen - row.pads, 0) - row.position for row in self.rows]

    def compact(self) -> None:
        self.rebase()
        evicted = self.num_evicted
        self.seen -= evicted
        for row in self.rows:
            row.pads = max(row.pads - evicted, 0)
            row.counted = [Token(PAD, 0, is_pad=True)] * min(row.pads, self.seen) + row.held
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
