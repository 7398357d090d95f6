"""Test a SinkCache with every causal language model of transformers: python -m benchmarks.architectures

For each registered model type, build a tiny random model and compare its logits with those of the same model without a
cache on the kept tokens. The two are equal if the model has one layer, because then the cached state of a token depends
on that token alone. The script fails if a type is wrong, crashes, or was exact before.
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
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, DynamicCache, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from attention_sinks import SinkCache, sink_generate
from attention_sinks.compat import cache_name
from attention_sinks.grids import rope_index_of
from attention_sinks.storage.layers import SinkLayer

from .multimodal import NUM_SINK_TOKENS, WINDOW_LENGTH, media_error, shrink_tower, with_text_config

Results = dict[str, dict[str, dict[str, str]]]  # by version of transformers and model type
CACHE = cache_name()  # name of the cache argument in the installed version of transformers
VOCAB_SIZE = 64
CHUNKS = [1, 7, 1, 12, 3, 1, 9, 5, 1, 8]
SECONDS = 120
LARGEST_MODEL = 100_000_000
RESULTS = Path(__file__).parent / "architectures.json"
MULTIMODAL_RESULTS = Path(__file__).parent / "multimodal.json"
PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
INTRODUCTION = """# Architectures

This page lists every causal language model that `transformers` registers. `python -m benchmarks.architectures` builds a
tiny random model of each type, tests it with a `SinkCache`, and records one of these verdicts:

- *exact*: the logits equal those of the same model without a cache on the kept tokens alone. The test reads three
  windows of tokens, one by one and in chunks. Only one attention layer is active in it, so that each cached state
  depends on one token. With all layers active, the model must equal a `DynamicCache` below the window and generate past
  it.
- *refused*: `SinkCache(config)` raises a `NotImplementedError`. The note gives its reason.
- *unproven*: `SinkCache(config)` accepts the model, but nothing can be compared. The logits of the model with its own
  `DynamicCache` differ from those without a cache.
- *cannot be built tiny*: no tiny model of this type runs.
- `-`: this version of `transformers` does not register the type.

The column *layers* lists the cache layers of the tiny model. The worst error is relative to the largest logit. Number
of model types by version and verdict:
"""

MULTIMODAL_INTRODUCTION = """
## Images and sound

This table lists every type that `transformers` registers as a multimodal language model, with a tiny random model of
each.

