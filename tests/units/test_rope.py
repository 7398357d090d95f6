import copy
import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    FalconConfig,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    HunYuanDenseV1Config,
    Llama4TextConfig,
    LlamaConfig,
    Ministral3Config,
    MptConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
)

from attention_sinks import Rotation

from ..support.inside import LAST_POSITION, derive_positions
from ..support.models import ARCHITECTURES, build_config


def real_rotation(config: PreTrainedConfig, key_states: torch.Tensor, position: int) -> torch.Tensor:
    """Rotate a key `[1, 1, 1, head_dim]` to `position` by the module of the model, if that rotates whole keys."""
    module = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    embedding = next(v for k, v in vars(module).items() if k.endswith("RotaryEmbedding"))(config)
    cos, sin = embedding(key_states, torch.tensor([[position]]))
    _, rotated = module.apply_rotary_pos_emb(key_states, key_states, cos, sin)
    assert isinstance(rotated, torch.Tensor)
    return rotated


# Their modules rotate whole keys with a function of the usual form.
WHOLE_KEYS = [name for name in ARCHITECTURES if name not in ("phi", "gptj", "deepseek_v3", "mpt")]


@pytest.mark.parametrize("architecture", WHOLE_KEYS)
@pytest.mark.parametrize("head_dim", [16, 128])
def test_a_rotation_equals_that_of_the_module_of_the_model(architecture: str, head_dim: int) -> None:
    config = build_config(architecture, num_hidden_layers=1, hidden_size=4 * head_dim, head_dim=head_dim)
    (rotation,) = derive_positions(config, [0]).rotations.values()
    assert rotation is not None
    key = torch.randn(1, 1, 1, head_dim, generator=torch.Generator().manual_seed(0))
    born = real_rotation(config, key, 3)
    for shift in (0, 1, 5, 300):
        torch.testing.assert_close(
            rotation.rotate(born, shift), real_rotation(config, key, 3 + shift), rtol=0, atol=1e-4
        )


def test_frequencies_are_bitwise_equal_to_those_of_a_full_size_model() -> None:
    """The measured twin has one head and narrow layers, which must not change the frequencies."""
    config = LlamaConfig(
        hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=2,
        max_position_embeddings=131072, rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    )  # fmt: skip
    module = importlib.import_module("transformers.models.llama.modeling_llama")
    expected = module.LlamaRotaryEmbedding(config).inv_freq.double()
    rotations = derive_positions(config, [0, 1]).rotations
    for rotation in rotations.values():
        assert rotation is not None
        assert torch.equal(rotation.inv_freq, expected)
    assert rotations[0] is rotations[1], "layers with the same rotation share it"


def test_partial_rotation_and_pairing_are_measured() -> None:
    (half,) = derive_positions(build_config("phi", num_hidden_layers=1), [0]).rotations.values()
    (neighbours,) = derive_positions(build_config("cohere", num_hidden_layers=1), [0]).rotations.values()
    assert half is not None
    assert (half.start, half.rotary_dim, half.interleaved) == (0, 8, False)
    assert neighbours is not None
    assert (neighbours.start, neighbours.rotary_dim, neighbours.interleaved) == (0, 16, True)


def test_layers_without_position_have_no_rotation() -> None:
    rotations = derive_positions(build_config("smollm3", num_hidden_layers=8), range(8)).rotations
    assert [rotation is None for rotation in rotations.values()] == [False, False, False, True] * 2


