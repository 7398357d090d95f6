import copy
import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    BloomConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MptConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
)

from attention_sinks.rope import Rotation, derive_rotations

from .models import ARCHITECTURES, build_config


def real_rotation(config: PreTrainedConfig, key_states: torch.Tensor, position: int) -> torch.Tensor:
    """What the model's own module does to a key `[1, 1, 1, head_dim]` at `position`, where it rotates all of it."""
    module = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    embedding = next(v for k, v in vars(module).items() if k.endswith("RotaryEmbedding"))(config)
    cos, sin = embedding(key_states, torch.tensor([[position]]))
    _, rotated = module.apply_rotary_pos_emb(key_states, key_states, cos, sin)
    assert isinstance(rotated, torch.Tensor)
    return rotated


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "phi"])  # phi rotates a part
@pytest.mark.parametrize("head_dim", [16, 128])
def test_turning_equals_the_rotation_of_the_models_own_module(architecture: str, head_dim: int) -> None:
    config = build_config(architecture, num_hidden_layers=1, hidden_size=4 * head_dim, head_dim=head_dim)
    (rotation,) = derive_rotations(config, [0]).values()
    assert rotation is not None
    key = torch.randn(1, 1, 1, head_dim, generator=torch.Generator().manual_seed(0))
    born = real_rotation(config, key, 3)
    for shift in (0, 1, 5, 300):
        torch.testing.assert_close(
            rotation.turned(born, shift), real_rotation(config, key, 3 + shift), rtol=0, atol=1e-4
        )


def test_frequencies_are_bitwise_those_of_a_full_size_model() -> None:
    """The twin has one head and narrow layers; none of that may reach the frequencies."""
    config = LlamaConfig(
        hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=2,
        max_position_embeddings=131072, rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    )  # fmt: skip
    module = importlib.import_module("transformers.models.llama.modeling_llama")
    expected = module.LlamaRotaryEmbedding(config).inv_freq.double()
    rotations = derive_rotations(config, [0, 1])
    for rotation in rotations.values():
        assert rotation is not None
        assert torch.equal(rotation.inv_freq, expected)
    assert rotations[0] is rotations[1], "layers with the same rotation share it"


def test_partial_rotation_and_pairing_are_measured() -> None:
    (half,) = derive_rotations(build_config("phi", num_hidden_layers=1), [0]).values()
    (neighbours,) = derive_rotations(build_config("cohere", num_hidden_layers=1), [0]).values()
    assert half is not None
    assert (half.start, half.rotary_dim, half.interleaved) == (0, 8, False)
    assert neighbours is not None
    assert (neighbours.start, neighbours.rotary_dim, neighbours.interleaved) == (0, 16, True)


def test_layers_without_position_have_no_rotation() -> None:
    rotations = derive_rotations(build_config("smollm3", num_hidden_layers=8), range(8))
    assert [rotation is None for rotation in rotations.values()] == [False, False, False, True] * 2


@given(
    num_pairs=st.integers(1, 8), tail=st.integers(0, 5), start=st.integers(0, 3), interleaved=st.booleans(),
    shifts=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), seed=st.integers(0, 99),
)  # fmt: skip
def test_turns_add_up_and_keep_lengths(
    num_pairs: int, tail: int, start: int, interleaved: bool, shifts: tuple[int, int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rotation = Rotation(torch.rand(num_pairs, generator=generator), start, interleaved)
    keys = torch.randn(2, 3, start + 2 * num_pairs + tail, generator=generator, dtype=torch.float64)
    turned = rotation.turned(keys, sum(shifts))
    torch.testing.assert_close(rotation.turned(rotation.turned(keys, shifts[0]), shifts[1]), turned)
    torch.testing.assert_close(turned.norm(dim=-1), keys.norm(dim=-1))
    still = [*range(start), *range(start + 2 * num_pairs, keys.shape[-1])]
    assert torch.equal(turned[..., still], keys[..., still])


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GPT2Config(n_layer=2), "absolute position"),
        (OPTConfig(num_hidden_layers=2), "absolute position"),
        (BertConfig(num_hidden_layers=2, is_decoder=True), "absolute position"),
        (BloomConfig(n_layer=2), "ALiBi|positions are limited"),
        (MptConfig(n_layers=2), "ALiBi"),
        (GPTJConfig(n_layer=2), "positions are limited"),
        (LlamaConfig(num_hidden_layers=2, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
         "depend on the length"),
        (Phi3Config(num_hidden_layers=2, max_position_embeddings=8192, original_max_position_embeddings=4096,
                    rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48,
                                     "long_factor": [2.0] * 48, "original_max_position_embeddings": 4096}),
         "depend on the length"),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else "",
)  # fmt: skip
def test_what_is_not_understood_is_refused_with_its_reason(config: PreTrainedConfig, reason: str) -> None:
    with pytest.raises(NotImplementedError, match=f"(?s){config.model_type!r}.*({reason})"):
        derive_rotations(config, range(2))


@pytest.mark.parametrize(("model_type", "changes"), [("Llama4Text", {}), ("Ministral3", {})])
def test_attention_that_depends_on_absolute_positions_is_refused(model_type: str, changes: dict[str, int]) -> None:
    """Their queries are scaled by the position or by the length of the cache, which the keys do not show."""
    transformers = importlib.import_module("transformers")
    config = getattr(transformers, f"{model_type}Config")(num_hidden_layers=4)
    with pytest.raises(NotImplementedError, match=r"absolute positions, not on distances"):
        derive_rotations(config, range(4))


def test_keys_that_are_normed_after_their_rotation_are_refused() -> None:
    """With trained, unequal weights such a norm does not commute with a rotation; a fresh model would hide that."""
    transformers = importlib.import_module("transformers")
    config = transformers.HunYuanDenseV1Config(num_hidden_layers=1, head_dim=128)
    with pytest.raises(NotImplementedError, match="do not turn by a rotary|absolute positions"):
        derive_rotations(config, [0])


def test_unregistered_configs_are_refused() -> None:
    class OwnConfig(PreTrainedConfig):
        model_type = "own"

    with pytest.raises(NotImplementedError, match="'own'.*could not be measured"):
        derive_rotations(OwnConfig(), [0])


def test_deriving_leaves_the_callers_state_alone() -> None:
    config = build_config("llama", num_hidden_layers=1, rope_parameters={"rope_type": "default", "rope_theta": 777.0})
    before, state = copy.deepcopy(config), torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        (rotation,) = derive_rotations(config, [0]).values()
    assert rotation is not None
    assert rotation.inv_freq.device.type == "cpu"
    assert not rotation.inv_freq.is_inference()
    assert torch.equal(torch.get_rng_state(), state)
    assert config.to_dict() == before.to_dict()
