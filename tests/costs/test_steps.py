"""What a decode step costs, counted: operations, writes, allocations and waits for the device."""

from collections import Counter
from typing import Any

import pytest
import torch

from attention_sinks import SinkCache

from ..support.counting import Operations
from ..support.inside import count_rotations
from ..support.models import CACHE, build_config, random_ids, tiny_model
from ..support.states import states_of
from ..support.streams import S, W

pytestmark = pytest.mark.usefixtures("no_grad")

# The operations that write to the buffers of a layer.
WRITES = {"index_copy_", "scatter_", "copy_", "index_put_"}
# What the slots of a padded step cost, once for all layers.
COST_OF_PADDING = 24


def feed(cache: SinkCache, length: int, batch_size: int = 1, dtype: torch.dtype = torch.float32) -> Operations:
    """Count what one forward pass does in the cache."""
    states = torch.randn(batch_size, 2, length, 16).to(dtype)
    operations = Operations()
    with operations:
        for layer_idx in range(len(cache)):
            cache.update(states, states, layer_idx)
    return operations


def operations_of_a_step(num_layers: int, window_length: int, dtype: torch.dtype = torch.float32) -> Operations:
    cache = SinkCache(build_config("llama", num_hidden_layers=num_layers), window_length, S)
    for length in (window_length, 1):  # the first step also computes what later steps use again
        feed(cache, length, dtype=dtype)
    return feed(cache, 1, dtype=dtype)


def test_a_step_does_three_writes_per_layer_and_a_constant_number_of_other_operations() -> None:
    """On a GPU the launches are the cost."""
    few, many = operations_of_a_step(2, 64), operations_of_a_step(10, 64)
    assert many.names - few.names == Counter({"index_copy_": 3 * 8})
    assert few.names.total() - 3 * 2 <= 12
    assert operations_of_a_step(2, 4096).names == few.names


def steps(num_layers: int, shortest: int) -> list[Counter[str]]:
    """The operations of each step of a batch of two rows, up to a full lap of the ring, and of one much later.

    The prompt has `W - 1` columns, of which `shortest` are tokens of the shorter row.
    """
    columns = torch.arange(W - 1)
    mask = (columns >= torch.tensor([[W - 1 - shortest], [0]])).long()
    cache = SinkCache(build_config("llama", num_hidden_layers=num_layers), W, S, attention_mask=mask)
    feed(cache, W - 1, batch_size=2)
    counted = [feed(cache, 1, batch_size=2).names for _ in range(2 * W + S)]
    for _ in range(10 * W):
        states = torch.randn(2, 2, 1, 16)
        for layer_idx in range(num_layers):
            cache.update(states, states, layer_idx)
    return [*counted, feed(cache, 1, batch_size=2).names]


def check_steps(few: list[Counter[str]], many: list[Counter[str]], unpadded: list[Counter[str]]) -> None:
    """Four layers more cost three writes each and nothing else; padding costs the same for any number of layers."""
    for two_layers, six_layers, expected in zip(few, many, unpadded, strict=True):
        per_layer = six_layers - two_layers
        assert per_layer.keys() <= WRITES
        assert per_layer.total() <= 3 * 4
        assert six_layers.total() <= expected.total() + COST_OF_PADDING


NEVER_ENDS = "a row with fewer than S tokens when the window fills costs more for the rest of the stream"


@pytest.mark.parametrize(
    "shortest",
    [pytest.param(n, marks=[pytest.mark.xfail(strict=True, reason=NEVER_ENDS)] if n < S else []) for n in range(1, W)],
)
def test_a_padded_step_does_three_writes_per_layer_however_short_a_row_is(shortest: int) -> None:
    """From the step that evicts first on, or the one after which all sinks of the shortest row have come."""
    first = 1 + max(S - shortest, 0)
    few, many, unpadded = steps(2, shortest), steps(6, shortest), steps(6, W - 1)
    check_steps(few[first:], many[first:], unpadded[first:])


@pytest.mark.parametrize("shortest", range(1, W))
def test_a_padded_step_does_four_writes_per_layer_while_sinks_still_come(shortest: int) -> None:
    """The sinks of the shortest row are stored a second time, without rotation, when the longest row evicts already."""
    for names in steps(6, shortest)[: S + 1]:
        assert sum(names[write] for write in WRITES) <= 4 * 6


def test_an_unpadded_step_does_three_writes_per_layer_at_any_age() -> None:
    few, many = steps(2, W - 1), steps(6, W - 1)
    check_steps(few, many, many)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_allocates_no_more_than_the_sinks(dtype: torch.dtype) -> None:
    window_length, num_layers = 4096, 3
    sinks = num_layers * 2 * S * 16 * 4
    assert 0 < operations_of_a_step(num_layers, window_length, dtype).largest <= sinks


@pytest.mark.parametrize("prompt_length", [3, 40])
def test_no_step_waits_for_the_device(prompt_length: int) -> None:
    """Neither the cache nor the model reads a number from a tensor."""
    model: Any = tiny_model("llama")
    cache = SinkCache(model.config, W, S)
    model(random_ids(prompt_length), **{CACHE: cache})
    with Operations() as operations:
        for t in range(2 * W):
            model(random_ids(1, seed=t), **{CACHE: cache})
    assert operations.names["index_copy_"] > 0
    assert not operations.names.keys() & {"_local_scalar_dense", "item", "nonzero", "is_nonzero"}


def test_cos_and_sin_are_computed_once_per_step_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = SinkCache(build_config("llama", num_hidden_layers=6), 8, 2)
    states = [states_of([0]), states_of([0, 1, 2])]
    shifts = count_rotations(monkeypatch)
    for keys, values in states * 5:
        for layer_idx in range(len(cache)):
            cache.update(keys, values, layer_idx)
    assert shifts == [1, 2, 5, 6, 9, 10]
