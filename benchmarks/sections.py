"""The measurements. Each returns rows of figures, times as lists so that the page can show their spread."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, PreTrainedTokenizerFast, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from attention_sinks import SinkCache, SinkSession, sink_generate, sink_prefill

from .measure import CACHE, Setting, filled, full_cache, in_turns, nbytes, random_states, ratios, step_of, waiting_for

Rows = list[dict[str, Any]]
UPDATED_LAYERS, NUM_HEADS, HEAD_DIM = 4, 8, 128
STREAM_WINDOW = 1024
PREDECESSORS = {
    "SinkCache of transformers 4.52.4": ["transformers==4.52.4"],
    "attention_sinks 0.4.0": ["transformers==4.34.0", "attention_sinks==0.4.0", "einops", "numpy<2"],
}


def update_cost(setting: Setting) -> Rows:
    """An update of all layers of a cache by one token, past the window or at that length, for each layer."""
    config = LlamaConfig(
        num_hidden_layers=UPDATED_LAYERS,
        num_attention_heads=NUM_HEADS,
        hidden_size=NUM_HEADS * HEAD_DIM,
        head_dim=HEAD_DIM,
    )
    rows = []
    for window_length in setting.window_lengths:
        state, prompt = (random_states(config, n, setting.device, setting.dtype) for n in (1, window_length - 1))
        layers = range(UPDATED_LAYERS)
        caches: dict[str, Any] = {
            "SinkCache": SinkCache(config, window_length),
            "DynamicCache": DynamicCache(config=config),
            "DynamicSlidingWindowLayer": Cache(layers=[DynamicSlidingWindowLayer(window_length) for _ in layers]),
            "StaticCache": StaticCache(config, max_cache_len=window_length),
        }
        for cache in caches.values():
            for layer_idx in layers:
                cache.update(prompt, prompt, layer_idx)
        candidates = {name: partial(_take, cache, state) for name, cache in caches.items()}
        repeats = max(2, 2**14 // window_length)
        times = in_turns(candidates, setting.rounds, setting.device, repeats)
        for name, one in times.items():
            rows.append({"cache": name, "W": window_length, "us": [t / UPDATED_LAYERS * 1e6 for t in one]})
    return rows


def _take(cache: Any, state: Tensor) -> None:
    """Update all layers by one token, after which the cache is as long as before."""
    for layer_idx, layer in enumerate(cache.layers):
        cache.update(state, state, layer_idx)
        if type(layer) is DynamicLayer:
            keys: Any = layer.keys
            values: Any = layer.values
            layer.keys, layer.values = keys[:, :, :-1], values[:, :, :-1]
        elif isinstance(layer, StaticLayer):
            layer.cumulative_length.fill_(layer.max_cache_len - 1)


def decode(setting: Setting) -> Rows:
    """One decoded token with a full window, against a cache that stores nothing."""
    model, rows = setting.model(), []
    for window_length in setting.window_lengths:
        names = ["floor", "SinkCache", "DynamicCache"]
        steps = {name: step_of(name, model, model, window_length) for name in names}
        times = in_turns(steps, setting.rounds, setting.device)
        for name in names:
            row = {"cache": name, "W": window_length, "ms": [t * 1e3 for t in times[name]]}
            row["ratio"] = ratios(times[name], times["floor"])
            if setting.device.type == "cuda":
                row["kernels"], row["waits"] = kernels(steps[name]), waits(steps[name])
                row["weights"] = sum(p.nbytes for p in model.parameters())
                row["cached"] = nbytes(full_cache(name, model, window_length))
            rows.append(row)
    return rows


def kernels(step: Callable[[], None]) -> int:
    """How many kernels and copies a step launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type.name == "CUDA")


