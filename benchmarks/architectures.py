"""Every causal language model of the installed transformers, exact or refused: python -m benchmarks.architectures

Walks the registry, builds each model type tiny and random, and compares a SinkCache with a statement of truth that
needs no reference code: in a model with one layer a token's cached state depends on that token alone, so that its
logits must be those of the same model, without any cache, on the kept tokens alone. Exits with 1 if any is wrong.
"""

import argparse
import concurrent.futures
import json
import re
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from attention_sinks import SinkCache
from attention_sinks.cache import SinkLayer

WINDOW_LENGTH, NUM_SINK_TOKENS = 16, 4
VOCAB_SIZE = 64
SECONDS = 120
PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"

# Sizes by the names that configs use; a name is applied where a config has it.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "ffn_dim": 64,
    "ffn_hidden_size": 64, "max_position_embeddings": 4096, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2,
    "top_k_experts": 2,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 0, "q_lora_rank": 32,
    "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "qk_head_dim": 32, "v_head_dim": 16,
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_head_dim": 16, "mamba_num_heads": 8, "mamba_d_state": 16,
    "mamba_d_ssm": 128, "mamba_n_groups": 1, "n_groups": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "sliding_window": 4096, "attention_chunk_size": 4096,
    "global_head_dim": 16, "num_global_key_value_heads": 2, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB_SIZE, "laurel_rank": 8, "mamba_dt_rank": 8, "lru_width": 64,
}  # fmt: skip
# One layer of full attention, by the names that configs of hybrid models use for it.
ONE_LAYER: dict[str, Any] = {
    "num_hidden_layers": 1, "layer_types": ["full_attention"], "layers_block_type": ["attention"],
    "attn_layer_period": 1, "attn_layer_offset": 0, "full_attention_interval": 1, "attn_layer_indices": [0],
    "no_rope_layers": [1], "hybrid_override_pattern": "*", "full_attn_idxs": [0],
}  # fmt: skip
SEVERAL_LAYERS: dict[str, Any] = {"num_hidden_layers": 4}
# Changes tried one after the other until a model builds and runs; None leaves the default of the config.
VARIANTS: list[dict[str, Any]] = [
    {},
    {"head_dim": None},
    {"num_key_value_heads": 4},
    {"layer_types": ["sliding_attention"]},
    {"layer_types": None},
    {"layer_types": ["hybrid"]},
    {"hidden_size": 128, "num_attention_heads": 8, "head_dim": None},
    {"n_routed_experts": None, "num_experts": None, "num_local_experts": None, "n_group": None, "topk_group": None},
    {"num_experts_per_tok": None, "moe_topk": None},
    {"hidden_size": None, "num_attention_heads": None, "num_key_value_heads": None, "head_dim": None},
    dict.fromkeys(SIZES),
]


def tiny_models(model_type: str, layers: dict[str, Any]) -> Iterator[Any]:
    """Random models of a type, as small as its config lets them be; yields nothing for a variant that fails."""
    defaults: Any = CONFIG_MAPPING[model_type]()
    text: Any = defaults.get_text_config(decoder=True)
    known = {*text.to_dict(), *text.attribute_map}
    tokens = {
        name: [0] if isinstance(value, list) else 0
        for name, value in text.to_dict().items()
        if name.endswith("_token_id") and value is not None
    }
    for variant in VARIANTS:
        changes = {name: value for name, value in {**SIZES, **layers, **variant}.items() if name in known}
        changes = {name: value for name, value in changes.items() if value is not None}
        try:
            config = type(text)(**changes, **tokens)
            if text is not defaults and type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
                config = type(defaults)(text_config=config)
            model = build(config)
            model(random_ids(3))
        except Exception:  # whatever the code of a model raises on sizes it was not made for
            continue
        yield model


def build(config: Any) -> Any:
    """A random model whose attention is sharp enough that a wrong position shows; no two weights are equal."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4) if weight.ndim > 1 else weight.add_(torch.randn_like(weight) * 0.2)
    return model.eval()


def random_ids(length: int) -> Tensor:
    """Token ids `[1, length]`."""
    return torch.randint(1, VOCAB_SIZE, (1, length), generator=torch.Generator().manual_seed(0))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest error on the scale of the expected logits; NaN counts as infinite."""
    error = float((actual - expected).abs().max() / expected.abs().max())
    return error if error == error else float("inf")