- *text*: the test above, with the whole model.
- *image*, *sound*: a prompt with an image, or with sound, and an answer of 24 tokens through `sink_generate`, which
  crosses the end of the window. Each step must equal the decoder without a cache on the embeddings of the kept tokens,
  at contiguous positions (those of the model's own `get_rope_index`, if it has one). *not fed* is a type that takes
  images or sound in a form that the test does not make; an empty cell is one that takes none, or is not supported.
- *M-RoPE*: the model gives images positions on a grid.
- *features*: what stands for an image in the prompt. *its encoder* is a tiny one of the model's own class; where none
  could be built or fed, random features are *put in* by a replaced `get_image_features` or `get_audio_features`.

`tests/laws/test_multimodal.py` has the images of Mllama, which are attended to in layers of their own.
Of models that speak (Qwen Omni), the part that reads and answers is tested.
"""

# Small sizes, by config field. A config gets the fields that it has.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "unpadded_vocab_size": VOCAB_SIZE,
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "ffn_dim": 64,
    "ffn_hidden_size": 64, "max_position_embeddings": 4096, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2,
    "top_k_experts": 2,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 0, "q_lora_rank": 32,
    "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "qk_head_dim": 32, "v_head_dim": 16,
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_head_dim": 16, "mamba_num_heads": 8, "mamba_d_state": 16,
    "mamba_d_ssm": 128, "mamba_n_groups": 1, "n_groups": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_heads": 4, "linear_head_dim": 16,
    "sliding_window": 4096, "attention_chunk_size": 4096,
    "global_head_dim": 16, "rotary_dim": 8, "num_global_key_value_heads": 2, "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB_SIZE, "laurel_rank": 8, "mamba_dt_rank": 8, "lru_width": 64,
    "index_topk": 8, "index_head_dim": 32, "index_n_heads": 32, "indexer_n_heads": 8, "indexer_kv_heads": 1,
    "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 4, "is_decoder": True,
    "H_cycles": 1, "L_cycles": 1,
    "expert_ffn_hidden_size": 32, "zero_expert_num": 2, "attention_window_size": 4096,
}  # fmt: skip
# Config fields that give one layer of full attention, also in hybrid models.
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
# A few types of each kind, to check a version of transformers quickly.
QUICK = (
    "bloom", "cohere2", "deepseek_v3", "falcon_h1", "gemma3_text", "glm4", "gpt_neox", "gptj", "gpt2", "gpt_oss",
    "lfm2", "llama", "mamba2", "mistral", "mixtral", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_next", "smollm3",
)  # fmt: skip
QUICK_MULTIMODAL = ("gemma3", "glm4v", "idefics3", "llava", "qwen2_audio", "qwen2_vl", "qwen3_5", "voxtral")
# Class names of modules that mix tokens, and of those that are attention.
MIXERS = r"((?<!Cross)Attention|MLA|Mixer|DeltaNet|ShortConv|Mamba2?(Layer)?)$"
ATTENTION = r"(Attention|MLA)$"
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# Changes to try in order, until a model builds and runs. None keeps the default of the config.
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
    {"rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}},
    {
        "rope_parameters": {**ROPE, "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5},
        "hidden_size": 128,
        "head_dim": 32,
    },
    {"mlp_layer_types": ["dense"] * 4},
    {"moe_intermediate_size": [32, 32], "rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]}},
    {"index_kpool": 4, "num_key_value_heads": 4, "qk_rope_head_dim": 0},
    {
        "layer_types": ["indexed_attention"],
        "num_key_value_heads": 4,
        "rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]},
    },
]


def default_config(model_type: str) -> Any:
    """Return the default config of a type; of a model that speaks, that of the part which reads and answers."""
    config: Any = CONFIG_MAPPING[model_type]()
    return getattr(config, "thinker_config", config)


def tiny_models(
    model_type: str, layers: dict[str, Any], auto: Any = AutoModelForCausalLM, failures: list[str] | None = None
) -> Iterator[Any]:
    """Yield a tiny random model of a type, by the registry `auto`, for each variant that builds and runs.

    `failures` gets what the others raise.
    """
    defaults = default_config(model_type)
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
    if getattr(text, "rope_parameters", True) == {}:  # the config has no default and needs one per layer type
        tokens["rope_parameters"] = {"full_attention": ROPE}
    is_causal = auto is AutoModelForCausalLM and (text is defaults or type(text) in MODEL_FOR_CAUSAL_LM_MAPPING)
    for variant in VARIANTS:
        changes = {name: value for name, value in {**SIZES, **layers, **variant}.items() if name in known}
        changes = {name: value for name, value in changes.items() if value is not None}
        for is_narrow in (True, False):
            try:
                config = type(text)(**{**tokens, **changes})
                for tower in vars(config).values():
                    if isinstance(tower, PreTrainedConfig):  # an image or audio encoder
                        shrink_tower(tower)
                if not is_causal:
                    config = with_text_config(defaults, config, is_narrow)
                model = build(config, auto)
                cache = DynamicCache(config=model.config)
                for chunk in random_ids(6).split([2, 1, 3], dim=1):
                    model(input_ids=chunk, **{CACHE: cache})
            except Exception as error:  # model code raises any kind of error for sizes it does not support
                if failures is not None:
                    failures.append(re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:150])
                if is_causal:
                    break
                continue
            yield model
            break


def build(config: Any, auto: Any) -> Any:
    """Return a random model with sharp attention, so that a wrong position changes the logits."""
    model_class = auto._model_mapping[type(config)]
    if type(config).sub_configs.get("text_config") is model_class.config_class:  # as `from_config` does (Emu3)
        config = config.get_text_config()
    with torch.device("meta"):
        size = sum(weight.numel() for weight in model_class._from_config(config).parameters())
    if size > LARGEST_MODEL:
        raise ValueError(f"the model must have at most {LARGEST_MODEL:,} weights, got {size:,}")
    torch.manual_seed(0)
    model = model_class._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if auto is AutoModelForMultimodalLM and not weight.any():  # images would be zero in a new Gemma 3
                weight.normal_()
            weight.mul_(4) if weight.ndim > 1 else weight.add_(torch.randn_like(weight) * 0.2)
    return model.eval()


def random_ids(length: int) -> Tensor:
    """Return token ids `[1, length]`."""
    return torch.randint(1, VOCAB_SIZE, (1, length), generator=torch.Generator().manual_seed(0))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest error relative to the largest expected logit; infinity for NaN."""
    masked = expected <= torch.finfo(expected.dtype).min  # tokens that the model must not generate
    actual, expected = actual.masked_fill(masked, 0), expected.masked_fill(masked, 0)
    error = float((actual - expected).abs().max() / expected.abs().max())
    return error if error == error else float("inf")


@torch.no_grad()
def agrees_with_itself(model: Any) -> bool:
    """Return True if the logits with a DynamicCache, in chunks, equal those without a cache."""
    ids, cache, seen = random_ids(24), DynamicCache(config=model.config), 0
    expected = model(input_ids=ids, use_cache=False).logits
    for chunk in CHUNKS[:5]:
        positions = torch.arange(seen, seen + chunk)[None]
        logits = model(input_ids=ids[:, seen : seen + chunk], position_ids=positions, **{CACHE: cache}).logits
        if relative_error(logits, expected[:, seen : seen + chunk]) > 1e-3:
            return False
        seen += chunk
    return True


@torch.no_grad()
def one_layer_error(model: Any) -> float:
    """Return the largest error of a stream of three windows, by tokens and in chunks, against the kept tokens alone."""
    length = 3 * WINDOW_LENGTH
    ids, worst = random_ids(length), 0.0
    for chunks in ([1] * length, CHUNKS):
        cache, seen = SinkCache(model.config, WINDOW_LENGTH, NUM_SINK_TOKENS), 0
        for chunk in chunks:
            # Pass positions, as `generate` does: some models do not take them from the cache.
            positions = torch.arange(seen, seen + chunk)[None]
            logits = model(input_ids=ids[:, seen : seen + chunk], position_ids=positions, **{CACHE: cache}).logits
            num_evicted = max(seen + 1 - WINDOW_LENGTH, 0)
            kept = [t for t in range(seen) if not NUM_SINK_TOKENS <= t < NUM_SINK_TOKENS + num_evicted]
            expected = model(input_ids=ids[:, kept + list(range(seen, seen + chunk))], use_cache=False).logits[
                :, -chunk:
            ]
            worst = max(worst, relative_error(logits, expected))
            seen += chunk
    return worst


@torch.no_grad()
def isolate(model: Any) -> None:
    """Disable every module that mixes tokens, except the last attention layer with sinks.

    Each cached state then depends on one token, as in a model with one layer.
    """
    cache = SinkCache(model.config, WINDOW_LENGTH, NUM_SINK_TOKENS)
    sink_layers = {i for i, layer in enumerate(cache.layers) if isinstance(layer, SinkLayer)}
    mixers = [module for module in model.modules() if re.search(MIXERS, type(module).__name__)]
    inner = {id(child) for module in mixers for child in module.modules() if child is not module}
    mixers = [module for module in mixers if id(module) not in inner]
    ran: set[int] = set()  # those of an image or audio encoder do not
    hooks = [module.register_forward_hook(lambda module, *_: ran.add(id(module))) for module in mixers]
    model(input_ids=random_ids(2), use_cache=False)
    for hook in hooks:
        hook.remove()
    mixers = [module for module in mixers if id(module) in ran]
    attention = [
        m
        for m in mixers
        if re.search(ATTENTION, type(m).__name__) and getattr(m, "layer_idx", None) in {None, -1, *sink_layers}
    ]
    for module in mixers:
        if module is not attention[-1]:
            module.register_forward_hook(_zero_output)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv1d):  # causal: the last weight applies to the token itself
            module.weight[..., :-1] = 0
    for name, weight in model.named_parameters():
        if "delayed" in name:  # weights for the values of the previous token
            weight.zero_()


