"""What is no prompt is refused before anything is read: the error names the argument, what it is, and what to pass."""

from typing import Any

import pytest
import torch
from transformers import BatchEncoding

from attention_sinks import SinkCache, sink_generate, sink_prefill
from attention_sinks.compat import checkpointing_drops_cache

from ..support import inside
from ..support.models import CACHE, build_config, build_model, random_ids, relative_error, tiny_model
from ..support.streams import NEW_STREAM, S, W, prefilled
from ..support.versions import checkpointing

IDS = random_ids(10)

NO_IDS: dict[str, tuple[Any, type[Exception], str]] = {
    "** forgotten": (BatchEncoding({"input_ids": IDS}), TypeError, r"got a BatchEncoding: pass it as `\*\*inputs`"),
    "dict": ({"input_ids": IDS}, TypeError, r"got a dict: pass it as `\*\*inputs`"),
    "list": (IDS.tolist(), TypeError, "got a list: pass `torch.tensor`"),
    "array": (IDS.numpy(), TypeError, "got a ndarray: pass `torch.tensor`"),
    "text": ("hello", TypeError, r"got a str: pass `\*\*tokenizer\(text, return_tensors='pt'\)`"),
    "one dimension": (IDS[0], ValueError, r"must have the shape \[batch_size, length\], got \[10\]. Add a dimension"),
    "three dimensions": (IDS[None], ValueError, r"must have the shape \[batch_size, length\], got \[1, 1, 10\]"),
    "no row": (IDS[:0], ValueError, r"must have the shape \[batch_size, length\], got \[0, 10\]"),
    "int16": (IDS.short(), TypeError, "must hold token ids in torch.int64, got torch.int16"),
    "float": (IDS.float(), TypeError, "must hold token ids in torch.int64, got torch.float32"),
    "a mask": (IDS > 3, TypeError, "must hold token ids in torch.int64, got torch.bool"),
    "embeddings": (torch.zeros(1, 10, 64), TypeError, "Convert them with `.long.*; embeddings are `inputs_embeds`"),
    "another device": (IDS.to("meta"), ValueError, "must be on the device of the model, cpu, got meta"),
    "another vocabulary": (IDS + 90, ValueError, "must be from 0 to 96, the vocabulary of the model, got"),
    "negative": (IDS - 97, ValueError, "must be from 0 to 96, the vocabulary of the model, got -"),
}


@pytest.mark.parametrize("seen", [0, 5, 30])
@pytest.mark.parametrize(("ids", "error", "message"), NO_IDS.values(), ids=NO_IDS)
def test_what_is_no_tensor_of_token_ids_is_refused(ids: Any, error: type[Exception], message: str, seen: int) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    cache = SinkCache(model.config, W, S)
    prefilled(model, random_ids(30)[:, :seen], cache, 7) if seen else None
    for call in (
        lambda: sink_generate(model, ids, cache=cache, max_new_tokens=2),
        lambda: sink_generate(model, input_ids=ids, cache=cache, max_new_tokens=2),
        lambda: sink_prefill(model, ids, cache),
    ):
        with pytest.raises(error, match=f"`input(s|_ids)` .*{message}"):
            call()
        assert cache.get_seq_length() == seen


def test_settings_may_be_tensors() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    options = {**NEW_STREAM, "eos_token_id": torch.tensor([2]), "max_new_tokens": 5}
    in_chunks, at_once = (sink_generate(model, IDS, prefill_chunk_size=size, **options) for size in (4, None))
    assert torch.equal(in_chunks.sequences, at_once.sequences)  # type: ignore[union-attr]


