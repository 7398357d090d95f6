"""Images and sound in a prompt: each step is the model without a cache on the kept tokens."""

from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

from attention_sinks import SinkCache
from attention_sinks import sink_generate as generate

from ..support.models import CACHE
from ..support.multimodal import MULTIMODAL, TEXT, DecoderRecorder, logits_of_kept, media_prompt, multimodal_model

W, S = 16, 4
sink_generate: Any = generate  # typed loosely, as `model.generate`
SETTINGS: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
TOLERANCE = 1e-5


@pytest.mark.parametrize(
    ("before", "after", "window_length"),
    [(5, 2, 64), (5, 2, W), (2, 14, W), (5, 30, W)],
    ids=["below the window", "across it", "among the sinks", "evicted at once"],
)
@pytest.mark.parametrize("name", MULTIMODAL)
def test_each_step_is_the_model_without_a_cache_on_the_kept_tokens(
    name: str, before: int, after: int, window_length: int
) -> None:
    model, inputs = multimodal_model(name), media_prompt(name, before, after)
    window: dict[str, Any] = {"window_length": window_length, "num_sink_tokens": S}
    with DecoderRecorder(model) as recorder:
        output = sink_generate(model, **inputs, **window, max_new_tokens=20, **SETTINGS)
    embeddings = torch.cat(recorder.embeddings, dim=1) if name != "mllama" else torch.empty(0)
    for i, logits in enumerate(output.logits[1:], inputs["input_ids"].shape[1] + 1):
        read = embeddings[:, :i] if name != "mllama" else embeddings
        truth = logits_of_kept(model, inputs, output.sequences[:, :i], read, window_length, S)
        assert (logits[0] - truth).abs().max() <= TOLERANCE * truth.abs().max()


@pytest.mark.parametrize("name", MULTIMODAL)
def test_an_image_or_a_sound_below_the_window_is_bitwise_that_of_a_dynamic_cache(name: str) -> None:
    model, inputs = multimodal_model(name), media_prompt(name, 5, 3)
    plain = model.generate(**inputs, **{CACHE: DynamicCache(config=model.config)}, max_new_tokens=20, **SETTINGS)
    ours = sink_generate(model, **inputs, window_length=64, max_new_tokens=20, **SETTINGS)
    assert torch.equal(torch.stack(plain.logits), torch.stack(ours.logits))


@pytest.mark.parametrize("name", MULTIMODAL)
def test_an_image_or_a_sound_matters(name: str) -> None:
    model, inputs = multimodal_model(name), media_prompt(name, 5, 3)
    name_of_media = next(each for each in inputs if each in ("pixel_values", "input_features"))
    other = {**inputs, name_of_media: inputs[name_of_media].flip(-1)}
    one, two = (sink_generate(model, **each, max_new_tokens=1, **SETTINGS).logits[0] for each in (inputs, other))
    assert (one - two).abs().max() > 1e-3 * one.abs().max()


def test_a_model_that_counts_positions_from_1_is_read_in_chunks_from_1() -> None:
    model, words = multimodal_model("paligemma"), media_prompt("paligemma", 5, 20)["input_ids"][:, -20:]
    window: dict[str, Any] = {"window_length": W, "num_sink_tokens": S, "prefill_chunk_size": 3}
    output = sink_generate(model, words, **window, max_new_tokens=10, **SETTINGS)
    embeddings = model.get_input_embeddings()(output.sequences)
    inputs: dict[str, Any] = {"input_ids": words}
    for i, logits in enumerate(output.logits, 20):
        truth = logits_of_kept(model, inputs, output.sequences[:, :i], embeddings[:, :i], W, S)
        assert (logits[0] - truth).abs().max() <= TOLERANCE * truth.abs().max()


@pytest.mark.skipif(not hasattr(transformers, "Qwen4ExpConfig"), reason="a later model")
def test_images_are_refused_where_the_cache_must_give_their_positions_by_itself() -> None:
    indexer = {"indexer_n_heads": 8, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8}
    indexer |= {"indexer_compress_ratio": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    text = {**TEXT, "head_dim": 16, "layer_types": ["indexed_attention"], "num_experts": 4, "num_experts_per_tok": 2}
    text |= {**indexer, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "ple_layer_ids": []}
    tower = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    config: Any = transformers.Qwen4ExpConfig(text_config=text, vision_config=tower, image_token_id=90)
    model: Any = transformers.Qwen4ExpForConditionalGeneration(config).eval()
    inputs = media_prompt("glm4v", 5, 3)
    cache = SinkCache(config.text_config, W, S)
    with pytest.raises(NotImplementedError, match="`image_grid_thw`.*pools"):
        sink_generate(model, **inputs, **{CACHE: cache}, max_new_tokens=2)
    assert cache.get_seq_length() == 0