def waits(step: Callable[[], None]) -> bool:
    """Whether the host waits for the device in a step."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def compiled(setting: Setting, num_layers: int | None) -> Rows:
    """The same under `torch.compile`; a `StaticCache` of the same length is the yardstick."""
    model, rows = setting.model(num_layers), []
    mode = "reduce-overhead" if setting.device.type == "cuda" else None
    for window_length in setting.window_lengths:
        torch.compiler.reset()
        forward = torch.compile(model, fullgraph=True, mode=mode)
        steps = {
            "SinkCache, eager": step_of("SinkCache", model, model, window_length),
            "SinkCache, compiled": step_of("SinkCache", forward, model, window_length),
            "StaticCache, compiled": step_of("StaticCache", forward, model, window_length),
        }
        times = in_turns(steps, setting.rounds, setting.device)
        for name, one in times.items():
            ratio = ratios(one, times["StaticCache, compiled"])
            rows.append({"cache": name, "W": window_length, "ms": [t * 1e3 for t in one], "ratio": ratio})
    return rows


def prefill(setting: Setting, chunk_sizes: tuple[int, ...], num_layers: int | None) -> Rows:
    """One chunk of a long prompt, each token with its own window, against a plain chunk on a full `DynamicCache`."""
    model, rows = setting.model(num_layers), []
    config, device, dtype = model.config, setting.device, setting.dtype
    for window_length in setting.window_lengths:
        for chunk_size in chunk_sizes:
            ids = torch.zeros(1, chunk_size, dtype=torch.long, device=device)
            cache = full_cache("SinkCache", model, window_length)
            dynamic = filled(DynamicCache(config=config), config, window_length, device, dtype)

            def plain(ids: Tensor, cache: Any) -> None:
                model(ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
                cache.crop(-ids.shape[1])

            def windowed(ids: Tensor, cache: Any) -> None:
                list(sink_prefill(model, ids, cache, chunk_size=ids.shape[1], logits_to_keep=1))

            chunks = {"sink_prefill": partial(windowed, ids, cache), "plain chunk": partial(plain, ids, dynamic)}
            times = in_turns(chunks, setting.rounds, device)
            rows += [
                {
                    "W": window_length,
                    "chunk": chunk_size,
                    "tokens per s": [chunk_size / t for t in times["sink_prefill"]],
                    "ratio": ratios(times["plain chunk"], times["sink_prefill"]),
                }
            ]
    return rows


def session_cost(setting: Setting, answer_length: int) -> Rows:
    """A token of a session's answer with a full window, against one of `sink_generate`."""
    model, rows = setting.model(), []
    model.generation_config.eos_token_id = None
    tokenizer = word_tokenizer(model.config.vocab_size)
    settings: dict[str, Any] = {"max_new_tokens": answer_length, "do_sample": False}
    for window_length in setting.window_lengths:
        text = "word0 " * (window_length + 1)
        session = SinkSession(model, tokenizer, window_length)
        session.feed(text)
        cache = SinkCache(model.config, window_length)
        ids = tokenizer(text, return_tensors="pt")["input_ids"].to(setting.device)
        list(sink_prefill(model, ids[:, :-1], cache))
        last = [ids[:, -1:]]

        def generate(cache: SinkCache, last: list[Any]) -> None:
            output: Any = sink_generate(model, last[0], cache=cache, **settings)
            last[0] = output[:, -1:]

        def answer(session: SinkSession) -> None:
            for _ in session.generate(**settings):
                pass

        calls = {"sink_generate": partial(generate, cache, last), "SinkSession": partial(answer, session)}
        times = in_turns(calls, setting.rounds, setting.device)
        for name, one in times.items():
            ratio = ratios(one, times["sink_generate"])
            rows.append(
                {"what": name, "W": window_length, "ms": [t / answer_length * 1e3 for t in one], "ratio": ratio}
            )
    return rows


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose every token is a word, for a model with random weights."""
    tokenizer = Tokenizer(models.WordLevel({f"word{i} ": i for i in range(vocab_size)}, unk_token="word0 "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def stream(setting: Setting, checkpoints: tuple[int, ...], window_length: int, environments: Path | None) -> Rows:
    """Milliseconds per decoded token and MiB of cache along one stream."""
    model, rows = setting.model(), []
    config, device = model.config, setting.device
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    wait = waiting_for(device)
    caches: dict[str, Any] = {
        "SinkCache": SinkCache(config, window_length),
        "DynamicCache": DynamicCache(config=config),
        "recomputed window": None,
    }
    seen = dict.fromkeys(caches, 0)
    for target in checkpoints:
        for name, cache in caches.items():
            while cache is not None and seen[name] < target:
                chunk = torch.zeros(1, min(256, target - seen[name]), dtype=torch.long, device=device)
                if isinstance(cache, SinkCache):
                    list(sink_prefill(model, chunk, cache, logits_to_keep=1))
                else:
                    model(chunk, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
                seen[name] += chunk.shape[1]
            times = []
            for _ in range(setting.rounds if cache is not None else 3):
                wait()
                start = time.perf_counter()
                if cache is None:
                    window = torch.zeros(1, max(min(target, window_length), 1), dtype=torch.long, device=device)
                    model(window, use_cache=False, logits_to_keep=1)
                else:
                    model(token, **{CACHE: cache}, use_cache=True)
                    seen[name] += 1
                wait()
                times.append((time.perf_counter() - start) * 1e3)
            mebibytes = 0.0 if cache is None else nbytes(cache) / 2**20
            rows.append({"cache": name, "seen": target, "ms": statistics.median(times), "MiB": mebibytes})
    given = {"shape": {**setting.shape}, "window_length": window_length, "checkpoints": checkpoints}
    given |= {"chunk_size": 64, "steps": setting.rounds}
    for name in PREDECESSORS:
        rows += predecessor(name, "stream", given, environments)
    return rows


def memory(setting: Setting) -> Rows:
    """The bytes of a full cache against those of its window."""
    rows = []
    for window_length in setting.window_lengths:
        for dtype in (torch.float32, torch.bfloat16):
            config = LlamaConfig(**setting.shape)
            cache = filled(SinkCache(config, window_length), config, window_length + 7, setting.device, dtype)
            filled(cache, config, 1, setting.device, dtype)
            head_dim = config.hidden_size // config.num_attention_heads
            heads = config.num_key_value_heads or config.num_attention_heads
            window = 2 * config.num_hidden_layers * heads * window_length * head_dim * dtype.itemsize
            held = nbytes(cache)
            rows.append({"W": window_length, "dtype": str(dtype)[6:], "MiB": held / 2**20, "over": held / window - 1})
    return rows


def predecessor_updates(setting: Setting, environments: Path | None) -> Rows:
    """The update of the old `SinkCache`."""
    lengths = [w for w in setting.window_lengths if w <= 16384]  # seconds for one update beyond
    given = {"num_heads": NUM_HEADS, "head_dim": HEAD_DIM, "window_lengths": lengths, "rounds": setting.rounds}
    return predecessor("SinkCache of transformers 4.52.4", "update_cost", given, environments)


def predecessor(name: str, what: str, given: dict[str, Any], environments: Path | None) -> Rows:
    """Run a predecessor in an environment of its own, which is made the first time."""
    if environments is None:
        return []
    folder = environments / name.replace(" ", "-")
    python = str(folder / "bin" / "python")
    if not (folder / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, f"torch=={torch.__version__.split('+')[0]}"], check=True)
        subprocess.run([*pip, *PREDECESSORS[name]], check=True)
        (folder / ".ready").touch()
    script = str(Path(__file__).with_name("predecessors.py"))
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [python, script, what, json.dumps(given)]
    output = subprocess.run(command, check=True, env=clean, stdout=subprocess.PIPE, text=True).stdout
    rows: Rows = json.loads(output.splitlines()[-1])
    return rows
