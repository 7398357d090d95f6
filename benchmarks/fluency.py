"""Is text still fluent after 10,000 generated tokens? Writes docs/evaluation/fluency.*: python -m benchmarks.fluency

A model writes on from one opening, with each cache: one with attention sinks, one without, and one that keeps
everything. Each segment is judged without a cache, by two figures. `distinct_3`: the share of its 3-grams that differ
from one another, low where text goes in circles. `perplexity`: the model's own, of the segment after the one before it,
high where the text is none. A segment is degenerate if fewer than half of its 3-grams are distinct, or if its
perplexity is above `GIBBERISH`.
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


class Clock(BaseStreamer):
    """Notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None: ...


def written(model: Any, prompt: Tensor, cache: Any, length: int) -> tuple[Tensor, list[float]]:
    """The prompt and `length` tokens after it, `[n]`, and when each of these came, in seconds."""
    clock = Clock()
    set_seed(0)
    options: dict[str, Any] = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": True, "top_p": 0.95}
    options |= {cache_name(): cache, "streamer": clock, "temperature": 1.0, "top_k": 0}
    generate = sink_generate if isinstance(cache, SinkCache) else type(model).generate
    output: Any = generate(model, prompt, **options)
    return output[0], clock.times


def distinct_3(tokens: list[int]) -> float:
    grams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return len(set(grams)) / len(grams)


@torch.no_grad()
def perplexity(model: PreTrainedModel, context: Tensor, segment: Tensor) -> float:
    logits: Tensor = model(torch.cat([context, segment])[None], use_cache=False).logits[0]
    return math.exp(float(cross_entropy(logits[len(context) - 1 : -1].float(), segment)))


def judged(model: PreTrainedModel, ids: Tensor, times: list[float], cache: Any, name: str) -> Rows:
    """A row for every segment of a generated text `[n]`, of which the first token came at `times[1]`."""
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
    return float(row["distinct_3"]) < REPETITIVE or float(row["perplexity"]) > GIBBERISH


def plot(rows: Rows, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    panels = figure.subplots(2, 2)
    shown = (("perplexity", "own perplexity, without a cache"), ("distinct_3", "distinct 3-grams"),
             ("ms_per_token", "ms per token"), ("MiB", "MiB of cache"))  # fmt: skip
    for axes, (column, label) in zip(panels.flat, shown, strict=True):
        for name in dict.fromkeys(row["cache"] for row in rows):
            mine = [row for row in rows if row["cache"] == name]
            axes.plot([row["position"] for row in mine], [row[column] for row in mine], label=name, linewidth=1.5)
        axes.set(xlabel="tokens generated", ylabel=label)
        axes.grid(visible=True, alpha=0.25)
    panels[0, 0].set_yscale("log")
    panels[0, 0].axhline(GIBBERISH, color="grey", linestyle=":")
    panels[0, 1].axhline(REPETITIVE, color="grey", linestyle=":")
    panels[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--window-length", type=int, default=256)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "evaluation")
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
        ids, times = written(model, prompt, cache, options.tokens)
        mine = judged(model, ids, times, cache, name)
        rows += mine
        rate = sum(map(is_degenerate, mine)) / len(mine)
        print(f"{name}: {rate:.0%} of {len(mine)} segments are degenerate", flush=True)
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