def _zero_output(module: Any, args: Any, output: Any) -> Any:
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


@torch.no_grad()
def several_layers_error(model: Any) -> float:
    """Return the largest error below the window, against a DynamicCache. Also check lengths past the window."""
    ids = random_ids(WINDOW_LENGTH)
    cache, dynamic = SinkCache(model.config, WINDOW_LENGTH, NUM_SINK_TOKENS), DynamicCache(config=model.config)
    worst = 0.0
    positions = torch.arange(WINDOW_LENGTH)[None]
    for chunk, position_ids in zip(*(x.split([5, 1, 1, 4, 1, 1, 3], dim=1) for x in (ids, positions)), strict=True):
        logits, expected = (
            model(input_ids=chunk, position_ids=position_ids, **{CACHE: x}).logits for x in (cache, dynamic)
        )
        worst = max(worst, relative_error(logits, expected))
    cache = SinkCache(model.config, WINDOW_LENGTH, NUM_SINK_TOKENS)
    options: dict[str, Any] = {"max_new_tokens": 30, "min_new_tokens": 30, "use_cache": True}
    output = model.generate(ids, **{CACHE: cache}, **options)
    assert output.shape[1] == WINDOW_LENGTH + 30
    assert cache.kept_length == WINDOW_LENGTH
    for layer in cache.layers:
        assert not isinstance(layer, SinkLayer) or layer.get_seq_length() == WINDOW_LENGTH + 29
    options |= {"window_length": WINDOW_LENGTH, "num_sink_tokens": NUM_SINK_TOKENS}
    again: Any = sink_generate(model, ids, **options)
    assert torch.equal(again, output), "sink_generate and generate return different tokens"
    return worst


