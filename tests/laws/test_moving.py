"""The states of a cache may be replaced by copies, and moved: what follows is the same, or the call is refused."""

import copy
from collections.abc import Callable
from functools import cache as remembered
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_sinks import SinkCache

from ..support import inside
from ..support.models import CACHE, LATER, build_config, build_model, random_ids, relative_error, tiny_model
from ..support.streams import S, W, padded, read, read_chunks
from ..support.versions import RECORDS_PAST

pytestmark = pytest.mark.usefixtures("no_grad")

NAMES = ["llama", "deepseek_v3", "smollm3", "sliding beside full", *LATER]
# Before the window is full, when it is, and past it.
POINTS = (3, W - 1, W, W + 1, 30)
LENGTH = 40


@remembered
def untouched(name: str) -> Tensor:
    """The logits `[1, LENGTH, vocab_size]` of a text that is read token by token."""
    return torch.cat(read_chunks(*started(name), random_ids(LENGTH), [1] * LENGTH), dim=1)


def started(name: str) -> tuple[Any, SinkCache]:
    model = tiny_model(name)
    return model, SinkCache(model.config, W, S)


Replace = Callable[[Tensor], Tensor]


def of_inference_mode(states: Tensor) -> Tensor:
    with torch.inference_mode():
        return states.clone()


def as_a_part(states: Tensor) -> Tensor:
    """A view of a larger tensor with other strides."""
    return torch.stack([states, states], dim=-1)[..., 0]


WAYS: dict[str, Replace] = {
    "copies": torch.clone,
    "copies elsewhere, which stay there": lambda states: states.to(torch.float64),
    "copies of inference mode": of_inference_mode,
    "copies in another layout": as_a_part,
    "copies that need gradients": lambda states: states.clone().requires_grad_(),
}


@pytest.mark.parametrize("names", [["keys", "values"], ["values"]], ids=["both", "values"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "deepseek_v3", *LATER])
def test_states_may_be_replaced_by_copies(name: str, way: str, names: list[str]) -> None:
    model, cache = started(name)
    logits = []
    for t, token in enumerate(random_ids(LENGTH).split(1, dim=1)):
        if t in POINTS:
            for layer in inside.sink_layers(cache):
                for states in names if layer.is_initialized else []:
                    setattr(layer, states, WAYS[way](getattr(layer, states)))
        logits.append(read(model, cache, token))
    assert torch.equal(torch.cat(logits, dim=1), untouched(name))


def test_copies_of_all_layers_may_share_memory() -> None:
    """As of a stack of all keys that were moved at once."""
    model, cache = started("llama")
    ids = random_ids(LENGTH)
    logits = [read(model, cache, ids[:, :20])]
    keys = torch.stack([layer.keys for layer in cache.layers], dim=-1)
    for i, layer in enumerate(cache.layers):
        layer.keys = keys[..., i]
    before = keys.clone()
    logits += read_chunks(model, cache, ids[:, 20:], [1] * 10 + [5] * 2)
    expected = read_chunks(*started("llama"), ids, [20] + [1] * 10 + [5] * 2)
    assert torch.equal(torch.cat(logits, dim=1), torch.cat(expected, dim=1))
    assert torch.equal(keys, before), "what the caller holds is not written to"


CHANGES: dict[str, Callable[[SinkCache], object]] = {
    "crop": lambda cache: cache.crop(-2),
    "rebase": lambda cache: cache.rebase(),
    "compact": lambda cache: cache.compact(),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "state": lambda cache: SinkCache.from_state(cache.state(), cache.config),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_replaced_states_is_that_of_the_states(change: str) -> None:
    model = tiny_model("llama")
    caches = []
    for replaces in (False, True):
        cache = SinkCache(model.config, W, S)
        read(model, cache, random_ids(20, 2))
        if replaces:
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys.double(), layer.values.double()
        CHANGES[change](cache)
        caches.append(cache)
    ids = random_ids(5, inside.num_rows(caches[0]), seed=1)
    assert all(
        torch.equal(*both) for both in zip(*(read_chunks(model, c, ids, [1, 3, 1]) for c in caches), strict=True)
    )


@pytest.mark.skipif(not RECORDS_PAST, reason="early transformers 5 cannot record the past")
def test_states_may_be_replaced_while_the_past_is_recorded() -> None:
    model = tiny_model("llama")
    logits: list[list[Tensor]] = []
    for replaces in (False, True):
        cache = SinkCache(model.config, W, S)
        cache.activate_past_recording()  # type: ignore[no-untyped-call]
        logits.append([])
        for length in (20, 1, 4, 1):
            if replaces and cache.is_initialized:
                cache.to(torch.float64).to(torch.float32)
                for layer in cache.layers:
                    layer.keys, layer.values = layer.keys.double(), layer.values.double()
            logits[-1].append(read(model, cache, random_ids(length, seed=length)))
            cache.crop(-1)
    assert all(torch.equal(*both) for both in zip(*logits, strict=True))


# --- refused


def swapped(states: Tensor) -> Tensor:
    return states.flip(0)


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "fewer tokens": (lambda states: states[:, :, 1:], r"must keep the shape.*\[2, 2, 15, 16\].*`crop`"),
    "fewer rows": (lambda states: states[:1], "must keep the shape.*`batch_select_indices`"),
    "rows in another order": (swapped, "must keep the sinks.*`reorder_cache`"),
    "other keys": (lambda states: 2 * states, "must keep the sinks"),
    "whole numbers": (lambda states: states.long(), "a floating dtype, got .*int64"),
    "a list": (lambda states: states.tolist(), "must keep the shape .*got list"),
}


