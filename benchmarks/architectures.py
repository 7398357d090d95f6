"""Every causal language model of the installed transformers, exact or refused: python -m benchmarks.architectures

Walks the registry, builds each model type tiny and random, and compares a SinkCache with a statement of truth that
needs no reference code: in a model with one layer a token's cached state depends on that token alone, so that its
logits must be those of the same model, without any cache, on the kept tokens alone. Fails if a type is wrong, crashes,
or was exact before; --write records the verdicts and writes docs/architectures.md.
"""

import argparse
import json
import multiprocessing
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
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from attention_sinks import SinkCache, sink_generate
from attention_sinks.cache import SinkLayer
from attention_sinks.compat import cache_name

WINDOW_LENGTH, NUM_SINK_TOKENS = 16, 4
CACHE = cache_name()  # as the installed version of transformers calls it
VOCAB_SIZE = 64
CHUNKS = [1, 7, 1, 12, 3, 1, 9, 5, 1, 8]
SECONDS = 120
LARGEST_MODEL = 100_000_000
RESULTS = Path(__file__).parent / "architectures.json"
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
    "global_head_dim": 16, "rotary_dim": 8, "num_global_key_value_heads": 2, "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB_SIZE, "laurel_rank": 8, "mamba_dt_rank": 8, "lru_width": 64,
    "index_topk": 8, "index_head_dim": 32, "index_n_heads": 32, "indexer_n_heads": 8, "indexer_kv_heads": 1,
    "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 4, "is_decoder": True,
    "H_cycles": 1, "L_cycles": 1,
    "expert_ffn_hidden_size": 32, "zero_expert_num": 2, "attention_window_size": 4096,
}  # fmt: skip
# One layer of full attention, by the names that configs of hybrid models use for it.
ONE_LAYER: dict[str, Any] = {
    "num_hidden_layers": 1, "num_layers": 1, "layer_types": ["full_attention"], "layers_block_type": ["attention"],
    "attn_layer_period": 1, "attn_layer_offset": 0, "full_attention_interval": 1, "attn_layer_indices": [0],
    "no_rope_layers": [1], "hybrid_override_pattern": "*", "full_attn_idxs": [0], "block_types": ["attention"],
}  # fmt: skip
SEVERAL_LAYERS: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_layers": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "attn_layer_indices": [1, 3],
}
# A few of each kind, for a quick look at a version of transformers.
QUICK = (
    "bloom", "cohere2", "deepseek_v3", "falcon_h1", "gemma3_text", "glm4", "gpt_neox", "gptj", "gpt2", "gpt_oss",
    "lfm2", "llama", "mamba2", "mistral", "mixtral", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_next", "smollm3",
)  # fmt: skip
# Modules that mix tokens, and those of them that are attention, by the names of their classes.
MIXERS = r"(Attention|MLA|Mixer|DeltaNet|ShortConv|Mamba2?(Layer)?)$"
ATTENTION = r"(Attention|MLA)$"
# Changes tried one after the other until a model builds and runs; None leaves the default of the config.
VARIANTS: list[dict[str, Any]] = [
    {},
    {"head_dim": None},
    {"num_key_value_heads": 4},
    {"layer_types": ["sliding_attention"]},
    {"layer_types": None},
    {"layer_types": ["hybrid"]},
    {"layer_types": ["hybrid"], "num_experts_per_tok": None, "moe_topk": None},
    {"layer_types": ["indexed_attention"], "num_key_value_heads": 4},
    {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "hybrid"] * 2,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    {"hidden_size": 128, "num_attention_heads": 8, "head_dim": None},
    {"n_routed_experts": None, "num_experts": None, "num_local_experts": None, "n_group": None, "topk_group": None},
    {"num_experts_per_tok": None, "moe_topk": None},
    {"hidden_size": None, "num_attention_heads": None, "num_key_value_heads": None, "head_dim": None},
]


