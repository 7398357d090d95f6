"""A cache made for another model says so; a pass that leaves some layers alone is no interruption."""

from typing import Any

import pytest
import torch
from transformers import MllamaConfig, MllamaForConditionalGeneration

from attention_sinks import Rotation, SinkCache, sink_generate

from ..support.models import CACHE, LATER, build_config, build_model, random_ids, tiny_model
from ..support.streams import OPTIONS, S, W, read
from ..support.versions import RECORDS_PAST

Case = tuple[tuple[str, dict[str, Any]], str, type[Exception], str]
MADE_WITH = r".*with the config of this model, `SinkCache\(model.config\)`"
# What the cache is made with, the model, and the error.
CASES: dict[str, Case] = {
    "fewer layers": (("llama", {"num_hidden_layers": 1}), "llama", ValueError, "`layer_idx` cannot be 1" + MADE_WITH),
    "more layers": (
        ("llama", {"num_hidden_layers": 3}),
        "llama",
        RuntimeError,
        "between layer 1 and layer 2.*has fewer than the `config` of the cache: make the cache with `model.config`",
    ),
    "a wider head": (
        ("llama", {"head_dim": 32}),
        "llama",
        ValueError,
        "`key_states` must have head dimension 32" + MADE_WITH,
    ),
    "a narrower head": (
        ("llama", {"head_dim": 8}),
        "llama",
        ValueError,
        "`key_states` must have head dimension 8, .*got 16",
    ),
    "a wider head that rotates in part": (
        ("glm4", {"head_dim": 64}),
        "glm4",
        ValueError,
        "`key_states` must have head dimension 64, .*got 32",
    ),
    "other layers": (("sliding beside full", {}), "smollm3", RuntimeError, "make the cache with `model.config`"),
}
if LATER:  # early transformers 5 caches whole keys for latent attention
    CASES["latent attention"] = (
        ("deepseek_v3", {}),
        "llama",
        ValueError,
        "`value_states` must have head dimension 8, .*got 16",
    )
    CASES["convolutions"] = (
        ("lfm2", {}),
        "llama",
        ValueError,
        "`layer_idx` cannot be 0: layer 0 is a Linear" + MADE_WITH,
    )
    CASES["no convolutions"] = (
        ("llama", {}),
        "lfm2",
        ValueError,
        "`layer_idx` cannot be 0: layer 0 is a SinkLayer" + MADE_WITH,
    )
    CASES["no indexer"] = (
        ("deepseek_v3", {}),
        "deepseek_v32",
        ValueError,
        "`layer_idx` cannot be 0: layer 0 is a SinkLayer" + MADE_WITH,
    )
    CASES["fewer layers before a convolution"] = (
        ("lfm2", {"num_hidden_layers": 1, "layer_types": ["full_attention"]}),
        "qwen3_next",
        ValueError,
        "layer 0",
    )


@pytest.mark.parametrize("case", CASES)
def test_a_cache_of_another_model_is_refused(case: str) -> None:
    (architecture, changes), name, kind, message = CASES[case]
    model, cache = tiny_model(name), SinkCache(build_config(architecture, **changes), W, S)
    with pytest.raises(kind, match=message):
        model.generate(random_ids(5), **{CACHE: cache}, max_new_tokens=3, **OPTIONS)
    if kind is ValueError:
        assert cache.get_seq_length() == 0


def test_a_rotation_that_does_not_fit_is_refused() -> None:
    model = tiny_model("llama")
    cache = SinkCache(model.config, W, S, rotation=Rotation(torch.ones(16)))
    with pytest.raises(ValueError, match="`key_states` must have head dimension at least 32, .*got 16"):
        read(model, cache, random_ids(5))


def test_another_number_of_heads_is_no_other_model() -> None:
    """Nothing depends on it."""
    model = tiny_model("llama")
    config = build_config("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=16)
    outputs = [
        model.generate(random_ids(5), **{CACHE: SinkCache(each, W, S)}, max_new_tokens=20, **OPTIONS).sequences
        for each in (config, model.config)
    ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("exit_layer", [1, 2])
def test_a_model_that_leaves_early_as_its_own_assistant_is_exact(exit_layer: int) -> None:
    model = build_model(build_config("llama", num_hidden_layers=3))
    ids = random_ids(8).repeat(1, 3)
    settings: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": 96}
    expected = model.generate(ids, **settings)
    output: Any = sink_generate(model, ids, window_length=64, assistant_early_exit=exit_layer, **settings)
    assert torch.equal(output, expected)
    cache = SinkCache(model.config, 64, S)
    assert torch.equal(model.generate(ids, **{CACHE: cache}, assistant_early_exit=exit_layer, **settings), expected)


# --- layers of cross-attention to an image


def mllama(cross_attention_layers: list[int]) -> Any:
    text = {
        "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
        "intermediate_size": 37, "max_position_embeddings": 512, "cross_attention_layers": cross_attention_layers,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    vision = {
        "image_size": 8, "patch_size": 2, "num_channels": 3, "hidden_size": 16, "intermediate_layers_indices": [0],
        "vision_output_dim": 32, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2,
        "intermediate_size": 16, "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]],
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MllamaForConditionalGeneration(
            MllamaConfig(text_config=text, vision_config=vision, image_token_index=4)
        )
        for weight in model.parameters():
            weight.data.normal_(std=0.5 if weight.ndim == 1 else weight.shape[-1] ** -0.5)
    return model.eval()


def prompt_with_image() -> dict[str, Any]:
    ids = random_ids(7).clamp(min=5)
    ids[0, 0] = 4
    pixels = torch.randn(1, 1, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels,
        "aspect_ratio_ids": torch.tensor([[1]]), "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, 7, 1, 1, dtype=torch.long),
    }  # fmt: skip


SETTINGS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}


OF_IMAGES = pytest.mark.skipif(not RECORDS_PAST, reason="Mllama of early transformers 5 needs a key for every token")


@OF_IMAGES
@pytest.mark.parametrize("layers", [[1], [1, 3], [2, 3]])
def test_layers_that_only_a_pass_with_an_image_reaches_are_exact(layers: list[int]) -> None:
    model, inputs = mllama(layers), prompt_with_image()
    expected = model.generate(**inputs, **SETTINGS)
    cache = SinkCache(model.config, 64, S)
    assert torch.equal(model.generate(**inputs, **{CACHE: cache}, **SETTINGS), expected)
    output: Any = sink_generate(model, **inputs, window_length=64, **SETTINGS)
    assert torch.equal(output, expected)
    text = {"input_ids": inputs["input_ids"][:, 1:]}
    expected = model.generate(**text, **SETTINGS)
    assert torch.equal(model.generate(**text, **{CACHE: SinkCache(model.config, 64, S)}, **SETTINGS), expected)


@OF_IMAGES
@pytest.mark.usefixtures("no_grad")
def test_an_interruption_before_the_last_layer_with_an_image_is_noticed() -> None:
    model, cache = mllama([1, 3]), SinkCache(mllama([1, 3]).config, 64, S)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = model.model.language_model.layers[3].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**prompt_with_image(), **{CACHE: cache})
    hook.remove()
    with pytest.raises(RuntimeError, match="interrupted before the last layer that attends to an image"):
        model(random_ids(1), **{CACHE: cache})