def test_ids_of_32_bits_are_ids() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    texts: list[Any] = [sink_generate(model, ids, max_new_tokens=20, **NEW_STREAM) for ids in (IDS, IDS.int())]
    assert torch.equal(texts[0].sequences, texts[1].sequences)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": IDS[:, :0]}, ValueError, r"`input_ids` must have tokens, got the shape \[1, 0\]"),
        ({}, ValueError, "`input_ids` must be given to continue a `cache`, got None"),
        ({"inputs_embeds": torch.zeros(1, 20, 64)}, ValueError, "`inputs_embeds` must be those of the whole text"),
        ({"input_ids": IDS, "attention_mask": [[1] * 10]}, ValueError, "`attention_mask` must be a tensor .* got list"),
        ({"input_ids": IDS, "labels": IDS}, TypeError, "`labels` must be left out"),
        ({"input_ids": IDS, "adapter_names": ["a"]}, TypeError, r"`adapter_names` .*`model.set_adapter\(name\)`"),
        ({"input_ids": IDS, "use_mtp": True}, NotImplementedError, "`use_mtp` is not supported, got True"),
        ({"input_ids": IDS, "penalty_alpha": 0.6}, NotImplementedError, "`penalty_alpha` is not supported, got 0.6"),
        ({"input_ids": IDS, "max_new_token": 3}, ValueError, "max_new_token"),
    ],
)
def test_a_stream_is_continued_by_what_is_new_or_not_at_all(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    cache = SinkCache(model.config, W, S)
    prefilled(model, random_ids(30), cache, 7)
    with pytest.raises(error, match=message):
        sink_generate(model, cache=cache, max_new_tokens=2, **arguments)
    assert cache.get_seq_length() == 30


@pytest.mark.parametrize(
    ("embeddings", "error", "message"),
    [
        ([[0.0]], TypeError, "`inputs_embeds` must be a tensor of floating point numbers, got list"),
        (IDS, TypeError, "`inputs_embeds` must be a tensor of floating point numbers, got torch.int64"),
        (torch.zeros(10, 64), ValueError, r"`inputs_embeds` must have the shape .* got \[10, 64\]"),
        (torch.zeros(1, 0, 64), ValueError, r"`inputs_embeds` must have the shape .* got \[1, 0, 64\]"),
    ],
)
def test_what_is_no_embedding_is_refused(embeddings: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sink_generate(tiny_model("llama", num_hidden_layers=2), inputs_embeds=embeddings, max_new_tokens=2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_mask", torch.ones_like(IDS)),
        ("inputs_embeds", torch.zeros(1, 10, 64)),
        ("labels", IDS),
        ("position_ids", IDS),
        ("token_type_ids", torch.zeros_like(IDS)),
        ("use_cache", False),
        ("adapter_names", ["a"]),
    ],
)
def test_an_argument_that_chunks_cannot_get_is_refused(name: str, value: Any) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    cache = SinkCache(model.config, W, S)
    with pytest.raises(TypeError, match=f"`{name}` must be left out"):
        sink_prefill(model, IDS, cache, 7, **{name: value})
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pixel_values", torch.zeros(1, 3, 8, 8)),
        ("image_patches", [torch.zeros(4, 12)]),
        ("image_embeds", torch.zeros(3, 64)),
        ("input_values", torch.zeros(1, 900)),
        ("mm_encoder_outputs", {"last_hidden_state": torch.zeros(2, 3, 64)}),
        ("mm_token_type_ids", torch.ones(1, 3)),
    ],
)
def test_what_is_no_text_is_refused_in_chunks_by_whatever_name(name: str, value: Any) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    cache = SinkCache(model.config, W, S)
    with pytest.raises(NotImplementedError, match=f"`{name}` is not supported with a prompt that is read in chunks"):
        sink_prefill(model, IDS, cache, 7, **{name: value})
    assert cache.get_seq_length() == 0


def test_an_argument_that_changes_nothing_is_taken() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    expected = prefilled(model, IDS, SinkCache(model.config, W, S), 7)
    outputs = list(sink_prefill(model, IDS, SinkCache(model.config, W, S), 7, use_cache=True, labels=None))
    assert torch.equal(torch.cat([output.logits for output in outputs], dim=1), expected)  # type: ignore[misc]
    assert list(sink_prefill(model, IDS[:, :0], SinkCache(model.config, W, S))) == []
    with pytest.raises(ValueError, match="`chunk_size` must be at least 1, got 0"):
        sink_prefill(model, IDS, SinkCache(model.config, W, S), 0)


# --- activations that are checkpointed for training


def in_training() -> Any:
    return checkpointing(build_model(build_config("llama")))


def test_a_model_that_would_drop_the_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = in_training()
    cache = SinkCache(model.config, W, S)
    inside.let_checkpointing_drop_the_cache(monkeypatch)
    for call in (
        lambda: sink_generate(model, IDS, cache=cache, max_new_tokens=2),
        lambda: sink_prefill(model, IDS, cache),
    ):
        with pytest.raises(ValueError, match=r"`model` must not checkpoint activations here.*`model.eval\(\)`"):
            call()
    assert cache.get_seq_length() == 0
    sink_generate(model.eval(), IDS, cache=cache, max_new_tokens=2)


