"""Layers that hold more than keys and values: states of linear attention beside attention, or keys of an indexer."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from attention_sinks import Rotation, SinkCache

from ..support.inside import position_offsets
from ..support.models import CACHE, random_ids, relative_error, tiny_model
from ..support.streams import S, W, read, read_chunks
from ..support.versions import HAS_LATER_MODELS

pytestmark = [
    pytest.mark.skipif(not HAS_LATER_MODELS, reason="early transformers 5 has no such layers"),
    pytest.mark.usefixtures("no_grad"),
]


@pytest.fixture(scope="module", params=["falcon_h1", "deepseek_v32"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


def new_cache(model: Any) -> SinkCache:
    return SinkCache(model.config, W, S)


def feed(model: Any, cache: Any, ids: Tensor) -> Tensor:
    """Logits of a stream of chunks and single tokens."""
    return torch.cat(read_chunks(model, cache, ids, [5, 1, 1, 4, 1, *[1] * (ids.shape[1] - 12)]), dim=1)


def test_below_the_window_logits_equal_those_of_a_dynamic_cache(model: Any) -> None:
    ids = random_ids(12, batch_size=2)
    expected = feed(model, DynamicCache(config=model.config), ids)
    assert relative_error(feed(model, new_cache(model), ids), expected) < 1e-5


@pytest.mark.parametrize(
    ("operation", "rows"),
    [
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["select", "reorder", "repeat"],
)
def test_all_states_follow_a_change_of_the_batch(model: Any, operation: Any, rows: list[int]) -> None:
    ids, more = random_ids(30, batch_size=3), random_ids(15, batch_size=3, seed=1)
    cache, other = new_cache(model), new_cache(model)
    feed(model, cache, ids)
    operation(cache)
    feed(model, other, ids[rows])
    assert relative_error(feed(model, cache, more[rows]), feed(model, other, more[rows])) < 1e-5


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_reset_leaves_no_trace(model: Any, batch_size: int) -> None:
    cache = new_cache(model)
    feed(model, cache, random_ids(30))
    cache.reset()
    ids = random_ids(30, batch_size=batch_size, seed=1)
    assert torch.equal(feed(model, cache, ids), feed(model, new_cache(model), ids))


def test_rebase_lowers_positions_in_every_ring(model: Any) -> None:
    cache, other = new_cache(model), new_cache(model)
    ids = random_ids(30)
    feed(model, cache, ids)
    feed(model, other, ids)
    cache.rebase()
    assert position_offsets(cache) == [30 - W]
    for t in range(30, 45):
        token = random_ids(1, seed=t)
        assert relative_error(read(model, cache, token), read(model, other, token)) < 1e-4


def test_compact_does_not_change_logits(model: Any) -> None:
    cache, other = new_cache(model), new_cache(model)
    ids, start = random_ids(120), 0
    for length in [7, 1, 1, 9, 1, 1, 1, 20, 3, *[1] * 40]:
        chunk, start = ids[:, start : start + length], start + length
        logits, expected = (model(chunk, **{CACHE: each}).logits for each in (cache, other))
        assert relative_error(logits, expected) < 1e-4
        if start % 3 == 0:
            cache.compact()
            assert cache.get_seq_length() == cache.kept_length == min(start, cache.window_length)
    assert other.get_seq_length() == start


def test_autograd_does_not_change_logits(model: Any) -> None:
    ids = random_ids(30)
    expected = feed(model, new_cache(model), ids)
    with torch.enable_grad():
        assert relative_error(feed(model, new_cache(model), ids).detach(), expected) < 1e-5


def test_autograd_does_not_change_logits_of_a_padded_batch(model: Any) -> None:
    mask = torch.ones(2, 44, dtype=torch.long)
    mask[0, :5] = 0
    ids, outputs = random_ids(44, batch_size=2), []
    for with_grad in (False, True):
        cache = SinkCache(model.config, W, S, attention_mask=mask[:, :14])
        with torch.set_grad_enabled(with_grad):
            for new in (ids[:, :14], *ids[:, 14:].split(1, dim=1)):
                seen = cache.get_seq_length() + new.shape[1]
                positions = (mask[:, :seen].cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
                more = {"attention_mask": mask[:, :seen], "position_ids": positions}
                logits = model(new, **{CACHE: cache}, **more).logits[:, -1].detach()
                outputs.append(logits)
    for logits, expected in zip(outputs[31:], outputs[:31], strict=True):
        assert relative_error(logits, expected) < 1e-5


def test_a_crop_is_exact_or_refused(model: Any) -> None:
    ids, cache, other = random_ids(30), new_cache(model), new_cache(model)
    feed(model, cache, ids[:, :12])
    expected = feed(model, other, ids[:, :12])
    if model.config.model_type == "falcon_h1":  # linear attention cannot take a token back
        with pytest.raises(ValueError, match="tokens_to_remove"):
            cache.crop(-1)
    else:
        cache.crop(-1)
        positions = torch.tensor([[11]])
        logits = model(ids[:, 11:12], position_ids=positions, **{CACHE: cache}).logits
        assert relative_error(logits, expected[:, -1:]) < 1e-5
    assert cache.get_seq_length() == 12
    more = random_ids(15, seed=1)
    assert relative_error(feed(model, cache, more), feed(model, other, more)) < 1e-5


def test_a_forward_pass_interrupted_before_an_indexer_is_noticed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if model.config.model_type != "deepseek_v32":
        pytest.skip("has no indexer")
    cache = new_cache(model)
    feed(model, cache, random_ids(20))
    with monkeypatch.context() as patch:
        patch.setattr(cache, "update_indexer", interrupt)
        with pytest.raises(KeyboardInterrupt):
            read(model, cache, random_ids(1))
    with pytest.raises(RuntimeError, match="interrupted"):
        read(model, cache, random_ids(1))


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_rotation_as_argument_is_refused_for_a_model_with_an_indexer(model: Any) -> None:
    if model.config.model_type != "deepseek_v32":
        pytest.skip("has no indexer")
    with pytest.raises(NotImplementedError, match="rotation"):
        SinkCache(model.config, rotation=Rotation(torch.ones(4)))