def tiny_models(model_type: str, layers: dict[str, Any]) -> Iterator[Any]:
    """Random models of a type, as small as its config lets them be; yields nothing for a variant that fails."""
    defaults: Any = CONFIG_MAPPING[model_type]()
    text: Any = defaults.get_text_config(decoder=True)
    known = {
        name
        for name in (*text.to_dict(), *text.attribute_map)
        if not isinstance(getattr(type(text), name, None), property)
    }
    tokens: dict[str, Any] = {
        name: [0] if isinstance(value, list) else 0
        for name, value in text.to_dict().items()
        if name.endswith("_token_id") and value is not None
    }
    if getattr(text, "rope_parameters", True) == {}:  # no default; frequencies are set by layer type then
        tokens["rope_parameters"] = {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    for variant in VARIANTS:
        changes = {name: value for name, value in {**SIZES, **layers, **variant}.items() if name in known}
        changes = {name: value for name, value in changes.items() if value is not None}
        try:
            config = type(text)(**changes, **tokens)
            for tower in vars(config).values():
                if isinstance(tower, PreTrainedConfig):  # for images or sound
                    shrink_tower(tower)
            if text is not defaults and type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
                config = type(defaults)(text_config=config)
            model = build(config)
            cache = DynamicCache(config=model.config)
            for chunk in random_ids(6).split([2, 1, 3], dim=1):
                model(chunk, **{CACHE: cache})
        except Exception:  # whatever the code of a model raises on sizes it was not made for
            continue
        yield model


def shrink_tower(config: Any) -> None:
    """Make the part of a model that no text passes small."""
    for name in ("num_hidden_layers", "num_blocks", "depth", "num_global_layers"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, 1)


def build(config: Any) -> Any:
    """A random model whose attention is sharp enough that a wrong position shows; no two weights are equal."""
    with torch.device("meta"):
        size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST_MODEL:
        raise ValueError(f"{size:,} weights are not tiny")
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
def agrees_with_itself(model: Any) -> bool:
    """Whether a model gives through a DynamicCache, in chunks, what it gives without a cache."""
    ids, cache, seen = random_ids(24), DynamicCache(config=model.config), 0
    expected = model(ids, use_cache=False).logits
    for chunk in CHUNKS[:5]:
        positions = torch.arange(seen, seen + chunk)[None]
        logits = model(ids[:, seen : seen + chunk], position_ids=positions, **{CACHE: cache}).logits
        if relative_error(logits, expected[:, seen : seen + chunk]) > 1e-3:
            return False
        seen += chunk
    return True


@torch.no_grad()
def one_layer_error(model: Any) -> float:
    """The worst logit of a stream twice round the ring, by tokens and by chunks, against the kept tokens alone."""
    length = 3 * WINDOW_LENGTH
    ids, worst = random_ids(length), 0.0
    for chunks in ([1] * length, CHUNKS):
        cache, seen = SinkCache(model.config, WINDOW_LENGTH, NUM_SINK_TOKENS), 0
        for chunk in chunks:
            # Given as `generate` gives them: not every model counts on by itself.
            positions = torch.arange(seen, seen + chunk)[None]
            logits = model(ids[:, seen : seen + chunk], position_ids=positions, **{CACHE: cache}).logits
            surplus = max(seen + 1 - WINDOW_LENGTH, 0)
            held = [t for t in range(seen) if not NUM_SINK_TOKENS <= t < NUM_SINK_TOKENS + surplus]
            expected = model(ids[:, held + list(range(seen, seen + chunk))], use_cache=False).logits[:, -chunk:]
            worst = max(worst, relative_error(logits, expected))
            seen += chunk
    return worst


@torch.no_grad()
def isolate(model: Any) -> None:
    """Silence all that mixes tokens but the last attention with a ring, so that each cached state depends on one token.

    Then what is true of one layer is true of this model.
    """
    cache = SinkCache(model.config, WINDOW_LENGTH, NUM_SINK_TOKENS)
    rings = {i for i, layer in enumerate(cache.layers) if isinstance(layer, SinkLayer)}
    mixers = [module for module in model.modules() if re.search(MIXERS, type(module).__name__)]
    inner = {id(child) for module in mixers for child in module.modules() if child is not module}
    mixers = [module for module in mixers if id(module) not in inner]
    attention = [
        m
        for m in mixers
        if re.search(ATTENTION, type(m).__name__) and getattr(m, "layer_idx", None) in {None, -1, *rings}
    ]
    for module in mixers:
        if module is not attention[-1]:
            module.register_forward_hook(_silenced)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv1d):  # causal: the last weight is that of the token itself
            module.weight[..., :-1] = 0
    for name, weight in model.named_parameters():
        if "delayed" in name:  # values of the token before
            weight.zero_()