def test_a_model_in_training_is_exact_or_refused() -> None:
    """Layers of later versions keep the cache where no gradients are computed."""
    model, ids = in_training(), random_ids(40)
    cache = SinkCache(model.config, W, S)
    if checkpointing_drops_cache(model):
        pytest.skip("refused, see above")
    logits = prefilled(model, ids, cache, 7)
    output: Any = sink_generate(model, IDS, max_new_tokens=30, **NEW_STREAM)
    model.eval()
    assert relative_error(logits, prefilled(model, ids, SinkCache(model.config, W, S), 7)) < 1e-5
    expected: Any = sink_generate(model, IDS, max_new_tokens=30, **NEW_STREAM)
    assert torch.equal(output.sequences, expected.sequences)


LEFT = r"The last forward pass stored none of its 10 tokens, the cache has seen 0.*`model.eval\(\)`"


def test_a_loop_whose_model_drops_the_cache_ends_at_the_next_token() -> None:
    model = in_training()
    cache = SinkCache(model.config, W, S)
    logits = model(IDS, **{CACHE: cache}).logits
    with pytest.raises(RuntimeError, match=LEFT):
        model(logits[:, -1:].argmax(-1), **{CACHE: cache})
    model.eval()
    for new in IDS.split([6, 1, 3], dim=1):
        logits = model(new, **{CACHE: cache}).logits
    assert cache.get_seq_length() == 10
    assert relative_error(logits[:, -1].detach(), model(IDS).logits[:, -1].detach()) < 1e-5


@pytest.mark.parametrize("name", ["llama", "sliding beside full", "mpt"])
def test_sizes_of_masks_may_be_asked_at_any_time(name: str) -> None:
    model = tiny_model(name)
    cache, other = SinkCache(model.config, 9, 2), SinkCache(model.config, 9, 2)
    with torch.no_grad():
        for new in random_ids(20).split([5, 1, 1, 3, 1, 9], dim=1):
            for _ in range(3):
                cache.get_mask_sizes(new.shape[1], 0)
            logits = [model(new, **{CACHE: each}).logits for each in (cache, other)]
            assert torch.equal(*logits)


def test_a_token_may_follow_a_chunk_that_was_refused() -> None:
    model, ids = build_model(build_config("llama")), random_ids(12)
    cache, other = SinkCache(model.config, W, S), SinkCache(model.config, W, S)
    with torch.no_grad():
        for each in (cache, other):
            model(ids, **{CACHE: each})
        with pytest.raises(ValueError, match="as only padding does"):
            model(torch.zeros(1, 3, dtype=torch.long), position_ids=torch.tensor([[12, 12, 12]]), **{CACHE: cache})
        assert torch.equal(*(model(ids[:, :1], **{CACHE: each}).logits for each in (cache, other)))


def test_a_pass_that_was_interrupted_before_it_stored_anything_can_be_repeated() -> None:
    model, ids = build_model(build_config("llama")), random_ids(12)
    cache = SinkCache(model.config, W, S)

    def interrupt(*_: Any) -> None:
        raise MemoryError

    with torch.no_grad():
        for lengths in ([12], [6, 6], [12]):
            hook = model.model.layers[0].register_forward_pre_hook(interrupt)
            with pytest.raises(MemoryError):
                model(ids, **{CACHE: cache})
            hook.remove()
            logits = [model(new, **{CACHE: cache}).logits for new in ids.split(lengths, dim=1)]
            assert relative_error(torch.cat(logits, dim=1), model(ids).logits) < 1e-5
            cache.reset()
        hook = model.model.layers[0].register_forward_pre_hook(interrupt)
        with pytest.raises(MemoryError):
            model(ids, **{CACHE: cache})
        hook.remove()
        with pytest.raises(RuntimeError, match="If the pass was interrupted, call the model again"):
            model(ids[:, :1], **{CACHE: cache})
        logits = [model(new, **{CACHE: cache}).logits for new in ids.split(1, dim=1)]
        assert relative_error(torch.cat(logits, dim=1), model(ids).logits) < 1e-5
