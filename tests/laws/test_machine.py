"""Any sequence of calls leaves a `SinkCache` in the state that the contract demands.

Caches are tested as databases are: random calls, compared with a model of the contract in plain Python (`Stream`). The
model remembers the word and the position of every token ever fed: a token count, or what an image has. It knows which
tokens a query sees, that attention sees them as contiguous, and what may be refused. It knows neither slots nor
rotations. States are looked up by word and position in tables with a rotation formula of their own, so that no language
model runs.

A failure prints the shortest sequence of calls that shows it, and how to run just this sequence again.
"""

import contextlib
import copy
import math
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from attention_sinks import SinkCache

from ..support import inside
from ..support.contract import (
    CONV_KERNEL_SIZE,
    CONVOLVED,
    LONGEST_CHUNK,
    MODELS,
    PAD,
    POSITIONS,
    RECURRENT,
    WORDS,
    Layer,
    Row,
    States,
    Stream,
    View,
    mask_of,
    tensors_of,
)
from ..support.versions import RECORDS_PAST

STEPS = 50


EXAMPLES, FEW_EXAMPLES = 600 if RECORDS_PAST else 200, 40


@dataclass
class Branch:
    """A cache and the model of its contract, and the checks that they agree."""

    cache: SinkCache
    stream: Stream
    source: random.Random = field(default_factory=lambda: random.Random(0))
    # States that an update returned under autograd, which nothing may overwrite, and copies of them.
    given: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def update(
        self,
        query_length: int,
        mode: str = "no_grad",
        windowed: bool = False,
        repeats: int = 1,
        images: bool = False,
    ) -> None:
        """Run the part of a forward pass that concerns the cache, and check what its queries see.

        `repeats`: how many rows beside each other get the same tokens, as beams get a prompt.
        """
        cache, stream, layers = self.cache, self.stream, self.stream.model.layers
        chunk = stream.new_tokens(query_length, self.source, images)
        chunk = [[*chunk[i - i % repeats]] for i in range(len(chunk))]
        positions = stream.positions_of_images(chunk)
        self.check_sizes(query_length, windowed)
        kv_lengths = [stream.announced(layer, query_length, windowed)[0] for layer in layers]
        views = stream.feed(chunk, windowed)
        modes = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": torch.enable_grad}
        windows = self.announcing(query_length, positions)
        if windowed:
            windows = inside.windowed_chunk(cache, query_length, positions)
        with modes[mode](), windows as visible:
            returned = [self.update_layer(i, *tensors_of(chunk), grad=mode == "grad") for i in range(len(layers))]
        assert all(torch.equal(states, before) for states, before in self.given), "overwritten before backward"
        self.given = []
        for i, (layer, kv_length) in enumerate(zip(layers, kv_lengths, strict=True)):
            if layer.conv:
                self.check_conv(i)
            if returned[i] is None:
                continue
            keys, values, indexed = returned[i]
            assert keys.shape[2] == values.shape[2] == kv_length
            if not windowed or query_length > 1 or stream.is_padded:  # as `sink_prefill` reads
                weights = torch.empty(len(keys), 1, query_length, kv_length)
                self.check_columns(layer, cache.token_indices(i, weights, prefilled=windowed), keys, values, views[-1])
            if mode == "grad" and layer.is_ring:
                assert keys.requires_grad
                assert values.requires_grad
                keys, values = keys.detach(), values.detach()
                self.given += [(keys, keys.clone()), (values, values.clone())]
            if not layer.is_ring:
                self.check_sliding(layer, keys, values)
            elif not windowed:
                # A single token may see its keys in any order; the mask only tells tokens from padding.
                in_order = query_length > 1 or stream.model.in_order
                assert torch.equal(views[0].is_token, stream.mask(kv_length))
                self.check_view(layer, views[0], keys, values, indexed, in_order)
            else:
                for query, view in enumerate(views):
                    self.check_window(layer, view, keys, values, visible, query)

    def check_columns(
        self, layer: Layer, indices: Tensor, keys: Tensor, values: Tensor, view: View | None = None
    ) -> None:
        """Check that the columns hold the tokens that the cache says, and all that the last query sees."""
        assert layer.keys is not None
        assert layer.values is not None
        kind, states = (layer.keys, keys) if layer.keys.rope is None else (layer.values, values)
        assert indices.shape == states[:, 0, :, 0].shape
        for row, numbers in enumerate(indices.tolist()):
            tokens = self.stream.rows[row].counted
            words = torch.tensor([[tokens[i].word if i >= 0 else PAD for i in numbers]])
            shown = torch.tensor(numbers)[:, None] >= 0
            expected = kind.at(words, torch.zeros_like(words))[0].to(self.stream.dtype)
            assert torch.equal(states[row].to(self.stream.dtype) * shown, expected * shown)
            assert not any(tokens[i].is_pad for i in numbers if i >= 0)
            if view is not None and layer.is_ring:
                assert {*view.words[row][view.is_token[row]].tolist()} <= {tokens[i].word for i in numbers if i >= 0}

    def announcing(self, query_length: int, positions: Tensor | None = None) -> contextlib.AbstractContextManager[Any]:
        """Announce a pass where its positions are not those that `generate` would give."""
        is_announced = self.stream.is_announced or positions is not None
        return inside.announced(self.cache, query_length, positions) if is_announced else contextlib.nullcontext()

    def update_layer(self, i: int, words: Tensor, positions: Tensor, grad: bool = False) -> Any:
        """Do what the attention of a layer does with the cache; return keys, values and keys of the indexer."""
        cache, layer, dtype = self.cache, self.stream.model.layers[i], self.stream.dtype
        if layer.conv:
            columns = CONVOLVED.at(words, positions)[:, 0].mT.to(dtype)
            cache.update_conv_state(columns, i, conv_kernel_size=CONV_KERNEL_SIZE)
        if layer.recurrent:
            cache.update_recurrent_state(RECURRENT.at(words[:, -1:], positions[:, -1:]).to(dtype), i)
        if layer.keys is None or layer.values is None:
            return None
        keys, values = layer.keys.at(words, positions).to(dtype), layer.values.at(words, positions).to(dtype)
        grad &= layer.is_ring  # other layers would keep the autograd graph
        keys, values = cache.update(keys.requires_grad_(grad), values.requires_grad_(grad), i)
        if not grad:
            keys, values = keys.clone(), values.clone()  # the next layer may return the same memory
        indexed = None
        if layer.indexer is not None:
            indexed = cache.update_indexer(layer.indexer.at(words, positions)[:, 0].to(dtype), i)[:, None]
        return keys, values, indexed

    def check_window(
        self, layer: Layer, view: View, keys: Tensor, values: Tensor, visible: Callable[..., Tensor], query: int
    ) -> None:
        """Check a query of a windowed chunk: the mask shows it exactly its own window."""
        rows, slots = torch.arange(len(keys))[:, None], torch.arange(keys.shape[2])[None]
        shown = visible(rows, 0, torch.tensor(query), slots).expand(len(keys), -1)
        assert bool(shown.any(dim=1).all()), "even a pad sees something"
        wanted = view.is_token.sum(dim=1)
        assert torch.equal(shown.sum(dim=1)[wanted > 0], wanted[wanted > 0])
        if not wanted.any():
            return
        order = shown.int().sort(dim=1, stable=True).indices[:, slots.shape[1] - view.words.shape[1] :, None]
        keys, values = (
            states.gather(2, order[:, None].expand(-1, states.shape[1], -1, states.shape[3]))
            for states in (keys, values)
        )
        self.check_view(layer, view, keys, values, None, in_order=False)

    def check_view(
        self, layer: Layer, view: View, keys: Tensor, values: Tensor, indexed: Tensor | None, in_order: bool
    ) -> None:
        """Check that a query sees the keys and values of the right tokens at the right positions."""
        assert layer.keys is not None
        assert layer.values is not None
        dtype, rows = self.stream.dtype, torch.arange(len(keys))[:, None]
        fixed, rotating = (layer.keys, layer.values) if layer.values.rope is not None else (layer.values, layer.keys)
        fixed_states, rotating_states = (keys, values) if fixed is layer.keys else (values, keys)
        assert fixed_states.dtype == rotating_states.dtype == dtype
        expected = fixed.at(view.words, view.positions).to(dtype)
        order = torch.arange(view.words.shape[1]).expand(len(keys), -1)
        if not in_order:
            same = (fixed_states[:, :, :, None] == expected[:, :, None]).all(dim=-1).all(dim=1)
            same &= view.is_token[:, :, None] & view.is_token[:, None]
            assert torch.equal(same.sum(dim=1), view.is_token.long()), "a token is not visible, or twice"
            assert torch.equal(same.sum(dim=2), view.is_token.long()), "another token is visible"
            order = torch.where(view.is_token, same.int().argmax(dim=2), order)
        shown = view.is_token[:, None, :, None]
        assert torch.equal(fixed_states * shown, expected[rows, :, order].transpose(1, 2) * shown)
        words, positions = view.words[rows, order], view.positions[rows, order]
        exact = view.is_exact[rows, order][:, None, :, None]
        for kind, states in ((rotating, rotating_states), (layer.indexer, indexed)):
            if kind is None or states is None:
                continue
            rotated = kind.at(words, positions)
            error = ((states.double() - rotated) * shown).abs().max()
            assert error <= self.tolerance, f"{kind} is {error} away from its position"
            assert torch.equal(states * exact, rotated.to(dtype) * exact), "not bitwise equal without rotation"
        self.check_attention(fixed, rotating, view, fixed_states.double(), rotating_states.double())

    def check_attention(
        self, fixed: States, rotating: States, view: View, fixed_states: Tensor, rotating_states: Tensor
    ) -> None:
        """Check that attention gives the same output as with the kept tokens numbered from 0."""
        asked = (view.words[:, -1:] + 1) % WORDS

        def output(query_at: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            query = rotating.at(asked, query_at)
            scores = (query @ keys.mT) / keys.shape[3] ** 0.5
            weights = scores.masked_fill(~view.is_token[:, None, None], -math.inf).softmax(dim=-1)
            attended: Tensor = weights.nan_to_num() @ values  # a row of padding alone attends to nothing
            return attended

        actual = output(view.positions[:, -1:], rotating_states, fixed_states)
        expected = output(
            view.in_cache[:, -1:], rotating.at(view.words, view.in_cache), fixed.at(view.words, view.in_cache)
        )
        assert (actual - expected).abs().max() <= 10 * self.tolerance

    @property
    def tolerance(self) -> float:
        """The rounding error that rotation of the sinks and every rebase may cause."""
        if self.stream.dtype is torch.bfloat16:
            return 2**-6 * (2 + self.stream.num_rebases)
        return 1e-5

    def check_sliding(self, layer: Layer, keys: Tensor, values: Tensor) -> None:
        assert layer.keys is not None
        assert layer.values is not None
        recent = tensors_of([row.fed[-keys.shape[2] :] for row in self.stream.rows])
        assert torch.equal(keys, layer.keys.at(*recent).to(self.stream.dtype))
        assert torch.equal(values, layer.values.at(*recent).to(self.stream.dtype))

    def check_conv(self, i: int) -> None:
        layer, dtype = self.cache.layers[i], self.stream.dtype
        words, positions = tensors_of([row.fed[-CONV_KERNEL_SIZE:] for row in self.stream.rows])
        columns = CONVOLVED.at(words, positions)[:, 0].mT.to(dtype)
        columns = torch.nn.functional.pad(columns, (CONV_KERNEL_SIZE - columns.shape[2], 0))
        assert torch.equal(layer.conv_states[0][..., -CONV_KERNEL_SIZE:], columns)
        if self.stream.model.layers[i].recurrent:
            expected = RECURRENT.at(words[:, -1:], positions[:, -1:]).to(dtype)
            assert torch.equal(layer.recurrent_states[0], expected)

    def check_sizes(self, query_length: int, windowed: bool = False) -> None:
        for i, layer in enumerate(self.stream.model.layers):
            if layer.keys is not None:
                # The model does not size a mask with windows, and its own sliding window does not matter for it.
                sizes_of = inside.windowed_sizes if windowed else SinkCache.get_mask_sizes
                with contextlib.nullcontext() if windowed else self.announcing(query_length):
                    sizes = sizes_of(self.cache, query_length, i)
                assert sizes == self.stream.announced(layer, query_length, windowed)

    def check_counts(self) -> None:
        cache, stream = self.cache, self.stream
        assert cache.get_seq_length() == cache.get_query_offset() == stream.seen
        assert cache.kept_length == stream.kept_length
        assert inside.num_rows(cache) == (len(stream.rows) if stream.is_initialized else 0)
        for i, (layer, kind) in enumerate(zip(cache.layers, stream.model.layers, strict=True)):
            if isinstance(layer, CacheLayerMixin):
                assert cache.get_seq_length(i) == stream.seen
            if kind.is_ring and layer.is_initialized:
                assert layer.keys.shape[:3] == layer.values.shape[:3]
                assert layer.keys.shape[2] == stream.window_length
                assert not layer.keys.requires_grad
                assert not layer.values.requires_grad
                indices = cache.token_indices(i)
                self.check_columns(kind, indices, layer.keys, layer.values)
                assert (indices >= 0).sum(dim=1).tolist() == [len(row.held) for row in stream.rows]
        assert cache.text_positions(torch.empty(len(stream.rows), 3)).tolist() == stream.text_positions(3)
        if not stream.holds_images:  # then positions are not behind token counts by one number
            offsets = inside.position_offsets(cache)
            expected = stream.offsets() if stream.is_initialized else [0] * len(stream.rows)
            assert offsets * (len(expected) // len(offsets)) == expected
        for query_length in (3, 1):
            cache.drop_plan()  # a single token after a mask for three would look as if a model had dropped the cache
            if not self.stream.hides_sinks(query_length):
                self.check_sizes(query_length)

    def copied(self) -> "Branch":
        return Branch(self.cache.fork(), copy.deepcopy(self.stream), copy.deepcopy(self.source))

    def check_unchanged(self) -> None:
        """Check that a copy takes the next token, or takes the last update back, as if nothing had happened."""
        for back in {0, self.stream.recorded}:
            if self.stream.can_crop(back):
                branch = self.copied()
                if back > 0:
                    branch.cache.crop(-back)
                    branch.stream.crop(back)
                branch.update(1)


chunk_lengths = st.integers(1, 9)


with_images = st.sampled_from([False, True, True, True])


paddings = st.integers(1, 3).map(lambda rows: [0] * rows) | st.lists(st.integers(0, 12), min_size=1, max_size=3)


dtypes = st.sampled_from([torch.float32] * 4 + [torch.float64, torch.bfloat16])


class SinkCacheMachine(RuleBasedStateMachine):
    branch: Branch
    other: Branch | None = None

    # --- streams

    @initialize(name=st.sampled_from([*MODELS]), data=st.data(), pads=paddings, dtype=dtypes)
    def new_cache(self, name: str, data: Any, pads: list[int], dtype: torch.dtype) -> None:
        model = MODELS[name]
        window_length = data.draw(st.integers(model.shortest_window, 12), label="window_length")
        num_sink_tokens = data.draw(st.integers(0, window_length - 1), label="num_sink_tokens")
        cache = SinkCache(model.config, window_length, num_sink_tokens, attention_mask=mask_of(pads))
        self.branch = Branch(cache, Stream(model, window_length, num_sink_tokens, []))
        self.begin(pads, dtype)

    def begin(self, pads: list[int], dtype: torch.dtype) -> None:
        old = self.stream
        self.branch.stream = Stream(
            old.model, old.window_length, old.num_sink_tokens, [Row(pads=each) for each in pads], any(pads), dtype
        )
        self.branch.given = []

    @property
    def cache(self) -> SinkCache:
        return self.branch.cache

    @property
    def stream(self) -> Stream:
        return self.branch.stream

    def room(self, query_length: int) -> int:
        """Limit the number of new tokens to the positions that the tables have."""
        furthest = max(row.position for row in self.stream.rows)
        return min(query_length, POSITIONS - 1 - furthest)

    @precondition(lambda self: self.stream.seen > 20)
    @rule(pads=paddings, dtype=dtypes, data=st.data())
    def reset(self, pads: list[int], dtype: torch.dtype, data: Any) -> None:
        """Begin another stream, possibly after a forward pass that was interrupted between two layers."""
        reached = data.draw(st.integers(0, len(self.stream.model.layers) - 1), label="layers reached")
        if reached > 0:
            self.interrupt(reached)
        self.cache.reset()
        assert not self.cache.is_initialized
        if any(pads):
            self.cache.announce_padding(mask_of(pads))
        self.begin(pads, dtype)

    def interrupt(self, reached: int) -> None:
        tokens = torch.ones(len(self.stream.rows), 1, dtype=torch.long)
        with self.branch.announcing(1), torch.no_grad():
            for i in range(reached):
                self.branch.update_layer(i, tokens, tokens)
        with self.branch.announcing(1), torch.no_grad(), pytest.raises(RuntimeError, match="interrupted"):
            self.branch.update_layer(0, tokens, tokens)
        with pytest.raises(RuntimeError, match="interrupted"):
            self.cache.reorder_cache(torch.tensor([0]))

    @precondition(lambda self: not self.stream.is_initialized and self.stream.model.initializes_early)
    @rule()
    def initialize_early(self) -> None:
        """Initialize all layers before the first update, as `torch.export` does."""
        keys = self.stream.model.layers[0].keys
        assert keys is not None
        rows = len(self.stream.rows)
        self.cache.early_initialization(rows, keys.num_heads, keys.dim, self.stream.dtype, torch.device("cpu"))
        assert self.cache.is_initialized
        self.stream.is_initialized = True

    # --- new tokens

    @rule(count=st.integers(1, 12), mode=st.sampled_from(["no_grad", "inference", "grad"]))
    def decode(self, count: int, mode: str) -> None:
        for _ in range(self.room(count)):
            self.update(1, mode)

    @rule(
        query_length=chunk_lengths,
        mode=st.sampled_from(["no_grad", "inference", "grad"]),
        windowed=st.booleans(),
        images=with_images,
    )
    def read(self, query_length: int, mode: str, windowed: bool, images: bool) -> None:
        self.update(self.room(query_length), mode, windowed and self.stream.model.can_window, images=images)

    @precondition(lambda self: self.stream.seen == 0)
    @rule(query_length=st.integers(10, LONGEST_CHUNK), images=with_images)
    def read_long_prompt(self, query_length: int, images: bool) -> None:
        self.update(query_length, "no_grad", images=images)

    def update(
        self, query_length: int, mode: str, windowed: bool = False, repeats: int = 1, images: bool = False
    ) -> None:
        if query_length < 1:
            return
        if mode == "inference" and self.stream.model.has_linear_layers:
            mode = "no_grad"  # layers of transformers could not be written to later
        windowed &= not self.stream.has_gap  # single tokens must fill it first
        if self.stream.hides_sinks(query_length) and not windowed:
            with pytest.raises(ValueError, match="would hide the sinks"), self.branch.announcing(query_length):
                self.cache.get_mask_sizes(query_length, 0)
        else:
            self.branch.update(query_length, mode, windowed, repeats, images and self.stream.model.has_images)

    @precondition(lambda self: not self.stream.is_initialized and self.stream.is_padded)
    @rule(repeats=st.integers(2, 3), query_length=chunk_lengths, images=with_images)
    def read_repeated(self, repeats: int, query_length: int, images: bool) -> None:
        """Beams repeat the rows of the first prompt without a call of the cache."""
        self.stream.choose([row for row in range(len(self.stream.rows)) for _ in range(repeats)])
        self.update(query_length, "no_grad", repeats=repeats, images=images)

    # --- taking tokens back

    @precondition(lambda self: self.stream.seen > 0)
    @rule(data=st.data(), as_length=st.booleans())
    def crop(self, data: Any, as_length: bool) -> None:
        possible = [back for back in range(1, 15) if self.stream.can_crop(back)]
        self.take_back(data.draw(st.sampled_from(possible or [0]) | st.integers(0, 14), label="back"), as_length)

    def take_back(self, back: int, as_length: bool = False) -> None:
        length = self.stream.seen - back
        tokens_to_remove = length if as_length and length > 0 else -back
        if not self.stream.can_crop(back):
            with pytest.raises(ValueError, match="tokens_to_remove|sliding window"):
                self.cache.crop(tokens_to_remove)
            self.branch.check_unchanged()
        else:
            self.cache.crop(tokens_to_remove)
            self.stream.crop(back)

    if RECORDS_PAST:

        @precondition(lambda self: self.stream.is_initialized)
        @rule()
        def record_past(self) -> None:
            self.cache.activate_past_recording()  # type: ignore[no-untyped-call]
            self.stream.is_recording = True

        @precondition(lambda self: self.stream.is_recording)
        @rule(query_length=chunk_lengths, data=st.data())
        def try_candidates(self, query_length: int, data: Any) -> None:
            """Store candidates and take some of them back, as assisted decoding does."""
            query_length = self.room(query_length)
            self.update(query_length, "no_grad")
            self.take_back(data.draw(st.integers(0, query_length), label="rejected"))

        @precondition(lambda self: self.stream.is_recording)
        @rule()
        def record_past_no_more(self) -> None:
            self.cache.deactivate_past_recording()
            self.stream.store_recorded()
            self.stream.trim()
            self.stream.is_recording = False

    # --- rows

    @precondition(lambda self: self.stream.seen > 0)
    @rule(data=st.data())
    def reorder_cache(self, data: Any) -> None:
        num_rows = len(self.stream.rows)
        rows = data.draw(st.lists(st.integers(0, num_rows - 1), min_size=num_rows, max_size=num_rows), label="rows")
        self.cache.reorder_cache(torch.tensor(rows))
        self.stream.choose(rows)

    @precondition(lambda self: self.stream.seen > 0)
    @rule(data=st.data())
    def batch_select_indices(self, data: Any) -> None:
        num_rows = len(self.stream.rows)
        rows = data.draw(st.lists(st.integers(0, num_rows - 1), min_size=1, max_size=num_rows), label="rows")
        self.cache.batch_select_indices(torch.tensor(rows))
        self.stream.choose(rows)

    @precondition(lambda self: self.stream.seen > 0 and len(self.stream.rows) <= 2)
    @rule(repeats=st.integers(1, 2))
    def batch_repeat_interleave(self, repeats: int) -> None:
        self.cache.batch_repeat_interleave(repeats)
        self.stream.choose([row for row in range(len(self.stream.rows)) for _ in range(repeats)])

    # --- positions

    @precondition(lambda self: self.stream.is_initialized)
    @rule(compact=st.booleans())
    def rebase_or_compact(self, compact: bool) -> None:
        change = self.cache.compact if compact else self.cache.rebase
        if not self.stream.model.can_rebase:
            with pytest.raises(NotImplementedError, match="cannot be rebased"):
                change()
            self.branch.check_unchanged()
        else:
            change()
            self.stream.compact() if compact else self.stream.rebase()

    # --- other buffers

    @precondition(lambda self: self.stream.is_initialized)
    @rule(as_attributes=st.booleans(), data=st.data())
    def move_away_and_back(self, as_attributes: bool, data: Any) -> None:
        """Move all states to a wider dtype and back, as to another device; or some by hand, and not back."""
        if not as_attributes:
            assert self.cache.to(dtype=torch.float64).to(self.stream.dtype) is self.cache
            return
        for layer in inside.sink_layers(self.cache):
            for name in data.draw(st.sets(st.sampled_from(["keys", "values"])), label="replaced"):
                if layer.is_initialized:
                    setattr(layer, name, getattr(layer, name).to(torch.float64, copy=True))

    # --- copies

    @precondition(lambda self: self.stream.is_initialized)
    @rule(copied=st.booleans())
    def continue_with_another(self, copied: bool) -> None:
        """Continue with a copy, or with the original of an earlier copy."""
        other = self.branch.copied() if copied or self.other is None else self.other
        self.other, self.branch = self.branch, other

    @precondition(lambda self: self.stream.is_initialized)
    @rule()
    def save_and_load(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache"
            self.cache.save(path)
            self.branch.cache = SinkCache.load(path, self.stream.model.config)

    # --- refused calls change nothing

    @precondition(lambda self: self.stream.is_initialized)
    @rule(
        query_length=st.integers(1, 3), wrong=st.sampled_from(["dtype", "rows", "heads", "head_dim", "other length"]),
    )  # fmt: skip
    def refuse_other_states(self, query_length: int, wrong: str) -> None:
        layer, rows = self.stream.model.layers[0], len(self.stream.rows)
        if layer.keys is None or layer.values is None or layer.indexer is not None:
            return
        if layer.sliding_window is not None and wrong not in ("dtype", "rows"):
            return  # layers of transformers check less
        keys, values = (
            torch.randn(rows, kind.num_heads, query_length, kind.dim, dtype=self.stream.dtype)
            for kind in (layer.keys, layer.values)
        )
        keys, values = {
            "dtype": lambda: (keys.half(), values.half()),
            "rows": lambda: (keys.repeat(2, 1, 1, 1), values.repeat(2, 1, 1, 1)),
            "heads": lambda: (keys.repeat(1, 2, 1, 1), values.repeat(1, 2, 1, 1)),
            "head_dim": lambda: (keys, values[..., 1:]),
            "other length": lambda: (keys, values.repeat(1, 1, 2, 1)),
        }[wrong]()
        length = keys.shape[2]
        with self.branch.announcing(length), torch.no_grad(), pytest.raises(ValueError, match="_states` must"):
            self.cache.update(keys, values, 0)
        self.branch.check_unchanged()

    @precondition(lambda self: self.generate_would_be_wrong and not self.stream.model.has_linear_layers)
    @rule(query_length=st.integers(1, 3))
    def refuse_positions_that_generate_counts(self, query_length: int) -> None:
        tokens = torch.zeros(len(self.stream.rows), query_length, dtype=torch.long)
        with torch.no_grad(), pytest.raises(ValueError, match="Continue it with `sink_generate`"):
            self.branch.update_layer(0, tokens, tokens)
        self.branch.check_unchanged()

    @property
    def generate_would_be_wrong(self) -> bool:
        return self.stream.holds_images or (self.stream.is_rebased and max(self.stream.offsets()) > 0)

    @precondition(lambda self: not self.stream.is_initialized and not self.stream.is_padded)
    @rule()
    def refuse_pads_that_nobody_announced(self) -> None:
        """Two equal rotating states at the start can only be padding; earlier layers have stored them already."""
        rotating = [i for i, layer in enumerate(self.stream.model.layers) if layer.rotates]
        if rotating:
            words = torch.tensor([[PAD, PAD, 5]] * len(self.stream.rows))
            with torch.no_grad():
                for i in range(rotating[0]):
                    self.branch.update_layer(i, words, (words > PAD).long())
                with pytest.raises(ValueError, match="as only padding does"):
                    self.branch.update_layer(rotating[0], words, (words > PAD).long())
            assert not self.cache.is_initialized

    # --- always

    @invariant()
    def counts(self) -> None:
        self.branch.check_counts()


class ShortSinkCacheMachine(SinkCacheMachine):
    """The same with fewer caches."""


def machine_settings(examples: int) -> settings:
    return settings(max_examples=examples, stateful_step_count=STEPS, deadline=None, print_blob=True)


TestSinkCacheMachine = pytest.mark.exhaustive(SinkCacheMachine.TestCase)
TestSinkCacheMachine.settings = machine_settings(EXAMPLES)
TestShortSinkCacheMachine = ShortSinkCacheMachine.TestCase
TestShortSinkCacheMachine.settings = machine_settings(FEW_EXAMPLES)