@torch.no_grad()
def one_layer_error(model: Any) -> float:
    """The worst logit of a stream twice round the ring, by tokens and by chunks, against the kept tokens alone."""
    length = 3 * WINDOW_LENGTH
    ids, worst = random_ids(length), 0.0
    for chunks in ([1] * length, [1, 7, 1, 12, 3, 1, 9, 5, 1, 8]):
        cache, seen = SinkCache(model.config, WINDOW_LENGTH, NUM_SINK_TOKENS), 0
        for chunk in chunks:
            logits = model(ids[:, seen : seen + chunk], past_key_values=cache).logits
            surplus = max(seen + 1 - WINDOW_LENGTH, 0)
            held = [t for t in range(seen) if not NUM_SINK_TOKENS <= t < NUM_SINK_TOKENS + surplus]
            expected = model(ids[:, held + list(range(seen, seen + chunk))], use_cache=False).logits[:, -chunk:]
            worst = max(worst, relative_error(logits, expected))
            seen += chunk
    return worst


@torch.no_grad()
def several_layers_error(model: Any) -> float:
    """The worst logit below the window against a DynamicCache; beyond it the model must generate and keep to it."""
    ids = random_ids(WINDOW_LENGTH)
    cache, other = SinkCache(model.config, WINDOW_LENGTH, NUM_SINK_TOKENS), DynamicCache(config=model.config)
    worst = 0.0
    for chunk in ids.split([5, 1, 1, 4, 1, 1, 3], dim=1):
        logits, expected = (model(chunk, past_key_values=each).logits for each in (cache, other))
        worst = max(worst, relative_error(logits, expected))
    cache = SinkCache(model.config, WINDOW_LENGTH, NUM_SINK_TOKENS)
    output = model.generate(ids, past_key_values=cache, max_new_tokens=30, min_new_tokens=30, use_cache=True)
    assert output.shape[1] == WINDOW_LENGTH + 30
    assert cache.kept_length == WINDOW_LENGTH
    for layer in cache.layers:
        assert not isinstance(layer, SinkLayer) or layer.get_seq_length() == WINDOW_LENGTH + 29
    return worst


def judge(model_type: str) -> dict[str, Any]:
    """One row of the table."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.alarm(SECONDS)
    row: dict[str, Any] = {"type": model_type, "verdict": "cannot be built tiny", "layers": "", "error": "", "note": ""}
    try:
        row |= _judge(model_type)
    except NotImplementedError as error:
        reason = re.sub(r"\s+", " ", str(error)).partition(f"{_quoted(error)}: ")[2] or str(error)
        row |= {"verdict": "refused", "note": reason.partition(" If its keys do turn")[0]}
    except TimeoutError:
        row |= {"note": f"after {SECONDS} s"}
    except Exception as error:
        row |= {"verdict": "crash", "note": re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:150]}
    finally:
        signal.alarm(0)
    return row


def _quoted(error: Exception) -> str:
    found = re.search(r"model type ('[^']*')", str(error))
    return found[1] if found else "'"


def _out_of_time(*_: object) -> None:
    raise TimeoutError


def _judge(model_type: str) -> dict[str, Any]:
    defaults = CONFIG_MAPPING[model_type]()
    if defaults.is_encoder_decoder:
        SinkCache(defaults)
    refusal: NotImplementedError | None = None
    for model in tiny_models(model_type, ONE_LAYER):
        try:
            cache = SinkCache(model.config, WINDOW_LENGTH, NUM_SINK_TOKENS)
        except NotImplementedError as error:
            refusal = refusal or error
            continue
        except ValueError:
            continue  # no layer of this variant attends further back than the window
        if not isinstance(cache.layers[0], SinkLayer):
            continue
        worst = one_layer_error(model)
        break
    else:
        if refusal is not None:
            raise refusal
        SinkCache(defaults)  # may know a reason
        return {}
    row = {"verdict": "exact" if worst < 1e-3 else "wrong", "error": f"{worst:.0e}"}
    row["note"] = "in order" if cache.layers[0].in_order else ""
    for model in tiny_models(model_type, SEVERAL_LAYERS):
        cache = SinkCache(model.config, WINDOW_LENGTH, NUM_SINK_TOKENS)
        kinds = Counter("ring" if isinstance(x, SinkLayer) else type(x).__name__ for x in cache.layers)
        row["layers"] = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        if several_layers_error(model) > 1e-4:
            row |= {"verdict": "wrong", "note": "differs from DynamicCache below the window"}
        break
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types (default: all)")
    parser.add_argument("--json", type=Path, help="write the rows to a file")
    options = parser.parse_args()
    types = options.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    with concurrent.futures.ProcessPoolExecutor(max_workers=2, max_tasks_per_child=20) as pool:
        rows = []
        for row in pool.map(judge, types):
            rows.append(row)
            print(" | ".join(str(value) for value in row.values()), flush=True)
    print(Counter(row["verdict"] for row in rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    sys.exit(any(row["verdict"] in ("wrong", "crash") for row in rows))


if __name__ == "__main__":
    main()