def _silenced(module: Any, args: Any, output: Any) -> Any:
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


@torch.no_grad()
def several_layers_error(model: Any) -> float:
    """The worst logit below the window against a DynamicCache; beyond it the model must generate and keep to it."""
    ids = random_ids(WINDOW_LENGTH)
    cache, other = SinkCache(model.config, WINDOW_LENGTH, NUM_SINK_TOKENS), DynamicCache(config=model.config)
    worst = 0.0
    positions = torch.arange(WINDOW_LENGTH)[None]
    for chunk, places in zip(*(x.split([5, 1, 1, 4, 1, 1, 3], dim=1) for x in (ids, positions)), strict=True):
        logits, expected = (model(chunk, position_ids=places, **{CACHE: x}).logits for x in (cache, other))
        worst = max(worst, relative_error(logits, expected))
    cache = SinkCache(model.config, WINDOW_LENGTH, NUM_SINK_TOKENS)
    options: dict[str, Any] = {"max_new_tokens": 30, "min_new_tokens": 30, "use_cache": True}
    output = model.generate(ids, **{CACHE: cache}, **options)
    assert output.shape[1] == WINDOW_LENGTH + 30
    assert cache.kept_length == WINDOW_LENGTH
    for layer in cache.layers:
        assert not isinstance(layer, SinkLayer) or layer.get_seq_length() == WINDOW_LENGTH + 29
    options |= {"window_length": WINDOW_LENGTH, "num_sink_tokens": NUM_SINK_TOKENS}
    generated: Any = sink_generate(model, ids, **options)
    assert torch.equal(generated, output), "sink_generate says something else"
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
        row |= {"verdict": "refused", "note": shortened(str(error))}
    except _OutOfTime:
        row |= {"note": f"after {SECONDS} s"}
    except Exception as error:
        row |= {"verdict": "crash", "note": re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:150]}
    finally:
        signal.alarm(0)
    return row


def shortened(reason: str) -> str:
    """What a refusal says after the model type and before the hint."""
    reason = re.sub(r"\s+", " ", reason)
    return re.sub(r"^.*?model type '[^']*': ", "", reason).partition(" If its keys do rotate")[0]


class _OutOfTime(BaseException):
    """Passes every `except Exception`."""


def _out_of_time(*_: object) -> None:
    raise _OutOfTime


def _judge(model_type: str) -> dict[str, Any]:
    try:
        defaults = CONFIG_MAPPING[model_type]()
    except Exception as error:
        return {"note": re.sub(r"\s+", " ", f"its default config fails: {error}")[:150]}
    if defaults.is_encoder_decoder:
        SinkCache(defaults)
    row: dict[str, Any] = {}
    worst, refusal, doubtful = 0.0, None, False
    for layers in (ONE_LAYER, SEVERAL_LAYERS):
        for model in tiny_models(model_type, layers):
            try:
                cache = SinkCache(model.config, WINDOW_LENGTH, NUM_SINK_TOKENS)
            except NotImplementedError as error:
                refusal = refusal or error
                continue
            except ValueError:
                continue  # no layer of this variant attends further back than the window
            if not agrees_with_itself(model):
                doubtful = True
                continue
            if several_layers_error(model) > 1e-4:
                return {"verdict": "wrong", "note": "differs from a DynamicCache below the window"}
            isolate(model)
            worst = max(worst, one_layer_error(model))
            kinds = Counter("ring" if type(x) is SinkLayer else type(x).__name__ for x in cache.layers)
            row = {"verdict": "exact" if worst < 1e-3 else "wrong", "error": f"{worst:.0e}"}
            row["layers"] = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
            row["note"] = "tokens are kept in order" if any(getattr(x, "in_order", False) for x in cache.layers) else ""
            break
    try:
        SinkCache(defaults, WINDOW_LENGTH, NUM_SINK_TOKENS)  # what a user reads; a tiny form may differ
    except (NotImplementedError, ValueError) as error:
        reason = str(error)
        if refusal is not None and "could not be measured" in reason:
            raise refusal from error
        # Not every default config is one that transformers can run.
        if not row or not re.search("could not be measured|no attention layers|not even a DynamicCache", reason):
            raise
        row["note"] = f"but its default config is not: {shortened(reason)[:150]}"
    if refusal is not None and not row:
        raise refusal
    if doubtful and not row:
        row = {"verdict": "unproven", "note": "its logits through a DynamicCache differ from those without a cache"}
    return row


