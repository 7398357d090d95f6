"""Measure the predecessors of this library. `python -m benchmarks` creates their environments and runs this script.

The script supports `transformers` 4.34 and 4.52 and imports nothing from this project.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

NUM_SINK_TOKENS = 4


def old_sink_cache(window_length):
    from transformers.cache_utils import SinkCache

    return SinkCache(window_length, NUM_SINK_TOKENS)


def update_cost(setting):
    """Return the microseconds to update one layer of the old `SinkCache` by one token past its window."""
    num_heads, head_dim = setting["num_heads"], setting["head_dim"]
    rows = []
    for window_length in setting["window_lengths"]:
        cache = old_sink_cache(window_length)
        angles = torch.arange(window_length + 64)[:, None] * 1e4 ** -(torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = angles.cos()[None], angles.sin()[None]
        prompt = torch.randn(1, num_heads, window_length, head_dim)
        # The old cache needs positions within the window, but `generate` passes absolute positions.
        cache.update(prompt, prompt, 0, {"cos": cos[:, :window_length], "sin": sin[:, :window_length]})
        state = torch.randn(1, num_heads, 1, head_dim)
        last = {"cos": cos[:, window_length - 1 : window_length], "sin": sin[:, window_length - 1 : window_length]}
        times = []
        for _ in range(setting["rounds"] + 3):
            start = time.perf_counter()
            cache.update(state, state, 0, last)
            times.append((time.perf_counter() - start) * 1e6)
        rows.append({"cache": "SinkCache of transformers 4.52.4", "W": window_length, "us": times[3:]})
    return rows


def stream(setting):
    """Return the milliseconds per decode step and the MiB of cache at each checkpoint of a stream."""
    config = LlamaConfig(**setting["shape"], max_position_embeddings=2**15)
    torch.manual_seed(0)
    window_length = setting["window_length"]
    if transformers.__version__.startswith("4.34"):
        from attention_sinks import AutoModelForCausalLM

        name = "attention_sinks 0.4.0"
        with tempfile.TemporaryDirectory() as folder:
            LlamaForCausalLM(config).save_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                attention_sink_size=NUM_SINK_TOKENS,
                attention_sink_window_size=window_length - NUM_SINK_TOKENS,
            )
        cache = None
    else:
        name = "SinkCache of transformers 4.52.4"
        model, cache = LlamaForCausalLM(config), old_sink_cache(window_length)
    model.eval()
    rows, seen = [], 0
    for target in setting["checkpoints"]:
        while seen < target:
            length = min(setting["chunk_size"], target - seen)
            cache, _ = forward(model, torch.zeros(1, length, dtype=torch.long), cache, seen, window_length)
            seen += length
        times = []
        for _ in range(setting["steps"] + 2):
            cache, seconds = forward(model, torch.zeros(1, 1, dtype=torch.long), cache, seen, window_length)
            times.append(seconds * 1e3)
            seen += 1
        rows.append({"cache": name, "seen": target, "ms": statistics.median(times[2:]), "MiB": mebibytes(cache)})
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def forward(model, input_ids, cache, seen, window_length):
    """Run the model on a chunk. Return the cache and the seconds."""
    positions = {}
    if hasattr(cache, "key_cache"):
        kept = min(seen, window_length - input_ids.shape[1])  # positions within the window, as above
        cache_position = torch.arange(kept, kept + input_ids.shape[1])
        positions = {"position_ids": cache_position[None], "cache_position": cache_position}
    start = time.perf_counter()
    cache = model(input_ids, past_key_values=cache, use_cache=True, **positions).past_key_values
    return cache, time.perf_counter() - start


def mebibytes(cache):
    layers = zip(cache.key_cache, cache.value_cache, strict=True) if hasattr(cache, "key_cache") else cache
    return sum(tensor.nbytes for layer in layers for tensor in layer) / 2**20


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("function", choices=["update_cost", "stream"], help="measurement to run")
    parser.add_argument("setting", type=json.loads, help="its options, as JSON")
    arguments = parser.parse_args()
    with torch.no_grad():
        rows = {"update_cost": update_cost, "stream": stream}[arguments.function](arguments.setting)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
