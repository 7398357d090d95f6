"""What a cache stores and evicts, for any window, any number of sinks and any split into chunks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from attention_sinks import SinkCache

from ..support.inside import derive_positions
from ..support.models import CACHE, build_config, build_model, random_ids
from ..support.states import CONFIG, states_of, tokens_in, update

windows = st.integers(1, 12).flatmap(lambda w: st.tuples(st.just(w), st.integers(0, w - 1)))


streams = st.lists(st.integers(1, 15), min_size=1, max_size=12)


class PlainCache:
    """The eviction rule in plain Python: a list of the held tokens."""

    def __init__(self, window_length: int, num_sink_tokens: int) -> None:
        self.window_length, self.num_sink_tokens = window_length, num_sink_tokens
        self.seen = 0
        self.held: list[int] = []

    def evict(self, tokens: list[int], length: int) -> list[int]:
        """The sinks and the last other tokens, at most `length` in all."""
        surplus = max(len(tokens) - length, 0)
        return tokens[: self.num_sink_tokens] + tokens[self.num_sink_tokens + surplus :]

    def update(self, length: int) -> tuple[list[int], list[int]]:
        """The tokens that the next `length` tokens see, and the positions at which they see them."""
        chunk = list(range(self.seen, self.seen + length))
        visible = self.evict(self.held, self.window_length - 1) + chunk
        self.held = self.evict(self.held + chunk, self.window_length)
        self.seen += length
        shift = visible[self.num_sink_tokens] - self.num_sink_tokens if len(visible) > self.num_sink_tokens else 0
        return visible, [token + shift if token < self.num_sink_tokens else token for token in visible]

    def crop(self, tokens_to_remove: int) -> None:
        self.seen += tokens_to_remove
        self.held = [token for token in self.held if token < self.seen]


def check_update(cache: SinkCache, plain: PlainCache, length: int, batch_size: int = 1) -> None:
    """Update both and check that they agree on the visible tokens, their positions and the size of the mask."""
    announced = [cache.get_mask_sizes(length, layer_idx) for layer_idx in range(len(cache))]
    new = list(range(plain.seen, plain.seen + length))
    visible, positions = plain.update(length)
    keys, values = update(cache, new, batch_size)

    assert announced == [(len(visible), plain.seen - len(visible))] * len(cache)
    assert keys.shape[2] == values.shape[2] == len(visible)
    assert cache.get_seq_length() == plain.seen
    assert cache.kept_length == len(plain.held)

    order = torch.tensor(tokens_in(values)).argsort()
    if length > 1:
        assert order.tolist() == list(range(len(visible))), "a chunk needs its past in order"
    expected_keys, _ = states_of(positions, batch_size)
    _, expected_values = states_of(visible, batch_size)
    assert torch.equal(values[:, :, order], expected_values)
    torch.testing.assert_close(keys[:, :, order], expected_keys, rtol=0, atol=1e-5)


@given(window=windows, stream=streams, batch_size=st.integers(1, 3))
def test_queries_see_the_sinks_the_recent_tokens_and_the_chunk(
    window: tuple[int, int], stream: list[int], batch_size: int
) -> None:
    cache, plain = SinkCache(CONFIG, *window), PlainCache(*window)
    for length in stream:
        check_update(cache, plain, length, batch_size)
        assert cache.kept_length == min(plain.seen, window[0])


@given(window=windows, stream=streams)
def test_exactly_the_first_and_the_last_tokens_are_held(window: tuple[int, int], stream: list[int]) -> None:
    window_length, num_sink_tokens = window
    cache, seen = SinkCache(CONFIG, window_length, num_sink_tokens), 0
    for length in stream:
        update(cache, list(range(seen, seen + length)))
        seen += length
        for layer in cache.layers:
            assert layer.keys.shape[2] == layer.values.shape[2] == window_length
        sinks = list(range(seen))[:num_sink_tokens]
        recent = list(range(seen))[num_sink_tokens:][-(window_length - num_sink_tokens) :]
        held = tokens_in(cache.layers[0].values)[: min(seen, window_length)]
        assert sorted(held) == sinks + recent
        assert held[:num_sink_tokens] == sinks


@given(window=windows, stream=streams, repeats=st.integers(1, 3), data=st.data())
def test_the_split_into_chunks_does_not_change_the_held_states(
    window: tuple[int, int], stream: list[int], repeats: int, data: st.DataObject
) -> None:
    """The next token sees bitwise the same states after any chunks and any change of the batch."""
    length = sum(stream)
    config = build_config("llama", num_hidden_layers=1)
    chunked, single = SinkCache(config, *window), SinkCache(config, *window)
    seen = 0
    for chunk in stream:
        update(chunked, list(range(seen, seen + chunk)), batch_size=2)
        seen += chunk
    for token in range(length):
        update(single, [token], batch_size=2)
    rows = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=3))
    for cache in (chunked, single):
        cache.batch_repeat_interleave(repeats)
        cache.batch_select_indices(torch.arange(0, 2 * repeats, repeats))
        cache.reorder_cache(torch.LongTensor(rows))
    keys, values = (states[rows] for states in states_of([length], batch_size=2))
    with torch.no_grad():
        returned = [cache.update(keys, values, 0) for cache in (chunked, single)]
    for mine, others in zip(*returned, strict=True):
        assert torch.equal(mine, others)
        assert mine.shape[0] == len(rows)


def test_an_empty_update_does_not_rotate_the_stored_sinks() -> None:
    """At a full window the sinks are turned first; a crop afterwards must not find them turned."""
    cache, plain = SinkCache(build_config("llama", num_hidden_layers=1), 8, 2), PlainCache(8, 2)
    check_update(cache, plain, 8)
    keys, values = states_of([8, 9])
    assert cache.update(keys[:, :, :0], values[:, :, :0], 0)[0].shape[2] == 8
    cache.crop(-3)
    plain.crop(-3)
    for length in (1, 2, 1, 5, 1):
        check_update(cache, plain, length)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.exhaustive)])
def test_the_error_of_half_precision_does_not_grow_with_the_age_of_the_stream(dtype: torch.dtype) -> None:
    """Scores are compared with exact ones in float64; repeated rotation of the same keys would add up errors."""
    window_length, num_sink_tokens, head_dim = 64, 4, 64
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=1, hidden_size=head_dim, head_dim=head_dim)
    rotation = derive_positions(config, [0]).rotations[0]
    assert rotation is not None
    generator = torch.Generator().manual_seed(0)
    born = torch.randn(10_000, head_dim, generator=generator, dtype=torch.float64)
    query = torch.randn(head_dim, generator=generator, dtype=torch.float64)
    cache = SinkCache(config, window_length, num_sink_tokens)
    errors = []
    for token in range(len(born)):
        key = rotation.rotate(born[token], token).to(dtype)[None, None, None]
        keys, _ = cache.update(key, key, 0)
        if token % 10 == 9:
            shift = max(token + 1 - window_length, 0)
            held = [*range(num_sink_tokens), *range(num_sink_tokens + shift, token + 1)]
            places = torch.tensor([t + shift if t < num_sink_tokens else t for t in held])
            exact = torch.stack([rotation.rotate(born[t], int(p)) for t, p in zip(held, places, strict=True)])
            ring = window_length - num_sink_tokens
            slots = [t if t < num_sink_tokens else num_sink_tokens + (t - num_sink_tokens) % ring for t in held]
            turned_query = rotation.rotate(query, token)
            scores = keys[0, 0, slots].double() @ turned_query
            errors.append(float((scores - exact @ turned_query).abs().max()))
    early, late = errors[:100], errors[-100:]
    assert sum(late) < 1.2 * sum(early)


def test_inference_mode_may_be_switched_between_updates() -> None:
    model = build_model(CONFIG)
    ids = random_ids(30)
    plain, mixed = SinkCache(CONFIG, 8, 2), SinkCache(CONFIG, 8, 2)
    for start in range(0, 30, 3):
        chunk = ids[:, start : start + 3]
        with torch.no_grad():
            expected = model(chunk, **{CACHE: plain}).logits
        with torch.inference_mode(mode=start % 2 == 0), torch.no_grad():
            logits = model(chunk, **{CACHE: mixed}).logits
            mixed.reorder_cache(torch.LongTensor([0]))
        assert torch.equal(logits, expected)


def test_gradients_flow_through_new_states_and_not_through_the_past() -> None:
    model = build_model(CONFIG)
    ids = random_ids(40)
    cache, reference = SinkCache(CONFIG, 8, 2), SinkCache(CONFIG, 8, 2)
    for length, start in ((20, 0), (1, 20), (5, 21), (1, 26)):
        chunk = ids[:, start : start + length]
        logits = model(chunk, **{CACHE: cache}).logits
        with torch.no_grad():
            torch.testing.assert_close(logits, model(chunk, **{CACHE: reference}).logits, rtol=0, atol=1e-4)
        weight = model.model.layers[0].self_attn.k_proj.weight
        (gradient,) = torch.autograd.grad(logits.square().sum(), weight)
        assert gradient.norm() > 0
        assert not any(layer.keys.requires_grad or layer.values.requires_grad for layer in cache.layers)
