"""Layers that keep more than keys and values: linear attention beside attention, and indexers."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from attention_sinks import Rotation, SinkCache

from .models import CACHE, VOCAB_SIZE, build_model, random_ids, relative_error

pytestmark = pytest.mark.skipif(
    not hasattr(transformers, "DeepseekV32Config"), reason="early transformers 5 has no such layers"
)

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}


@pytest.fixture(scope="module", params=["falcon_h1", "deepseek_v32"])
def model(request: pytest.FixtureRequest) -> Any:
    if request.param == "falcon_h1":
        return build_model(
            transformers.FalconH1Config(
                **{**SIZES, "head_dim": 16}, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16
            )
        )
    return build_model(
        transformers.DeepseekV32Config(
            **SIZES, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
            n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=32,
            first_k_dense_replace=1, index_topk=6, index_head_dim=16, index_n_heads=32,
        )
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def new_cache(model: Any) -> SinkCache:
    return SinkCache(model.config, window_length=12, num_sink_tokens=2)


def feed(model: Any, cache: Any, ids: Tensor) -> Tensor:
    """Logits of a stream of chunks and single tokens."""
    logits, seen = [], cache.get_seq_length()
    for chunk in ids.split([5, 1, 1, 4, 1, *[1] * (ids.shape[1] - 12)], dim=1):
        positions = torch.arange(seen, seen + chunk.shape[1])[None]
        logits.append(model(chunk, position_ids=positions, **{CACHE: cache}).logits)
        seen += chunk.shape[1]
    return torch.cat(logits, dim=1)


def test_below_the_window_all_is_as_with_a_dynamic_cache(model: Any) -> None:
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
def test_rows_of_a_batch_move_with_all_their_states(model: Any, operation: Any, rows: list[int]) -> None:
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


def test_positions_are_wound_back_in_every_ring(model: Any) -> None:
    cache, other = new_cache(model), new_cache(model)
    ids = random_ids(30)
    feed(model, cache, ids)
    feed(model, other, ids)
    cache.rebase()
    cache.rows.lowered = True
    assert cache.position_offsets == 18
    for t in range(30, 45):
        token = random_ids(1, seed=t)
        logits = model(token, position_ids=torch.tensor([[t - 18]]), **{CACHE: cache}).logits
        expected = model(token, position_ids=torch.tensor([[t]]), **{CACHE: other}).logits
        assert relative_error(logits, expected) < 1e-4


def test_a_stream_that_is_counted_anew_goes_on_as_before(model: Any) -> None:
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


def test_autograd_changes_nothing(model: Any) -> None:
    ids = random_ids(30)
    expected = feed(model, new_cache(model), ids)
    with torch.enable_grad():
        assert relative_error(feed(model, new_cache(model), ids).detach(), expected) < 1e-5


def test_autograd_changes_nothing_in_a_padded_batch(model: Any) -> None:
    mask = torch.ones(2, 44, dtype=torch.long)
    mask[0, :5] = 0
    ids, outputs = random_ids(44, batch_size=2), []
    for with_grad in (False, True):
        cache = SinkCache(model.config, window_length=12, num_sink_tokens=2, attention_mask=mask[:, :14])
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
    if model.config.model_type == "falcon_h1":  # the state of its linear attention has no way back
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


def test_a_forward_pass_interrupted_before_an_indexer_is_noticed(model: Any) -> None:
    if model.config.model_type != "deepseek_v32":
        pytest.skip("has no indexer")
    cache = new_cache(model)
    feed(model, cache, random_ids(20))
    layer = cache.layers[-1]
    layer.indexer.seen -= 1
    with pytest.raises(RuntimeError, match="interrupted"):
        model(random_ids(1), position_ids=torch.tensor([[20]]), **{CACHE: cache})


def test_the_rotation_of_an_indexer_cannot_be_stated_by_hand(model: Any) -> None:
    if model.config.model_type != "deepseek_v32":
        pytest.skip("has no indexer")
    with pytest.raises(NotImplementedError, match="rotation"):
        SinkCache(model.config, rotation=Rotation(torch.ones(4)))
