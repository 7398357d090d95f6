"""The laws of storage and eviction, for any window, any number of sinks, any split of a stream and any batch."""

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    DynamicCache,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    T5Config,
    cache_utils,
)
from transformers.cache_utils import DynamicSlidingWindowLayer

from attention_sinks import Rotation, SinkCache
from attention_sinks.architecture.positions import derive_positions
from attention_sinks.cache import HybridSinkLayer, IndexedSinkLayer, SinkLayer

from .models import CACHE, build_config, build_model, random_ids

ROOT = Path(__file__).parent.parent
CONFIG = build_config("llama", num_hidden_layers=2)
HEADS, HEAD_DIM = 2, 16
ROTATION = derive_positions(CONFIG, [0]).rotations[0]
assert ROTATION is not None

windows = st.integers(1, 12).flatmap(lambda w: st.tuples(st.just(w), st.integers(0, w - 1)))
streams = st.lists(st.integers(1, 15), min_size=1, max_size=12)


def states_of(tokens: list[int], batch_size: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Keys and values that tell which token they belong to: token `t` stands at position `t`, its values are all `t`.

    Before their rotation all keys of a row are equal, so that the keys show the rotation and nothing else.
    """
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(batch_size, HEADS, 1, HEAD_DIM, generator=generator).to(dtype)
    assert ROTATION is not None
    keys = torch.cat([ROTATION.rotate(base, token) for token in tokens], dim=2)
    rows = 1000.0 * torch.arange(batch_size)[:, None, None, None]
    values = (rows + torch.tensor(tokens)[:, None]).expand(batch_size, HEADS, len(tokens), HEAD_DIM)
    return keys, values.to(dtype)


@torch.no_grad()
def feed(cache: SinkCache, tokens: list[int], batch_size: int = 1) -> tuple[Tensor, Tensor]:
    """One update of every layer; returns what the last one gave."""
    keys, values = states_of(tokens, batch_size)
    for layer_idx in range(len(cache)):
        returned = cache.update(keys, values, layer_idx)
    return returned


def tokens_in(values: Tensor) -> list[int]:
    """The tokens that values of one row belong to."""
    return [int(token) for token in values[0, 0, :, 0]]


class PlainCache:
    """The contract in plain Python: a list of the held tokens."""

    def __init__(self, window_length: int, num_sink_tokens: int) -> None:
        self.window_length, self.num_sink_tokens = window_length, num_sink_tokens
        self.seen = 0
        self.held: list[int] = []

    def evict(self, tokens: list[int], length: int) -> list[int]:
        """The sinks and the last of the other `tokens`, at most `length` in all."""
        surplus = max(len(tokens) - length, 0)
        return tokens[: self.num_sink_tokens] + tokens[self.num_sink_tokens + surplus :]

    def update(self, length: int) -> tuple[list[int], list[int]]:
        """Which tokens the next `length` tokens see, and at which positions."""
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
    """One update of both, which must agree on what is seen, where, and on what was announced to the mask."""
    announced = [cache.get_mask_sizes(length, layer_idx) for layer_idx in range(len(cache))]
    new = list(range(plain.seen, plain.seen + length))
    visible, positions = plain.update(length)
    keys, values = feed(cache, new, batch_size)

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
def test_the_first_and_the_last_tokens_are_held_and_nothing_else(window: tuple[int, int], stream: list[int]) -> None:
    window_length, num_sink_tokens = window
    cache, seen = SinkCache(CONFIG, window_length, num_sink_tokens), 0
    for length in stream:
        feed(cache, list(range(seen, seen + length)))
        seen += length
        for layer in cache.layers:
            assert layer.keys.shape[2] == layer.values.shape[2] == window_length
        sinks = list(range(seen))[:num_sink_tokens]
        recent = list(range(seen))[num_sink_tokens:][-(window_length - num_sink_tokens) :]
        held = tokens_in(cache.layers[0].values)[: min(seen, window_length)]
        assert sorted(held) == sinks + recent
        assert held[:num_sink_tokens] == sinks


@given(window=windows, stream=streams, repeats=st.integers(1, 3), data=st.data())
def test_the_split_of_a_stream_does_not_change_what_is_held(
    window: tuple[int, int], stream: list[int], repeats: int, data: st.DataObject
) -> None:
    """The next token sees bitwise the same, whatever chunks came before and however the batch was rearranged."""
    length = sum(stream)
    config = build_config("llama", num_hidden_layers=1)
    chunked, single = SinkCache(config, *window), SinkCache(config, *window)
    seen = 0
    for chunk in stream:
        feed(chunked, list(range(seen, seen + chunk)), batch_size=2)
        seen += chunk
    for token in range(length):
        feed(single, [token], batch_size=2)
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


@given(
    window=windows, stream=streams, back=st.integers(0, 14), after=st.lists(st.integers(1, 5), max_size=6),
    data=st.data(),
)  # fmt: skip
def test_crop_takes_back_exactly_the_last_tokens(
    window: tuple[int, int], stream: list[int], back: int, after: list[int], data: st.DataObject
) -> None:
    num_sink_tokens = window[1]
    cache, plain = SinkCache(CONFIG, *window), PlainCache(*window)
    for length in stream:
        check_update(cache, plain, length)
    evicted = len(plain.held) < plain.seen
    if back > (len(plain.held) - num_sink_tokens if evicted else plain.seen):
        before = copy.deepcopy(cache)
        with pytest.raises(ValueError, match=rf"`tokens_to_remove` must be at least -?\d+, got -{back}"):
            cache.crop(-back)
        assert cache.get_seq_length() == before.get_seq_length()
    else:
        plain.crop(-back)
        if plain.seen > 0 and data.draw(st.booleans()):
            cache.crop(plain.seen)  # a length, as early transformers 5 calls it
        else:
            cache.crop(-back)
        assert (cache.get_seq_length(), cache.kept_length) == (plain.seen, len(plain.held))
    for length in after:
        check_update(cache, plain, length)


@given(window=windows, stream=streams)
def test_copies_and_resets_are_independent(window: tuple[int, int], stream: list[int]) -> None:
    cache, plain = SinkCache(CONFIG, *window), PlainCache(*window)
    for length in stream:
        check_update(cache, plain, length)
    branch, plain_branch = copy.deepcopy(cache), copy.deepcopy(plain)
    cache.reset()
    assert (cache.get_seq_length(), cache.kept_length, cache.is_initialized) == (0, 0, False)
    plain = PlainCache(*window)
    for length in stream:
        check_update(cache, plain, length, batch_size=2)  # another batch size than before
        check_update(branch, plain_branch, length)


def test_cos_and_sin_of_a_step_are_computed_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = SinkCache(build_config("llama", num_hidden_layers=6), 8, 2)
    shifts: list[int] = []
    phase = Rotation.cos_sin

    def counted(self: Rotation, shift: int, dtype: torch.dtype) -> Tensor:
        shifts.append(shift)
        return phase(self, shift, dtype)

    states = [states_of([0]), states_of([0, 1, 2])]
    monkeypatch.setattr(Rotation, "cos_sin", counted)
    for keys, values in states * 5:
        for layer_idx in range(len(cache)):
            cache.update(keys, values, layer_idx)
    assert shifts == [1, 2, 5, 6, 9, 10]


def test_updates_past_the_window_write_in_place() -> None:
    """Neither decoding nor chunks may replace the buffers, so that memory and addresses stay."""
    cache = SinkCache(CONFIG, 8, 2)
    feed(cache, [0])
    feed(cache, [*range(10)])
    feed(cache, [0])
    addresses = [(layer.keys.data_ptr(), layer.values.data_ptr(), layer.sinks.data_ptr()) for layer in cache.layers]
    for token in range(1, 40, 3):
        feed(cache, [token])
        feed(cache, [token + 1, token + 2])
    assert addresses == [(x.keys.data_ptr(), x.values.data_ptr(), x.sinks.data_ptr()) for x in cache.layers]
    keys, values = feed(cache, [40])
    assert (keys.data_ptr(), values.data_ptr()) == addresses[-1][:2], "decoding returns the ring itself, not a copy"


def test_the_rings_hold_no_more_bytes_than_promised() -> None:
    window_length, num_sink_tokens = 256, 4
    cache = SinkCache(CONFIG, window_length, num_sink_tokens)
    feed(cache, [0])
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values, layer.sinks))
    assert held <= 2 * len(cache) * HEADS * window_length * HEAD_DIM * 4 * 1.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_error_of_half_precision_does_not_grow_with_the_age_of_the_stream(dtype: torch.dtype) -> None:
    """Scores against the exact keys in float64 over 10,000 updates: rotating again and again would add up errors."""
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


def test_updates_under_inference_mode_and_outside_of_it_may_alternate() -> None:
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


def test_under_autograd_new_states_carry_their_gradient_and_the_past_is_a_constant() -> None:
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


def test_sliding_layers_wider_than_the_window_become_rings_and_narrower_ones_stay() -> None:
    config = build_config(
        "qwen2", num_hidden_layers=2, use_sliding_window=True, sliding_window=32, max_window_layers=1,
        layer_types=["full_attention", "sliding_attention"],
    )  # fmt: skip
    assert [type(layer) for layer in SinkCache(config, 16, 4).layers] == [SinkLayer, SinkLayer]
    assert [type(layer) for layer in SinkCache(config, 32, 4).layers] == [SinkLayer, DynamicSlidingWindowLayer]


def test_a_chunk_that_the_sliding_window_would_cut_off_from_the_sinks_is_refused() -> None:
    config = build_config("mistral-sliding", num_hidden_layers=1)  # slides over 64 tokens
    model, cache = build_model(config), SinkCache(config, 16, 4)
    with torch.no_grad():
        model(random_ids(100), **{CACHE: cache})
        model(random_ids(49), **{CACHE: cache})
        with pytest.raises(ValueError, match="`query_length` must be at most 49 with 15 tokens in the cache, got 50"):
            model(random_ids(50), **{CACHE: cache})
    assert cache.get_seq_length() == 149


def test_padding_that_nobody_announced_is_refused() -> None:
    model, cache = build_model(CONFIG), SinkCache(CONFIG, 16, 4)
    ids, mask = random_ids(10, batch_size=2), torch.ones(2, 10, dtype=torch.long)
    ids[1, :3], mask[1, :3] = 0, 0
    with pytest.raises(ValueError, match="as only padding does"):
        model.generate(ids, attention_mask=mask, **{CACHE: cache}, max_new_tokens=5)
    assert cache.get_seq_length() == 0
    assert not cache.is_initialized
    ids[1, :3] = ids[0, 0]
    model.generate(ids, **{CACHE: cache}, max_new_tokens=5)  # the same word thrice is no padding


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"window_length": True}, TypeError, "`window_length` must be an int, got True"),
        ({"window_length": 256.0}, TypeError, "`window_length` must be an int, got 256.0"),
        ({"window_length": "256"}, TypeError, "`window_length` must be an int, got '256'"),
        ({"window_length": 0}, ValueError, "`window_length` must be at least 1, got 0"),
        ({"num_sink_tokens": False}, TypeError, "`num_sink_tokens` must be an int, got False"),
        ({"num_sink_tokens": 4.0}, TypeError, "`num_sink_tokens` must be an int, got 4.0"),
        ({"num_sink_tokens": -1}, ValueError, "`num_sink_tokens` must be at least 0, got -1"),
        ({"num_sink_tokens": 256}, ValueError, "got num_sink_tokens=256 and window_length=256"),
        ({"config": None}, TypeError, r"`config` must be .* got None.*SinkCache\(model.config, window_length=256"),
        ({"config": 256}, TypeError, "`config` must be the config of the model, got 256"),
        ({"config": build_config("mistral-sliding"), "window_length": 64}, ValueError, "sliding window.* with 64"),
        ({"config": MambaConfig(num_hidden_layers=2)}, NotImplementedError, "'mamba'"),
        ({"config": T5Config()}, NotImplementedError, "'t5'.*encoder-decoder"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SinkCache(**{"config": CONFIG, **arguments})


def test_the_call_of_older_versions_is_answered_with_the_new_one() -> None:
    with pytest.raises(TypeError, match=r"SinkCache\(model\.config, window_length=256, num_sink_tokens=4\)"):
        SinkCache(window_length=256, num_sink_tokens=4)


WRONG_STATES: list[Any] = [
    (lambda k, v: (k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1)), "`key_states` must keep batch size"),
    (lambda k, v: (k[..., :8], v), "`key_states` must keep batch size, heads and head dimension"),
    (lambda k, v: (k, v[..., :8]), "`value_states` must keep batch size, heads and head dimension"),
    (lambda k, v: (k.double(), v.double()), "dtype and device, torch.float32 on cpu, got torch.float64"),
    (lambda k, v: (k.to("meta"), v.to("meta")), "dtype and device, torch.float32 on cpu, got .* on meta"),
]


@pytest.mark.parametrize("past", [5, 8, 20])
@pytest.mark.parametrize(("change", "message"), WRONG_STATES)
def test_a_refused_update_changes_nothing(past: int, change: Any, message: str) -> None:
    cache, untouched = SinkCache(CONFIG, 8, 2), SinkCache(CONFIG, 8, 2)
    for each in (cache, untouched):
        feed(each, list(range(past)))
    with pytest.raises(ValueError, match=message):
        cache.update(*change(*states_of([past, past + 1])), 0)
    for length in (1, 3, 1):
        start = untouched.get_seq_length()
        tokens = list(range(start, start + length))
        for mine, others in zip(feed(cache, tokens), feed(untouched, tokens), strict=True):
            assert torch.equal(mine, others)


def test_keys_and_values_of_different_lengths_are_refused_before_anything_is_allocated() -> None:
    cache = SinkCache(CONFIG, 8, 2)
    keys, values = states_of([0, 1])
    with pytest.raises(ValueError, match="must agree in batch size and number of tokens"):
        cache.update(keys, values[:, :, :1], 0)
    assert not cache.is_initialized
    feed(cache, [0, 1])


@pytest.mark.parametrize("failing_layer", [1, 3])
def test_an_interrupted_forward_pass_is_noticed_by_the_next_one(failing_layer: int) -> None:
    model = build_model(build_config("llama", num_hidden_layers=4))
    cache, ids = SinkCache(model.config, 8, 2), random_ids(31)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        model(ids[:, :30], **{CACHE: cache})
        hook = model.model.layers[failing_layer].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 30:], **{CACHE: cache})
        hook.remove()
        where = rf"interrupted between layer {failing_layer - 1} and layer 3.*`reset\(\)`"
        with pytest.raises(RuntimeError, match=where):
            model(ids[:, 30:], **{CACHE: cache})
        cache.reset()
        model(ids, **{CACHE: cache})
    assert cache.kept_length == 8


def test_an_empty_update_leaves_the_sinks_as_they_are() -> None:
    """At a full window the sinks are turned first; a crop afterwards must not find them turned."""
    cache, plain = SinkCache(build_config("llama", num_hidden_layers=1), 8, 2), PlainCache(8, 2)
    check_update(cache, plain, 8)
    keys, values = states_of([8, 9])
    assert cache.get_mask_sizes(0, 0) == (8, 0)
    assert cache.update(keys[:, :, :0], values[:, :, :0], 0)[0].shape[2] == 8
    cache.crop(-3)
    plain.crop(-3)
    for length in (1, 2, 1, 5, 1):
        check_update(cache, plain, length)


def mixed_model() -> Any:
    """A sliding layer of its own kind before and after a ring."""
    return build_model(
        build_config(
            "qwen2", num_hidden_layers=3, use_sliding_window=True, sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    )  # fmt: skip


def test_a_refused_prompt_leaves_no_layer_behind() -> None:
    model = mixed_model()
    cache, ids, mask = SinkCache(model.config, 16, 4), random_ids(10), torch.ones(1, 10, dtype=torch.long)
    ids[0, :3], mask[0, :3] = 0, 0
    with pytest.raises(ValueError, match="as only padding does"):
        model.generate(ids, attention_mask=mask, **{CACHE: cache}, max_new_tokens=2)
    assert [layer.get_seq_length() for layer in cache.layers] == [0, 0, 0]
    model.generate(random_ids(7), **{CACHE: cache}, max_new_tokens=2)


@torch.no_grad()
def test_another_batch_or_dtype_is_refused_before_a_layer_of_another_kind_takes_it() -> None:
    model = mixed_model()
    cache, untouched, ids = SinkCache(model.config, 16, 4), SinkCache(model.config, 16, 4), random_ids(30)
    for each in (cache, untouched):
        model(ids[:, :20], **{CACHE: each})
    with pytest.raises(ValueError, match=r"must keep batch size and dtype, 1 and torch.float32, got the shape \[3, "):
        model(random_ids(1, batch_size=3), **{CACHE: cache})
    with pytest.raises(ValueError, match=r"must keep batch size and dtype, .* in torch.float64"):
        mixed_model().double()(ids[:, :1], **{CACHE: cache})
    for token in ids[:, 20:].split(1, dim=1):
        expected = model(token, **{CACHE: untouched}).logits
        assert torch.equal(model(token, **{CACHE: cache}).logits, expected)


@torch.no_grad()
def test_mixed_layers_crop_together_or_not_at_all() -> None:
    model, ids = mixed_model(), random_ids(40)
    cache, expected = SinkCache(model.config, 16, 4), DynamicCache(config=model.config)
    model(ids[:, :7], **{CACHE: cache})
    for tokens_to_remove in (0, -2, 0):
        cache.crop(tokens_to_remove)
    assert [layer.get_seq_length() for layer in cache.layers] == [5, 5, 5]
    cache.crop(4)
    model(ids[:, :4], **{CACHE: expected})
    for each in (cache, expected):
        logits = model(ids[:, 4:6], **{CACHE: each}).logits
    assert torch.equal(model(ids[:, 6:7], **{CACHE: cache}).logits, model(ids[:, 6:7], **{CACHE: expected}).logits)
    assert logits.shape[1] == 2
    model(ids[:, 7:30], **{CACHE: cache})
    with pytest.raises(ValueError):  # noqa: PT011  # in the words of the sliding layer
        cache.crop(-1)
    assert [layer.get_seq_length() for layer in cache.layers] == [30, 30, 30]


def test_chunked_layers_keep_their_own_kind() -> None:
    """Their chunks begin at absolute positions, whatever is evicted."""
    config = Llama4TextConfig(
        num_hidden_layers=4, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=97,
        intermediate_size=32, intermediate_size_mlp=32, attention_chunk_size=64, max_position_embeddings=4096,
    )  # fmt: skip
    kinds = [type(layer) for layer in SinkCache(config, 16, 4).layers]
    assert kinds == [DynamicSlidingWindowLayer] * 3 + [SinkLayer]


def test_positions_end_where_the_model_changes_and_the_update_that_would_get_there_is_refused() -> None:
    config = build_config(
        "llama", num_hidden_layers=1, max_position_embeddings=40,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    )  # fmt: skip
    model, cache = build_model(config), SinkCache(config, 8, 2)
    with torch.no_grad():
        model(random_ids(38), **{CACHE: cache})
        with pytest.raises(ValueError, match="`query_length` must be at most 2 after 38 tokens, got 3.*position 40"):
            model(random_ids(3), **{CACHE: cache})
        model(random_ids(2), **{CACHE: cache})
        with pytest.raises(ValueError, match="at most 0 after 40 tokens"):
            cache.update(*states_of([40]), 0)
    assert cache.get_seq_length() == 40
    with pytest.raises(ValueError, match="`window_length` must be below 40, .* got 40"):
        SinkCache(config, 40, 2)


def test_a_rotation_stated_by_hand_is_that_of_the_model() -> None:
    """For models that cannot be measured, such as those with code of their own."""
    model = build_model(build_config("llama", num_hidden_layers=2))
    measured = SinkCache(model.config, 8, 2)
    inv_freq = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    stated = SinkCache(PretrainedConfigOfItsOwn(num_hidden_layers=2), 8, 2, rotation=Rotation(inv_freq))
    with torch.no_grad():
        for chunk in random_ids(40).split([5, 1, 1, 9, *[1] * 24], dim=1):
            logits = [model(chunk, **{CACHE: cache}).logits for cache in (measured, stated)]
            torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-4)
    with pytest.raises(NotImplementedError, match=r"'its_own'.*SinkCache\(config, rotation=Rotation\(inv_freq"):
        SinkCache(PretrainedConfigOfItsOwn(num_hidden_layers=2), 8, 2)
    with pytest.raises(TypeError, match="`rotation` must be a Rotation, got 'llama'"):
        SinkCache(CONFIG, rotation="llama")  # type: ignore[arg-type]


class PretrainedConfigOfItsOwn(PreTrainedConfig):
    model_type = "its_own"
    num_hidden_layers: int = 2


# What ours takes from the class of `transformers` as it is: decided, one by one.
OF_A_LAYER = {"is_compileable", "offload", "prefetch", "supports_early_init"}
# The class that `transformers` may take ours for, ours, and what it inherits or does without.
INTERFACES: list[tuple[str, type, set[str]]] = [
    (
        "Cache",
        SinkCache,
        {
            "activate_past_recording", "batch_size", "early_initialization", "get_recurrent_state", "get_seq_length",
            "has_previous_state", "is_croppable", "is_dummy", "is_initialized", "is_linear", "is_recording_past",
            "is_sliding", "offload", "prefetch",
        },
    ),
    ("CacheLayerMixin", SinkLayer, OF_A_LAYER),
    ("DynamicLayer", SinkLayer, OF_A_LAYER),
    ("DynamicSlidingWindowLayer", SinkLayer, OF_A_LAYER),
    # Its second ring initialises itself.
    ("DynamicIndexedLayer", IndexedSinkLayer, OF_A_LAYER | {"lazy_initialization_indexer"}),
    *(
        (name, HybridSinkLayer, OF_A_LAYER | {"update_conv_state", "update_recurrent_state"})
        for name in ("LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer")
    ),
]  # fmt: skip
OF_EARLIER_VERSIONS = {"max_batch_size", "max_cache_len"}


def inherited(interface: type, ours: type) -> set[str]:
    """The public names of `interface` that no class of this library defines for `ours`."""
    classes = [base for base in ours.__mro__ if base.__module__.startswith("attention_sinks.")]
    names = {name for name, _ in inspect.getmembers(interface) if not name.startswith("_")}
    return {name for name in names if not any(name in vars(base) for base in classes)}


@pytest.mark.parametrize(("name", "ours", "known"), INTERFACES, ids=[name for name, *_ in INTERFACES])
def test_every_method_of_the_interface_is_implemented_or_inherited_knowingly(
    name: str, ours: type, known: set[str]
) -> None:
    """What `transformers` may call on a cache or on a layer; a new name there asks for a decision."""
    interface = getattr(cache_utils, name, None)
    if interface is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    found = inherited(interface, ours)
    assert found - known <= OF_EARLIER_VERSIONS, "implement them, or decide to inherit them"
    if f"transformers=={transformers.__version__}\n" in (ROOT / "constraints.txt").read_text():
        assert found == known, "no longer there, or ours by now"
    later = type("Later", (interface,), {"method": lambda self: None, "number": property(lambda self: 0)})
    assert inherited(later, ours) - found == {"method", "number"}


def unknown_arguments(theirs: Any, ours: Any) -> set[str]:
    """The arguments of a method of `transformers` that ours would not take by their names."""
    takes = inspect.signature(ours).parameters
    if any(each.kind is each.VAR_KEYWORD for each in takes.values()):
        return set()
    named = {name for name, each in inspect.signature(theirs).parameters.items() if each.kind is not each.VAR_KEYWORD}
    return named - takes.keys() - {"args"}


@pytest.mark.parametrize(("name", "ours", "known"), INTERFACES, ids=[name for name, *_ in INTERFACES])
def test_every_method_takes_the_arguments_that_transformers_names(name: str, ours: type, known: set[str]) -> None:
    if f"transformers=={transformers.__version__}\n" not in (ROOT / "constraints.txt").read_text():
        pytest.skip("early versions have other names, and give arguments by their place")
    methods = inspect.getmembers(getattr(cache_utils, name), inspect.isfunction)
    assert {
        method: missing
        for method, theirs in methods
        if not method.startswith("_")
        and hasattr(ours, method)
        and (missing := unknown_arguments(theirs, getattr(ours, method)))
    } == {}
    assert unknown_arguments(lambda self, states, later: None, lambda self, states: None) == {"later"}


def test_both_names_of_the_greatest_length_are_answered() -> None:
    assert SinkCache(CONFIG).get_max_length() == SinkCache(CONFIG).get_max_cache_shape() == 256
    assert not SinkCache(CONFIG).is_compileable