@pytest.mark.parametrize("length", [6, 20])
@pytest.mark.parametrize("what", REFUSED)
def test_other_states_are_refused_where_they_are_put(what: str, length: int) -> None:
    model = tiny_model("llama")
    cache, other = SinkCache(model.config, W, S), SinkCache(model.config, W, S)
    for each in (cache, other):
        read(model, each, random_ids(length, 2))
    replace, message = REFUSED[what]
    for layer in cache.layers:
        with pytest.raises(ValueError, match=message):
            layer.keys = replace(layer.keys)
    token = random_ids(1, 2, seed=1)
    assert torch.equal(read(model, cache, token), read(model, other, token))


def test_rows_of_a_padded_batch_in_another_order_are_refused() -> None:
    """The sinks of a padded row are not in the first slots."""
    model = tiny_model("llama")
    _, ids, mask = padded([9, 20])
    cache = SinkCache(model.config, W, S, attention_mask=mask)
    read_chunks(model, cache, ids, [10, *[1] * 10])
    cache.layers[0].keys = cache.layers[0].keys.double()
    with pytest.raises(ValueError, match="must keep the sinks"):
        cache.layers[0].keys = cache.layers[0].keys.flip(0)


# --- a whole cache


@pytest.mark.parametrize(
    "name", ["llama", "smollm3", "sliding beside full", *sorted(LATER.keys() & {"falcon_h1", "lfm2"})]
)
@pytest.mark.parametrize("length", [3, W, 30])
def test_a_cache_goes_on_in_another_dtype_with_the_model(name: str, length: int) -> None:
    model, cache = started(name)
    wide = copy.deepcopy(model).double()
    ids = random_ids(LENGTH)
    logits = [read(model, cache, token) for token in ids[:, :length].split(1, dim=1)]
    assert cache.to(torch.float64) is cache
    logits += [read(wide, cache, token) for token in ids[:, length:].split(1, dim=1)]
    assert relative_error(torch.cat([each.double() for each in logits], dim=1), untouched(name)) < 1e-5


def test_a_padded_cache_goes_on_in_another_dtype_with_the_model() -> None:
    model = tiny_model("llama")
    wide = copy.deepcopy(model).double()
    _, ids, mask = padded([5, 14, 20])
    for moved in (3, 10, 20, 30):
        cache, other = (SinkCache(model.config, W, S, attention_mask=mask) for _ in range(2))
        for t, token in enumerate(torch.cat([ids, random_ids(20, 3)], dim=1).split(1, dim=1)):
            if t == moved:
                cache.to(torch.float64)
            logits, expected = read(wide if t >= moved else model, cache, token), read(model, other, token)
            rows = t >= 20 - torch.tensor([5, 14, 20])  # nothing is promised for pads
            assert relative_error(logits[rows], expected[rows]) < 1e-5 if rows.any() else True


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_has_the_dtypes_of_a_stream_that_began_in_it(name: str) -> None:
    half = build_model(build_config(name)).bfloat16()
    began, moved = SinkCache(half.config, W, S), started(name)[1]
    for cache, model in ((began, half), (moved, tiny_model(name))):
        for length in (20, 1):
            read(model, cache, random_ids(length))
    moved.to(torch.bfloat16)
    assert {n: x.dtype for n, x in inside.tensors(moved).items()} == {
        n: x.dtype for n, x in inside.tensors(began).items()
    }
    read(half, moved, random_ids(1))


@pytest.mark.parametrize("length", [5, 20])
@pytest.mark.parametrize("name", NAMES)
def test_no_tensor_stays_where_it_was(name: str, length: int) -> None:
    model, cache = started(name)
    for chunk in (length, 1):
        read(model, cache, random_ids(chunk))
    assert {tensor.device.type for tensor in inside.tensors(cache).values()} == {"cpu"}
    cache.to("meta")
    assert {tensor.device.type for tensor in inside.tensors(cache).values()} == {"meta"}
    assert cache.get_seq_length() == length + 1


