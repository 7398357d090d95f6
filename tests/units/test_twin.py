"""Laws of the twin: small, always the same, positions as in the model itself, and without a trace in the caller."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BigBirdConfig,
    ChameleonConfig,
    CsmConfig,
    DeepseekV3Config,
    DiffLlamaConfig,
    Ernie4_5_VLMoeTextConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MixtralConfig,
    MptConfig,
    OpenAIGPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    ReformerConfig,
    RoFormerConfig,
    RwkvConfig,
    XLNetConfig,
)

from ..support.inside import (
    RESIZES,
    LostCache,
    OwnRandomness,
    Twin,
    build_twin,
    derive_positions,
    isolated,
    shrink,
    twin_module,
)
from ..support.versions import HAS_LATER_MODELS

# The shapes of models that fill a machine.
LLAMA_70B = LlamaConfig(
    hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8, num_hidden_layers=80,
    vocab_size=128256, max_position_embeddings=131072,
)  # fmt: skip
MIXTRAL = MixtralConfig(
    hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=32,
    num_local_experts=8,
)  # fmt: skip
BIG = [LLAMA_70B, MIXTRAL, DeepseekV3Config()]
FEW_LAYERS = [
    LlamaConfig(num_hidden_layers=2),
    DiffLlamaConfig(num_hidden_layers=2),
    GPTJConfig(n_layer=2),
    MptConfig(n_layers=2),
    DeepseekV3Config(num_hidden_layers=2),
    GPT2Config(n_layer=2),
    BigBirdConfig(num_hidden_layers=2, is_decoder=True),
]


def name_of(config: Any) -> str:
    return config.model_type if isinstance(config, PreTrainedConfig) else ""


def smallest_twin(config: PreTrainedConfig, every_layer: bool = False) -> Twin:
    with isolated():
        # The heads of DiffLlama come in pairs.
        return build_twin(config, RESIZES[1] if config.model_type == "diffllama" else RESIZES[0], every_layer)


@pytest.mark.parametrize("config", FEW_LAYERS, ids=name_of)
def test_the_same_config_gives_bitwise_the_same_weights(config: PreTrainedConfig) -> None:
    torch.manual_seed(1)
    once = smallest_twin(config).model.state_dict()
    torch.manual_seed(2)
    again = smallest_twin(config).model.state_dict()
    assert once.keys() == again.keys()
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("config", FEW_LAYERS, ids=name_of)
@pytest.mark.parametrize(("dtype", "device"), [(torch.float32, "cpu"), (torch.float64, "meta")])
def test_measuring_leaves_no_trace(config: PreTrainedConfig, dtype: torch.dtype, device: str) -> None:
    config = type(config)(**{**config.to_dict(), "bos_token_id": dtype.itemsize})  # measured anew
    settings, state = config.to_dict(), torch.get_rng_state()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        try:
            derive_positions(config, range(2))
        except NotImplementedError:
            assert config.model_type in ("gpt2", "big_bird")
        assert torch.get_default_dtype() == dtype
        assert torch.get_default_device().type == device
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert config.to_dict() == settings


DRAWS: dict[str, Callable[[], Any]] = {
    "rand": lambda: torch.rand(3),
    "randn": lambda: torch.randn(3),
    "randint": lambda: torch.randint(0, 9, (3,)),
    "randperm": lambda: torch.randperm(9),
    "rand_like": lambda: torch.rand_like(torch.ones(3)),
    "randn_like": lambda: torch.randn_like(torch.ones(3), dtype=torch.float64),
    "randint_like": lambda: torch.randint_like(torch.ones(3), 2, 9),
    "normal": lambda: torch.normal(0, 1.0, size=(3,)),
    "normal of tensors": lambda: torch.normal(torch.zeros(3), torch.ones(3)),
    "normal_": lambda: torch.zeros(3).normal_(),
    "uniform_": lambda: torch.zeros(3).uniform_(),
    "exponential_": lambda: torch.zeros(3).exponential_(),
    "bernoulli": lambda: torch.bernoulli(torch.full((9,), 0.5)),
    "trunc_normal_": lambda: nn.init.trunc_normal_(torch.empty(3)),
    "orthogonal_": lambda: nn.init.orthogonal_(torch.empty(3, 3)),
    "Linear": lambda: nn.Linear(3, 3).weight.detach(),
    "Embedding": lambda: nn.Embedding(3, 3).weight.detach(),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_own_randomness_never_draws_from_the_global_generator(draw: Callable[[], Tensor], device: str) -> None:
    state = torch.get_rng_state()
    drawn = []
    for _ in range(2):
        with OwnRandomness(), torch.device(device):
            drawn.append(draw())
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn[0].is_meta or torch.equal(*drawn)


def test_weights_that_learn_can_be_left_undrawn() -> None:
    learns, fixed = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3), requires_grad=False)
    table = torch.ones(3)
    with OwnRandomness(draws_weights=False):
        for weight in (learns, fixed, table):
            nn.init.normal_(weight)
    assert torch.equal(learns, torch.ones(3))
    assert not torch.equal(fixed, torch.ones(3))
    assert not torch.equal(table, torch.ones(3))


def test_a_table_of_fixed_weights_is_that_of_the_model() -> None:
    model: Any = smallest_twin(RoFormerConfig(num_hidden_layers=2, is_decoder=True)).model
    sines, cosines = model.roformer.encoder.embed_positions.weight[0].chunk(2)
    assert torch.equal(sines, torch.zeros_like(sines))
    assert torch.equal(cosines, torch.ones_like(cosines))


def test_a_generator_that_is_given_is_used() -> None:
    with OwnRandomness():
        drawn = torch.rand(3, generator=torch.Generator().manual_seed(7))
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(7)))


@pytest.mark.parametrize("config", BIG, ids=name_of)
def test_a_twin_of_a_big_model_is_small(config: PreTrainedConfig) -> None:
    for every_layer, layers in [(False, 1), (True, config.num_hidden_layers)]:
        weights = sum(weight.numel() for weight in smallest_twin(config, every_layer).model.parameters())
        assert weights < 2_000_000 * layers
        assert weights < twin_module.MAX_TWIN_WEIGHTS


def test_a_twin_that_cannot_be_small_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin_module, "MAX_TWIN_WEIGHTS", 1000)
    with isolated(), pytest.raises(ValueError, match="the twin would have .* million weights"):
        build_twin(LlamaConfig(num_hidden_layers=1), RESIZES[0])


KEPT: list[tuple[PreTrainedConfig, list[str]]] = [
    (LLAMA_70B, ["rope_parameters", "max_position_embeddings", "num_hidden_layers", "head_dim"]),
    (DeepseekV3Config(), ["rope_parameters", "qk_rope_head_dim", "qk_nope_head_dim", "kv_lora_rank", "v_head_dim"]),
    (Gemma3TextConfig(), ["rope_parameters", "layer_types", "sliding_window", "head_dim", "query_pre_attn_scalar"]),
    (PhiConfig(), ["rope_parameters"]),
    (GPTJConfig(), ["rotary_dim", "n_positions"]),
    (Phi3Config(), ["rope_parameters", "original_max_position_embeddings", "sliding_window"]),
    (MptConfig(), ["attn_config", "max_seq_len"]),
]


@pytest.mark.parametrize(("config", "names"), KEPT, ids=name_of)
@pytest.mark.parametrize("resize", RESIZES[:3])
def test_shrinking_keeps_what_positions_depend_on(config: Any, names: list[str], resize: Any) -> None:
    settings = config.to_dict()
    small: Any = resize(shrink(config))
    for name in names:
        assert small.to_dict()[name] == settings[name], name
    width = small.hidden_size // small.num_attention_heads
    assert getattr(small, "head_dim", None) or width == config.hidden_size // config.num_attention_heads
    assert small.hidden_size < config.hidden_size
    assert small.vocab_size == 8
    assert config.to_dict() == settings, "the config of the caller is left alone"


def test_sizes_of_0_are_kept_since_they_stand_for_no_part() -> None:
    sizes: dict[str, Any] = {"shared_expert_intermediate_size": 0, "moe_intermediate_size": 1408}
    small: Any = shrink(MixtralConfig(**sizes))
    assert (small.shared_expert_intermediate_size, small.moe_intermediate_size) == (0, 32)
    assert (small.num_local_experts, small.num_experts_per_tok) == (4, 2)


def test_tokens_of_images_are_left_out_since_a_twin_reads_text() -> None:
    for vocabulary in (None, {"<image>": 9000, "IMGIMGA": 4}):
        assert derive_positions(ChameleonConfig(vocabulary_map=vocabulary, num_hidden_layers=1), [0]).rotations


def test_frequencies_may_be_kept_in_another_order_than_that_of_their_use() -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 6, 4]}
    config = Ernie4_5_VLMoeTextConfig(**sizes, rope_parameters=rope, moe_num_experts=2, mlp_layer_types=["dense"])
    rotation = derive_positions(config, [0]).rotations[0]
    assert rotation is not None
    assert torch.equal(rotation.inv_freq, rotation.inv_freq.sort(descending=True).values)


@pytest.mark.skipif(not HAS_LATER_MODELS, reason="CSM of early transformers 5 cannot be built from its default config")
def test_a_model_of_codebooks_is_refused_at_once() -> None:
    with pytest.raises(NotImplementedError, match="more than one id"):
        derive_positions(CsmConfig(), [0])


def test_layers_keep_their_own_sizes_as_lists() -> None:
    sizes: dict[str, Any] = {"ffn_dim": [64, 128, 256], "eos_token_id": [7, 8]}
    small: Any = shrink(LlamaConfig(num_hidden_layers=3, **sizes))
    assert small.ffn_dim == [32] * 3
    assert small.eos_token_id == [0, 0]


def test_a_lost_cache_reports_more_tokens_than_it_holds() -> None:
    cache: Any = LostCache(LlamaConfig(num_hidden_layers=1), num_lost=100)
    cache.update(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4), 0)
    assert cache.get_seq_length() == 103
    assert cache.get_mask_sizes(1, 0) == (4, 100)
    assert cache.layers[0].get_seq_length() == 3


@torch.no_grad()
def test_runs_of_a_twin_depend_on_the_position_alone() -> None:
    twin = smallest_twin(LlamaConfig(num_hidden_layers=2), every_layer=True)
    states = twin.states_at([0, 5, 5])
    assert states.keys() == {0, 1}
    for keys, values in states.values():
        assert keys.shape == values.shape == (3, 1, 1, 128)
        assert torch.equal(keys[1], keys[2])
        assert not torch.allclose(keys[0], keys[1])
        torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(twin.logits_at(0), twin.logits_at(900), rtol=0, atol=1e-4)
    torch.testing.assert_close(twin.logits_at(0), twin.logits_at(0, num_lost=900), rtol=0, atol=1e-4)
    torch.testing.assert_close(twin.logits_at(0), twin.logits_at(0, reverse=True), rtol=0, atol=1e-4)


def test_a_copy_shares_the_weights_but_not_the_buffers() -> None:
    twin = smallest_twin(LlamaConfig(num_hidden_layers=1))
    copied = twin.copied()
    for weight, same in zip(twin.model.parameters(), copied.model.parameters(), strict=True):
        assert weight is same
    for buffer, other in zip(twin.model.buffers(), copied.model.buffers(), strict=True):
        assert buffer is not other
        assert torch.equal(buffer, other)


@pytest.mark.parametrize(
    "config", [ReformerConfig(), XLNetConfig(n_layer=2), RwkvConfig(), OpenAIGPTConfig(n_layer=2)], ids=name_of
)
def test_a_model_without_a_kv_cache_is_refused_for_that_reason(config: PreTrainedConfig) -> None:
    with pytest.raises(NotImplementedError, match=f"{config.model_type!r}: .*it takes no KV cache") as raised:
        derive_positions(config, range(2))
    assert "works differently" not in str(raised.value)
