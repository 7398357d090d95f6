"""Models with layers of several kinds: some become rings, others keep their own kind."""

import pytest
import torch
from transformers import DynamicCache, Llama4TextConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from attention_sinks import SinkCache

from ..support.inside import SinkLayer
from ..support.models import CACHE, LATER, build_config, build_model, random_ids, tiny_model


def test_only_sliding_layers_wider_than_the_window_become_rings() -> None:
    config = build_config(
        "qwen2", num_hidden_layers=2, use_sliding_window=True, sliding_window=32, max_window_layers=1,
        layer_types=["full_attention", "sliding_attention"],
    )  # fmt: skip
    assert [type(layer) for layer in SinkCache(config, 16, 4).layers] == [SinkLayer, SinkLayer]
    assert [type(layer) for layer in SinkCache(config, 32, 4).layers] == [SinkLayer, DynamicSlidingWindowLayer]


def test_layers_with_chunked_attention_do_not_become_rings() -> None:
    """Their chunks begin at absolute positions, which eviction would shift."""
    config = Llama4TextConfig(
        num_hidden_layers=4, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=97,
        intermediate_size=32, intermediate_size_mlp=32, attention_chunk_size=64, max_position_embeddings=4096,
    )  # fmt: skip
    kinds = [type(layer) for layer in SinkCache(config, 16, 4).layers]
    assert kinds == [DynamicSlidingWindowLayer] * 3 + [SinkLayer]


def test_a_chunk_so_long_that_the_sliding_window_hides_the_sinks_is_refused() -> None:
    config = build_config("mistral-sliding", num_hidden_layers=1)  # a sliding window of 64 tokens
    model, cache = build_model(config), SinkCache(config, 16, 4)
    with torch.no_grad():
        model(random_ids(100), **{CACHE: cache})
        model(random_ids(49), **{CACHE: cache})
        with pytest.raises(ValueError, match="`query_length` must be at most 49 with 15 tokens in the cache, got 50"):
            model(random_ids(50), **{CACHE: cache})
    assert cache.get_seq_length() == 149


def test_a_refused_prompt_is_stored_in_no_layer() -> None:
    model = tiny_model("sliding beside full")
    cache, ids, mask = SinkCache(model.config, 16, 4), random_ids(10), torch.ones(1, 10, dtype=torch.long)
    ids[0, :3], mask[0, :3] = 0, 0
    with pytest.raises(ValueError, match="as only padding does"):
        model.generate(ids, attention_mask=mask, **{CACHE: cache}, max_new_tokens=2)
    assert [layer.get_seq_length() for layer in cache.layers] == [0, 0, 0]
    model.generate(random_ids(7), **{CACHE: cache}, max_new_tokens=2)


@torch.no_grad()
def test_another_batch_size_or_dtype_is_refused_before_any_layer_stores_it() -> None:
    model = tiny_model("sliding beside full")
    cache, untouched, ids = SinkCache(model.config, 16, 4), SinkCache(model.config, 16, 4), random_ids(30)
    for each in (cache, untouched):
        model(ids[:, :20], **{CACHE: each})
    with pytest.raises(ValueError, match=r"must keep batch size and dtype, 1 and torch.float32, got the shape \[3, "):
        model(random_ids(1, batch_size=3), **{CACHE: cache})
    with pytest.raises(ValueError, match=r"must keep batch size and dtype, .* in torch.float64"):
        build_model(build_config("sliding beside full")).double()(ids[:, :1], **{CACHE: cache})
    for token in ids[:, 20:].split(1, dim=1):
        expected = model(token, **{CACHE: untouched}).logits
        assert torch.equal(model(token, **{CACHE: cache}).logits, expected)


@torch.no_grad()
def test_layers_of_different_kinds_crop_together_or_not_at_all() -> None:
    model, ids = tiny_model("sliding beside full"), random_ids(40)
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


@pytest.mark.skipif(not LATER, reason="early transformers 5 has no such layers")
def test_a_mask_asked_of_a_layer_without_attention_is_that_of_the_first_with_attention() -> None:
    """`transformers` asks layer 0 by default, whatever its kind."""
    cache = SinkCache(build_config("qwen3_next"), 8, 2)
    assert not hasattr(cache.layers[0], "keys")
    assert cache.get_mask_sizes(3, 0) == cache.get_mask_sizes(3, 1) == (3, 0)
