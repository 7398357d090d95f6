"""Measurements of each section of the page. Each returns rows; times are lists, so that the page can show quartiles."""

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
from attention_sinks.prefill import default_chunk_size

from .measure import (
    CACHE,
    Setting,
    decode_step,
    fill,
    full_cache,
    nbytes,
    random_states,
    ratios,
    synchronizer,
    time_alternately,
)

Rows = list[dict[str, Any]]
UPDATED_LAYERS, NUM_HEADS, HEAD_DIM = 4, 8, 128
STREAM_WINDOW = 1024
PREDECESSORS = {
    "SinkCache of transformers 4.52.4": ["transformers==4.52.4"],
    "attention_sinks 0.4.0": ["transformers==4.34.0", "attention_sinks==0.4.0", "einops", "numpy<2"],
}


def update_cost(setting: Setting) -> Rows:
    """Time the update of a cache by one token, per layer. The cache contains `W` tokens or has a window of `W`."""
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
        candidates = {name: partial(_update, cache, state) for name, cache in caches.items()}
        repeats = max(2, 2**14 // window_length)
        times = time_alternately(candidates, setting.rounds, setting.device, repeats)
        for name, seconds in times.items():
            rows.append({"cache": name, "W": window_length, "us": [t / UPDATED_LAYERS * 1e6 for t in seconds]})
    return rows


def _update(cache: Any, state: Tensor) -> None:
    """Update all layers by one token, then restore the length of the cache."""
    for layer_idx, layer in enumerate(cache.layers):
        cache.update(state, state, layer_idx)
        if type(layer) is DynamicLayer:
            keys: Any = layer.keys
            values: Any = layer.values
            layer.keys, layer.values = keys[:, :, :-1], values[:, :, :-1]
        elif isinstance(layer, StaticLayer):
            layer.cumulative_length.fill_(layer.max_cache_len - 1)


def decode(setting: Setting, beside: str = "DynamicCache", num_layers: int | None = None) -> Rows:
    """Time a decode step with a full window, and its ratio to a cache that stores nothing; `beside`: another cache."""
    model, rows = setting.model(num_layers), []
    for window_length in setting.window_lengths:
        names = ["floor", "SinkCache", beside]
        steps = {name: decode_step(name, model, model, window_length) for name in names}
        times = time_alternately(steps, setting.rounds, setting.device)
        for name in names:
            row = {"cache": name, "W": window_length, "ms": [t * 1e3 for t in times[name]]}
            row["ratio"] = ratios(times[name], times["floor"])
            if setting.device.type == "cuda":
                row["kernels"], row["waits"] = count_kernels(steps[name]), synchronizes(steps[name])
                row["weights"] = sum(p.nbytes for p in model.parameters())
                row["cached"] = nbytes(full_cache(name, model, window_length))
            rows.append(row)
    return rows


def count_kernels(step: Callable[[], None]) -> int:
    """Return the number of kernels and copies that a step launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type.name == "CUDA")


def synchronizes(step: Callable[[], None]) -> bool:
    """Return True if the host waits for the device during a step."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def compiled(setting: Setting, num_layers: int | None) -> Rows:
    """Time a decode step under `torch.compile`, and its ratio to a `StaticCache` of the same length."""
    model, rows = setting.model(num_layers), []
    mode = "reduce-overhead" if setting.device.type == "cuda" else None
    for window_length in setting.window_lengths:
        torch.compiler.reset()
        forward = torch.compile(model, fullgraph=True, mode=mode)
        steps = {
            "SinkCache, eager": decode_step("SinkCache", model, model, window_length),
            "SinkCache, compiled": decode_step("SinkCache", forward, model, window_length),
            "StaticCache, compiled": decode_step("StaticCache", forward, model, window_length),
        }
        times = time_alternately(steps, setting.rounds, setting.device)
        for name, seconds in times.items():
            ratio = ratios(seconds, times["StaticCache, compiled"])
            rows.append({"cache": name, "W": window_length, "ms": [t * 1e3 for t in seconds], "ratio": ratio})
    return rows


def prefill(setting: Setting, chunk_sizes: tuple[int, ...], num_layers: int | None) -> Rows:
    """Time a chunk of `sink_prefill` past a full window, and its ratio to a plain chunk on a full `DynamicCache`."""
    model, rows = setting.model(num_layers), []
    config, device, dtype = model.config, setting.device, setting.dtype
    for window_length in setting.window_lengths:
        default = default_chunk_size(model, SinkCache(config, window_length))
        for chunk_size in sorted({*chunk_sizes, default}):
            ids = torch.zeros(1, chunk_size, dtype=torch.long, device=device)
            cache = full_cache("SinkCache", model, window_length)
            dynamic = fill(DynamicCache(config=config), config, window_length, device, dtype)

            def plain(ids: Tensor, cache: Any) -> None:
                model(ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
                cache.crop(-ids.shape[1])

            def windowed(ids: Tensor, cache: Any) -> None:
                list(sink_prefill(model, ids, cache, chunk_size=ids.shape[1], logits_to_keep=1))

            chunks = {"sink_prefill": partial(windowed, ids, cache), "plain chunk": partial(plain, ids, dynamic)}
            times = time_alternately(chunks, setting.rounds, device)
            rows += [
                {
                    "width": config.hidden_size,
                    "layers": config.num_hidden_layers,
                    "W": window_length,
                    "chunk": chunk_size,
                    "default": chunk_size == default,
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
        times = time_alternately(calls, setting.rounds, setting.device)
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
    """Return the milliseconds per decode step and the MiB of cache at each checkpoint of a stream."""
    model, rows = setting.model(), []
    config = model.config
    caches: dict[str, Any] = {
        "SinkCache": SinkCache(config, window_length),
        "DynamicCache": DynamicCache(config=config),
        "recomputed window": None,
    }
    for checkpoint in checkpoints:
        for name, cache in caches.items():
            if cache is None:
                window = _token_ids(model, max(min(checkpoint, window_length), 1))
                step = partial(model, window, use_cache=False, logits_to_keep=1)
                times = _milliseconds(step, 3, setting.device)
            else:
                _read_until(model, cache, checkpoint)
                step = partial(model, _token_ids(model, 1), **{CACHE: cache}, use_cache=True)
                times = _milliseconds(step, setting.rounds, setting.device)
            mebibytes = 0.0 if cache is None else nbytes(cache) / 2**20
            rows.append({"cache": name, "seen": checkpoint, "ms": statistics.median(times), "MiB": mebibytes})
    options = {"shape": {**setting.shape}, "window_length": window_length, "checkpoints": checkpoints}
    options |= {"chunk_size": 64, "steps": setting.rounds}
    for name in PREDECESSORS:
        rows += predecessor(name, "stream", options, environments)
    return rows


def _token_ids(model: Any, length: int) -> Tensor:
    return torch.zeros(1, length, dtype=torch.long, device=model.device)


def _read_until(model: Any, cache: Any, length: int) -> None:
    """Feed a cache in chunks until it has seen `length` tokens."""
    while (seen := cache.get_seq_length()) < length:
        chunk = _token_ids(model, min(256, length - seen))
        if isinstance(cache, SinkCache):
            list(sink_prefill(model, chunk, cache, logits_to_keep=1))
        else:
            model(chunk, **{CACHE: cache}, use_cache=True, logits_to_keep=1)


def _milliseconds(step: Callable[[], Any], rounds: int, device: torch.device) -> list[float]:
    """Return the milliseconds of each of `rounds` calls."""
    synchronize, times = synchronizer(device), []
    for _ in range(rounds):
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def memory(setting: Setting) -> Rows:
    """Return the memory of a full cache, and how much more it is than the keys and values of its window."""
    rows = []
    for window_length in setting.window_lengths:
        for dtype in (torch.float32, torch.bfloat16):
            config = LlamaConfig(**setting.shape)
            cache = fill(SinkCache(config, window_length), config, window_length + 7, setting.device, dtype)
            fill(cache, config, 1, setting.device, dtype)
            head_dim = config.hidden_size // config.num_attention_heads
            heads = config.num_key_value_heads or config.num_attention_heads
            expected = 2 * config.num_hidden_layers * heads * window_length * head_dim * dtype.itemsize
            actual = nbytes(cache)
            over = actual / expected - 1
            rows.append({"W": window_length, "dtype": str(dtype)[6:], "MiB": actual / 2**20, "over": over})
    return rows


def predecessor_updates(setting: Setting, environments: Path | None) -> Rows:
    """Time the update of the `SinkCache` of transformers 4.52.4."""
    lengths = [w for w in setting.window_lengths if w <= 16384]  # one update of a longer window takes seconds
    options = {"num_heads": NUM_HEADS, "head_dim": HEAD_DIM, "window_lengths": lengths, "rounds": setting.rounds}
    return predecessor("SinkCache of transformers 4.52.4", "update_cost", options, environments)


def predecessor(name: str, function: str, options: dict[str, Any], environments: Path | None) -> Rows:
    """Run a function of `predecessors.py` in a separate environment, which the first call creates."""
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
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [python, script, function, json.dumps(options)]
    output = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout
    rows: Rows = json.loads(output.splitlines()[-1])
    return rows
