"""Measure if text is still fluent after 10,000 generated tokens: python -m benchmarks.fluency

Writes docs/evaluation/fluency.*. The model continues one opening with three caches: with sink tokens, without sink
tokens, and with a cache that keeps all tokens. Two numbers judge each segment of the text, both without a cache:

- `distinct_3`: the share of distinct 3-grams. It is low if the text repeats itself.
- `perplexity`: the perplexity of the same model, given the segment before. It is high if the text is gibberish.

A segment is degenerate if `distinct_3` is below `REPETITIVE` or `perplexity` is above `GIBBERISH`.
"""

import argparse
import csv
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel, set_seed
from transformers.generation.streamers import BaseStreamer

from attention_sinks import SinkCache, sink_generate
from attention_sinks.compat import cache_name
from attention_sinks.load import load_model

ROOT = Path(__file__).resolve().parents[1]
OPENING = "Once upon a time, in a small town by the sea, there lived an old clockmaker who"
SEGMENT_LENGTH = 250
REPETITIVE = 0.5
GIBBERISH = 50.0
Rows = list[dict[str, Any]]


class TokenTimer(BaseStreamer):
    """Streamer that records the time of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None: ...


def generate_text(model: Any, prompt: Tensor, cache: Any, length: int) -> tuple[Tensor, list[float]]:
    """Return the prompt and `length` new tokens, `[n]`, and the time of the prompt and of each token, in seconds."""
    timer = TokenTimer()
    set_seed(0)
    options: dict[str, Any] = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": True, "top_p": 0.95}
    options |= {cache_name(): cache, "streamer": timer, "temperature": 1.0, "top_k": 0}
    generate = sink_generate if isinstance(cache, SinkCache) else type(model).generate
    output: Any = generate(model, prompt, **options)
    return output[0], timer.times


def distinct_3(tokens: list[int]) -> float:
    """Return the share of distinct 3-grams."""
    grams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return len(set(grams)) / len(grams)


@torch.no_grad()
def perplexity(model: PreTrainedModel, context: Tensor, segment: Tensor) -> float:
    """Return the perplexity of a segment `[n]` after a context `[m]`, without a cache."""
    logits: Tensor = model(torch.cat([context, segment])[None], use_cache=False).logits[0]
    return math.exp(float(cross_entropy(logits[len(context) - 1 : -1].float(), segment)))


def score_segments(model: PreTrainedModel, ids: Tensor, times: list[float], cache: Any, name: str) -> Rows:
    """Return a row for each segment of a text `[n]`. `times[1]` is the time of the first generated token."""
    first = len(ids) - len(times) + 1
    per_token = sum(t.nbytes // t.shape[2] for layer in cache.layers for t in (layer.keys, layer.values))
    rows = []
    for start in range(first, len(ids) - SEGMENT_LENGTH + 1, SEGMENT_LENGTH):
        end = start + SEGMENT_LENGTH
        segment, context = ids[start:end], ids[max(start - SEGMENT_LENGTH, 0) : start]
        held = min(end, cache.window_length) if isinstance(cache, SinkCache) else end
        rows.append(
            {
                "cache": name,
                "position": start,
                "distinct_3": round(distinct_3(segment.tolist()), 3),
                "perplexity": round(perplexity(model, context, segment), 2),
                "ms_per_token": round((times[end - first] - times[start - first]) / SEGMENT_LENGTH * 1e3, 1),
                "MiB": round(per_token * held / 2**20, 1),
            }
        )
    return rows


def is_degenerate(row: dict[str, Any]) -> bool:
    """Return True if a segment repeats itself or is gibberish."""
    return float(row["distinct_3"]) < REPETITIVE or float(row["perplexity"]) > GIBBERISH


def plot(rows: Rows, path: Path) -> None:
    """Plot each column over the number of generated tokens, as a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    panels = figure.subplots(2, 2)
    columns = (("perplexity", "perplexity without a cache"), ("distinct_3", "share of distinct 3-grams"),
               ("ms_per_token", "ms per token"), ("MiB", "cache memory (MiB)"))  # fmt: skip
    for axes, (column, label) in zip(panels.flat, columns, strict=True):
        for name in dict.fromkeys(row["cache"] for row in rows):
            curve = [row for row in rows if row["cache"] == name]
            axes.plot([row["position"] for row in curve], [row[column] for row in curve], label=name, linewidth=1.5)
        axes.set(xlabel="tokens generated", ylabel=label)
        axes.grid(visible=True, alpha=0.25)
    panels[0, 0].set_yscale("log")
    panels[0, 0].axhline(GIBBERISH, color="grey", linestyle=":")
    panels[0, 1].axhline(REPETITIVE, color="grey", linestyle=":")
    panels[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10_000, help="number of tokens to generate")
    parser.add_argument("--window-length", type=int, default=256, help="window length of the caches")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "evaluation", help="output folder")
    options = parser.parse_args(arguments)

    model, tokenizer = load_model()
    prompt = tokenizer(OPENING, return_tensors="pt")["input_ids"]
    caches = {
        "4 sinks": SinkCache(model.config, options.window_length, 4),
        "window": SinkCache(model.config, options.window_length, 0),
        "dense": DynamicCache(config=model.config),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    rows: Rows = []
    log = []
    for name, cache in caches.items():
        ids, times = generate_text(model, prompt, cache, options.tokens)
        segments = score_segments(model, ids, times, cache, name)
        rows += segments
        rate = sum(map(is_degenerate, segments)) / len(segments)
        print(f"{name}: {rate:.0%} of {len(segments)} segments are degenerate", flush=True)
        log.append(f"==== {name}: {rate:.0%} of its segments are degenerate ====")
        starts = 0, len(ids) // 4, len(ids) // 2, 3 * len(ids) // 4, len(ids) - 120
        log += [f"---- from token {start} ----\n{tokenizer.decode(ids[start : start + 120])}" for start in starts]
    with (options.output / "fluency.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (options.output / "fluency.txt").write_text("\n\n".join(log) + "\n")
    plot(rows, options.output / "fluency.png")


if __name__ == "__main__":
    main()