def write_page(results: dict[str, dict[str, dict[str, str]]]) -> None:
    """docs/architectures.md from the rows of every version of transformers that was swept, the newest first."""
    versions = sorted(results, key=_numbers, reverse=True)
    newest = results[versions[0]]
    lines = [
        "# Architectures",
        "",
        "Every causal language model that `transformers` registers, built tiny and random and judged by",
        "`python -m benchmarks.architectures`.",
        "",
        "- *Exact*: through a full cache, twice round its ring, token by token and in chunks, the logits are those of",
        "  the same model without a cache on the kept tokens alone (worst error on the scale of the logits). That is",
        "  so wherever a cached state depends on one token alone: in a model with one layer, and in one with more",
        "  whose other layers are silenced. As it is, a model of each form equals a `DynamicCache` below the window",
        "  and generates past it.",
        "- *Refused*: `SinkCache(config)` raises a `NotImplementedError` with this reason.",
        "- *Unproven*: accepted, but the logits that the model gives through its own `DynamicCache` are not those that",
        "  it gives without a cache, so that nothing can be compared.",
        "",
    ]
    for version in versions:
        counts = Counter(row["verdict"] for row in results[version].values())
        lines.append(f"- transformers {version}: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common()))
    lines += ["", "| model type | " + " | ".join(versions) + " | layers | worst error | note |"]
    lines.append("|---" * (len(versions) + 4) + "|")
    for model_type in sorted({model_type for rows in results.values() for model_type in rows}):
        verdicts = [results[version].get(model_type, {}).get("verdict", "-") for version in versions]
        row = newest.get(model_type) or next(rows[model_type] for rows in results.values() if model_type in rows)
        cells = [model_type, *verdicts, row["layers"], row["error"], row["note"].replace("|", "/")]
        lines.append("| " + " | ".join(cells) + " |")
    PAGE.write_text("\n".join(lines) + "\n")


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types (default: all)")
    parser.add_argument("--quick", action="store_true", help="a few types of each kind")
    parser.add_argument("--write", action="store_true", help="write the table of this version of transformers")
    options = parser.parse_args()
    types = options.types or (QUICK if options.quick else None) or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    rows: dict[str, dict[str, str]] = {}
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=20) as pool:
        for row in pool.imap_unordered(judge, types):
            print(" | ".join(str(value) for value in row.values()), flush=True)
            rows[row.pop("type")] = row

    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    # A version that has not been recorded is compared with the newest that has.
    known = results.get(transformers.__version__) or results[max(results, key=_numbers)]
    failed = [name for name, row in rows.items() if row["verdict"] in ("wrong", "crash")]
    worse = [
        name
        for name, row in rows.items()
        if row["verdict"] != "exact" and known.get(name, {}).get("verdict") == "exact"
    ]
    if options.write:
        before = results.get(transformers.__version__, {})
        results[transformers.__version__] = {**before, **dict(sorted(rows.items()))}
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        write_page(results)
    counts = Counter(row["verdict"] for row in rows.values())
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()))
    if failed or worse:
        sys.exit(f"wrong or crashed: {', '.join(failed) or 'none'}; worse than before: {', '.join(worse) or 'none'}")


if __name__ == "__main__":
    main()