@given(
    num_pairs=st.integers(1, 8), tail=st.integers(0, 5), start=st.integers(0, 3), interleaved=st.booleans(),
    shifts=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), seed=st.integers(0, 99),
)  # fmt: skip
def test_rotations_add_up_and_keep_norms(
    num_pairs: int, tail: int, start: int, interleaved: bool, shifts: tuple[int, int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rotation = Rotation(torch.rand(num_pairs, generator=generator), start, interleaved)
    keys = torch.randn(2, 3, start + 2 * num_pairs + tail, generator=generator, dtype=torch.float64)
    rotated = rotation.rotate(keys, sum(shifts))
    torch.testing.assert_close(rotation.rotate(rotation.rotate(keys, shifts[0]), shifts[1]), rotated)
    torch.testing.assert_close(rotated.norm(dim=-1), keys.norm(dim=-1))
    still = [*range(start), *range(start + 2 * num_pairs, keys.shape[-1])]
    assert torch.equal(rotated[..., still], keys[..., still])


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GPT2Config(n_layer=2), "absolute positions"),
        (OPTConfig(num_hidden_layers=2), "absolute positions"),
        (BertConfig(num_hidden_layers=2, is_decoder=True), "absolute positions"),
        (FalconConfig(num_hidden_layers=2, alibi=True), "needs a key for every token seen"),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else "",
)  # fmt: skip
def test_an_unsupported_model_is_refused_with_the_reason(config: PreTrainedConfig, reason: str) -> None:
    with pytest.raises(NotImplementedError, match=f"(?s){config.model_type!r}.*({reason})"):
        derive_positions(config, range(2))


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (LlamaConfig(num_hidden_layers=2), LAST_POSITION),
        (GPTJConfig(n_layer=2, n_embd=64, n_head=4, rotary_dim=8, n_positions=300), 300),
        (LlamaConfig(num_hidden_layers=2, max_position_embeddings=300,
                     rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), 300),
        (Phi3Config(num_hidden_layers=2, max_position_embeddings=1024, original_max_position_embeddings=256,
                    rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48,
                                     "long_factor": [2.0] * 48, "original_max_position_embeddings": 256}), 256),
        (Ministral3Config(num_hidden_layers=2, rope_parameters={
            "rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 5000}), 5000),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else "",
)  # fmt: skip
def test_the_position_limit_is_the_first_position_where_the_model_changes(config: PreTrainedConfig, limit: int) -> None:
    """A table of positions ends, frequencies depend on the length, or queries are scaled by their position."""
    assert derive_positions(config, [0]).limit == limit


def test_queries_scaled_by_the_number_of_tokens_limit_positions() -> None:
    """Llama 4 scales queries from token 8,191 on; neither keys nor `position_ids` show it."""
    positions = derive_positions(Llama4TextConfig(num_hidden_layers=4, floor_scale=2000), [3])
    assert positions.rotations == {3: None}
    assert 2000 - 6 <= positions.limit < 2000  # the measured sequence has six tokens


def test_attention_biased_by_distance_needs_keys_in_order() -> None:
    assert derive_positions(MptConfig(n_layers=2), [0, 1]).needs_temporal_order
    assert not derive_positions(build_config("llama", num_hidden_layers=2), [0, 1]).needs_temporal_order


def test_layer_types_with_similar_frequencies_are_told_apart() -> None:
    full, sliding = "full_attention", "sliding_attention"
    config = Gemma3TextConfig(
        hidden_size=64, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32, head_dim=64, vocab_size=97,
        num_hidden_layers=2, max_position_embeddings=64, sliding_window=64, layer_types=[full, sliding],
        rope_parameters={
            full: {
                "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 131072,
            },
            sliding: {"rope_type": "default", "rope_theta": 5e5},
        },
    )  # fmt: skip
    rotations = derive_positions(config, [0, 1]).rotations
    module = importlib.import_module("transformers.models.gemma3.modeling_gemma3")
    embedding = module.Gemma3RotaryEmbedding(config)
    for layer, layer_type in enumerate((full, sliding)):
        rotation = rotations[layer]
        assert rotation is not None
        assert torch.equal(rotation.inv_freq, getattr(embedding, f"{layer_type}_inv_freq").double())


def test_latent_attention_rotates_what_it_caches_as_values() -> None:
    config = build_config("deepseek_v3", num_hidden_layers=1)
    rotation = derive_positions(config, [0]).rotations[0]
    assert rotation is not None
    assert (rotation.in_values, rotation.start) in (
        (True, 0),
        (False, config.qk_nope_head_dim),
    )  # in transformers 5.23, in 5.4
    assert rotation.rotary_dim == config.qk_rope_head_dim


def test_a_model_that_normalizes_keys_after_their_rotation_is_refused() -> None:
    """With trained weights the norm does not commute with a rotation; with equal weights of a new model it does."""
    config = HunYuanDenseV1Config(num_hidden_layers=1, head_dim=128)
    with pytest.raises(NotImplementedError, match="depends on absolute positions"):
        derive_positions(config, [0])


def test_unregistered_configs_are_refused() -> None:
    class OwnConfig(PreTrainedConfig):
        model_type = "own"

    with pytest.raises(NotImplementedError, match="'own'.*could not be measured"):
        derive_positions(OwnConfig(), [0])


def test_deriving_positions_does_not_change_the_state_of_the_caller() -> None:
    config = build_config("llama", num_hidden_layers=1, rope_parameters={"rope_type": "default", "rope_theta": 777.0})
    before, state = copy.deepcopy(config), torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        (rotation,) = derive_positions(config, [0]).rotations.values()
    assert rotation is not None
    assert rotation.inv_freq.device.type == "cpu"
    assert not rotation.inv_freq.is_inference()
    assert torch.equal(torch.get_rng_state(), state)
    assert config.to_dict() == before.to_dict()


def test_a_model_that_amplifies_rounding_has_no_position_limit() -> None:
    assert derive_positions(Gemma3nTextConfig(), range(4)).limit == LAST_POSITION