@pytest.mark.parametrize("name", ["llama", "sliding beside full", *sorted(LATER.keys() & {"falcon_h1", "lfm2"})])
def test_new_states_are_stored_where_the_cache_is(name: str) -> None:
    """On the meta device, where every operation has a device and a dtype, but no values."""
    model, cache = started(name)
    there = copy.deepcopy(model).to("meta")
    read(model, cache, random_ids(5))
    cache.to("meta")
    for length in (1, 4, *[1] * W, 3, 1):
        read(there, cache, random_ids(length).to("meta"))
    assert {tensor.device.type for tensor in inside.tensors(cache).values()} == {"meta"}


@pytest.mark.parametrize("name", NAMES)
def test_a_move_that_changes_nothing_is_bitwise_nothing(name: str) -> None:
    model, cache = started(name)
    cache.to("cpu", torch.float32)
    logits = []
    for t, token in enumerate(random_ids(LENGTH).split(1, dim=1)):
        if t in POINTS:
            with torch.inference_mode(t == W):
                cache.to("cpu").to(torch.float64).to("cpu", torch.float32)
        logits.append(read(model, cache, token))
    assert torch.equal(torch.cat(logits, dim=1), untouched(name))


def test_a_rebased_cache_may_be_moved() -> None:
    model = tiny_model("llama")
    logits = []
    for moves in (False, True):
        cache = SinkCache(model.config, W, S)
        read(model, cache, random_ids(30))
        cache.rebase()
        if moves:
            cache.to(torch.float64).to(torch.float32)
        logits.append(torch.cat(read_chunks(model, cache, random_ids(9, seed=1), [1, 1, 5, 1, 1]), dim=1))
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "`device` and `dtype` must be at hand, got nowhere"),
        ((torch.int64,), "`dtype` must be a floating dtype, got torch.int64"),
        (("cpu", torch.bool), "`dtype` must be a floating dtype, got torch.bool"),
        ((torch.zeros(1),), "`device` and `dtype` must be at hand"),
        pytest.param(
            ("cuda",),
            "must be at hand, got cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_a_move_that_cannot_be_changes_nothing(arguments: Any, message: str) -> None:
    model, cache = started("llama")
    before, ids = read(model, cache, random_ids(20)), random_ids(1, seed=1)
    with pytest.raises(ValueError, match=message):
        cache.to(*arguments)
    other = started("llama")[1]
    assert torch.equal(before, read(model, other, random_ids(20)))
    assert torch.equal(read(model, cache, ids), read(model, other, ids))


@pytest.mark.parametrize("length", [6, 20])
def test_a_model_that_was_moved_alone_is_told_to_move_its_cache(length: int) -> None:
    model, cache = started("llama")
    wide = copy.deepcopy(model).double()
    read(model, cache, random_ids(length))
    ids = random_ids(1, seed=1)
    with pytest.raises(ValueError, match=r"`key_states` must keep dtype and device.*`to\('cpu', torch.float64\)`"):
        read(wide, cache, ids)
    expected = read(model, copy.deepcopy(cache), ids)
    assert relative_error(read(wide, cache.to("cpu", torch.float64), ids), expected) < 1e-5
    for layer in cache.layers:  # by hand the sinks do not move with the keys
        layer.keys, layer.values = layer.keys.float(), layer.values.float()
    with pytest.raises(ValueError, match=r"must keep dtype and device.*Move the cache"):
        read(model, cache, ids)
    read(model, cache.to(torch.float32), ids)


# --- offload and prefetch


def test_a_layer_knows_where_its_states_belong() -> None:
    """As `prefetch` asks it, while they are elsewhere."""
    model, cache = started("llama")
    read(model, cache, random_ids(20))
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.to("meta", torch.float64), layer.values.to("meta")
        assert (layer.device, layer.dtype) == (torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("name", ["llama", "sliding beside full", *LATER])
def test_layers_may_be_offloaded_and_prefetched_around_a_pass(name: str) -> None:
    model, cache = started(name)
    logits = []
    for t, token in enumerate(random_ids(LENGTH).split(1, dim=1)):
        logits.append(read(model, cache, token))
        for i in range(len(cache)):
            cache.offload(i)
        for i in range(len(cache) + 1 if t % 2 else 0):
            cache.prefetch(i)
    assert torch.equal(torch.cat(logits, dim=1), untouched(name))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("prefetches", [False, True])
def test_offloaded_layers_come_back_to_their_device(prefetches: bool) -> None:
    model = build_model(build_config("llama")).cuda()
    cache, other = SinkCache(model.config, W, S), SinkCache(model.config, W, S)
    for token in random_ids(LENGTH).cuda().split(1, dim=1):
        assert torch.equal(*(model(token, **{CACHE: each}).logits for each in (cache, other)))
        for i, layer in enumerate(cache.layers):
            cache.offload(i)
            assert layer.keys.device.type == "cpu"
            if prefetches:
                cache.prefetch(i)
                assert layer.keys.is_cuda
    cache.to("cpu")
    read(model.cpu(), cache, random_ids(3))
    assert {tensor.device.type for tensor in inside.tensors(cache).values()} == {"cpu"}