def judge_multimodal(model_type: str) -> dict[str, Any]:
    """Return the row of a multimodal model type that reads text."""
    return judge(model_type, AutoModelForMultimodalLM)


def judge(model_type: str, auto: Any = AutoModelForCausalLM) -> dict[str, Any]:
    """Return the row of a model type of the registry `auto`."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.alarm(SECONDS)
    row: dict[str, Any] = {"type": model_type, "verdict": "cannot be built tiny", "layers": "", "error": "", "note": ""}
    if auto is AutoModelForMultimodalLM:
        row |= dict.fromkeys(("image", "sound", "mrope", "media error", "features"), "")
    try:
        row |= _judge(model_type, auto)
    except NotImplementedError as error:
        row |= {"verdict": "refused", "note": reason_of(error)}
    except _OutOfTime:
        row |= {"note": f"stopped after {SECONDS} s"}
    except Exception as error:
        row |= {"verdict": "crash", "note": re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:150]}
    finally:
        signal.alarm(0)
    return row


def reason_of(error: Exception) -> str:
    """Return the reason of a refusal, without the model type before it and the hint after it."""
    message = re.sub(r"\s+", " ", str(error))
    return re.sub(r"^.*?model type '[^']*': ", "", message).partition(" If its keys ")[0]


class _OutOfTime(BaseException):
    """Timeout of a model type; a BaseException, so that `except Exception` does not catch it."""


def _out_of_time(*_: object) -> None:
    raise _OutOfTime


def _judge(model_type: str, auto: Any) -> dict[str, Any]:
    try:
        defaults = default_config(model_type)
    except Exception as error:
        return {"note": re.sub(r"\s+", " ", f"its default config fails: {error}")[:150]}
    if defaults.is_encoder_decoder:
        SinkCache(defaults)
    row: dict[str, Any] = {}
    worst, refusal, is_unproven = 0.0, None, False
    media: dict[str, Any] = {}
    failures: list[str] = []
    for layers in (ONE_LAYER, SEVERAL_LAYERS):
        for model in tiny_models(model_type, layers, auto, failures):
            try:
                cache = SinkCache(model.config, WINDOW_LENGTH, NUM_SINK_TOKENS)
            except NotImplementedError as error:
                refusal = refusal or error
                continue
            except ValueError:
                continue  # no layer of this variant would keep sink tokens
            if not agrees_with_itself(model):
                is_unproven = True
                continue
            if several_layers_error(model) > 1e-4:
                return {"verdict": "wrong", "note": "differs from a DynamicCache below the window"}
            isolate(model)
            worst = max(worst, one_layer_error(model))
            row = row_of(cache, worst)
            if auto is AutoModelForMultimodalLM and not media:
                media = media_row(model)
            break
    check_default_config(defaults, row, refusal)
    if is_unproven and not row:
        row = {"verdict": "unproven", "note": "its logits with a DynamicCache differ from those without a cache"}
    if not row and failures and auto is AutoModelForMultimodalLM:
        row = {"note": failures[0]}
    return row | media


def row_of(cache: SinkCache, error: float) -> dict[str, Any]:
    """Return the row of a model that was compared with itself without a cache."""
    classes = Counter(type(layer).__name__ for layer in cache.layers)
    in_order = cache.needs_temporal_order
    return {
        "verdict": "exact" if error < 1e-3 else "wrong",
        "error": f"{error:.0e}",
        "layers": ", ".join(f"{count} {name}" for name, count in classes.items()),
        "note": "the cache returns tokens in temporal order" if in_order else "",
    }


def media_row(model: Any) -> dict[str, Any]:
    """Return what the row of a multimodal model says of prompts with an image and with sound."""
    row = {"mrope": "yes" if rope_index_of(model) else "", "media error": "", "features": ""}
    for kind in ("image", "sound"):
        try:
            error, made = media_error(model, kind)
        except NotImplementedError as refusal:
            row |= {kind: "refused", "features": str(refusal)}
            continue
        row[kind] = made
        if error is not None:
            row[kind] = "exact" if error < 1e-3 else "wrong"
            row["media error"] = max(row["media error"], f"{error:.0e}", key=lambda each: float(each or 0))
            row["features"] += f"{', ' * bool(row['features'])}{kind}: {made}"
    return row


def check_default_config(defaults: Any, row: dict[str, Any], refusal: NotImplementedError | None) -> None:
    """Compare the verdict on the default config, which a user gets, with that on the tiny models.

    Raises:
        NotImplementedError, ValueError: if the type is refused. If no default model can run, only add a note to `row`.
    """
    try:
        SinkCache(defaults, WINDOW_LENGTH, NUM_SINK_TOKENS)
    except (NotImplementedError, ValueError) as error:
        message = str(error)
        if refusal is not None and "could not be measured" in message:
            raise refusal from error
        # transformers cannot run some default configs.
        if not row or not re.search("could not be measured|no attention layers|not even a DynamicCache", message):
            raise
        row["note"] = f"the default config is refused: {reason_of(error)[:150]}"
    if refusal is not None and not row:
        raise refusal


def write_page(results: Results, multimodal: Results) -> None:
    """Write docs/architectures.md from the recorded verdicts. The newest version of transformers comes first."""
    versions = sorted(results, key=_numbers, reverse=True)
    newest = results[versions[0]]
    lines = [INTRODUCTION]
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
    PAGE.write_text("\n".join(lines + multimodal_table(multimodal)) + "\n")


def multimodal_table(results: Results) -> list[str]:
    """Return the lines of the table of multimodal types, for the newest version that was recorded."""
    version = max(results, key=_numbers)
    rows = results[version]
    lines = [MULTIMODAL_INTRODUCTION, f"With transformers {version}, of {len(rows)} types:", ""]
    for kind, name in (("text", "verdict"), ("image", "image"), ("sound", "sound")):
        counts = Counter(row[name] for row in rows.values() if row[name])
        lines.append(f"- {kind}: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common()))
    either = sum("exact" in (row["image"], row["sound"]) for row in rows.values())
    lines += [f"- exact with an image or with sound: {either}", ""]
    names = ("verdict", "image", "sound", "mrope", "error", "media error", "features", "note")
    lines.append(
        "| model type | text | image | sound | M-RoPE | error, text | error, image or sound | features | note |"
    )
    lines.append("|---" * (len(names) + 1) + "|")
    for model_type, row in sorted(rows.items()):
        lines.append("| " + " | ".join([model_type, *(row[name].replace("|", "/") for name in names)]) + " |")
    return lines


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types to test (default: all)")
    parser.add_argument("--quick", action="store_true", help="test only a few types of each kind")
    parser.add_argument("--table", choices=["causal", "multimodal"], help="test only the types of one table")
    parser.add_argument("--write", action="store_true", help="record the verdicts and write docs/architectures.md")
    parser.add_argument("--page", action="store_true", help="test nothing; write the page from the recorded verdicts")
    options = parser.parse_args()
    if options.page:
        write_page(recorded(RESULTS), recorded(MULTIMODAL_RESULTS))
        return
    tables: dict[str, tuple[Any, Any, tuple[str, ...], Path]] = {
        "causal": (judge, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, QUICK, RESULTS),
        "multimodal": (judge_multimodal, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, QUICK_MULTIMODAL, MULTIMODAL_RESULTS),
    }
    complaints: list[str] = []
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=20) as pool:
        for name, (judged, registered, quick, path) in tables.items():
            if options.table in (None, name):
                types = [
                    each for each in options.types or (quick if options.quick else registered) if each in registered
                ]
                complaints += sweep(pool.imap_unordered(judged, sorted(types)), path, options.write)
    if options.write:
        write_page(recorded(RESULTS), recorded(MULTIMODAL_RESULTS))
    if complaints:
        sys.exit("; ".join(complaints))


def sweep(judged: Iterator[dict[str, Any]], path: Path, writes: bool) -> list[str]:
    """Print the rows of a table, record them if told so, and return what is wrong with them."""
    rows: dict[str, dict[str, str]] = {}
    for row in judged:
        print(" | ".join(str(value) for value in row.values()), flush=True)
        rows[row.pop("type")] = row
    results = recorded(path)
    # Compare a version without recorded verdicts with the newest recorded version.
    known = results.get(transformers.__version__) or (results[max(results, key=_numbers)] if results else {})
    verdicts = ("verdict", "image", "sound")
    failed = [name for name, row in rows.items() if {row.get(each) for each in verdicts} & {"wrong", "crash"}]
    worse = [
        name
        for name, row in rows.items()
        if any(row.get(each) != "exact" and known.get(name, {}).get(each) == "exact" for each in verdicts)
    ]
    if writes:
        results[transformers.__version__] = {**results.get(transformers.__version__, {}), **dict(sorted(rows.items()))}
        path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    counts = Counter(row["verdict"] for row in rows.values())
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()))
    complaints = {"wrong or crashed": failed, "worse than before": worse}
    return [f"{what}: {', '.join(names)}" for what, names in complaints.items() if names]


def recorded(path: Path) -> Results:
    """Return the recorded verdicts by version of transformers and model type."""
    results: Results = json.loads(path.read_text()) if path.exists() else {}
    return results


if __name__ == "__main__":
    main()
