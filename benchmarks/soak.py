"""Check that memory, errors and speed do not change along a stream of a million tokens: python -m benchmarks.soak

Writes docs/reliability/soak.*. Turns of random length use one cache. Each turn reads a text in chunks of 1 to 64
tokens, then generates an answer. After each turn, the logits are compared with those of the same model without a cache
on the kept tokens. The two are equal, because the model has one layer.
"""

import argparse
import csv
import gc
import os
import random
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from attention_sinks import SinkCache, sink_generate, sink_prefill

ROOT = Path(__file__).resolve().parents[1]
WINDOW_LENGTH, NUM_SINK_TOKENS = 64, 4
VOCAB_SIZE = 256
Rows = list[dict[str, Any]]


def sharp_model() -> Any:
    """Return a model with one layer and sharp attention, so that a wrong key or position changes the logits."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=VOCAB_SIZE,
        )
    ).eval()  # fmt: skip
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.mul_(4)
    return model


def resident_mib() -> float:
    """Return the resident memory of this process in MiB; 0 on systems other than Linux."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20 if statm.exists() else 0.0


@torch.no_grad()
def soak(tokens: int, samples: int) -> Rows:
    """Read and generate `tokens` tokens. Return a row for each of `samples` parts of the stream."""
    model, rng = sharp_model(), random.Random(0)
    cache = SinkCache(model.config, WINDOW_LENGTH, NUM_SINK_TOKENS)
    sinks: list[int] = []
    recent: deque[int] = deque(maxlen=WINDOW_LENGTH - NUM_SINK_TOKENS)
    pending = [0]  # generated, but not yet read by the model
    rows: Rows = []
    errors: list[float] = []
    # CPU milliseconds per token of each turn. CPU time does not depend on other processes.
    read: list[float] = []
    written: list[float] = []

    def record(new_tokens: list[int]) -> None:
        for token in new_tokens:
            (sinks if len(sinks) < NUM_SINK_TOKENS else recent).append(token)

    def error(logits: Tensor) -> float:
        expected = model(torch.tensor([[*sinks, *recent]]), use_cache=False).logits[0, -1]
        return float((logits - expected).abs().max() / expected.abs().max())

    while cache.get_seq_length() < tokens:
        text = [*pending, *(rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 400)))]
        start = time.process_time()
        for chunk in sink_prefill(model, torch.tensor([text[:-1]]), cache, rng.choice([1, 7, 32, 64, 64])):
            logits: Any = chunk.logits
        read.append((time.process_time() - start) / (len(text) - 1) * 1e3)
        record(text[:-1])
        errors.append(error(logits[0, -1]))

        length = rng.randrange(1, 100)
        options: dict[str, Any] = {"max_new_tokens": length, "do_sample": True, "pad_token_id": 0, "eos_token_id": None}
        options |= {"output_logits": True, "return_dict_in_generate": True}
        start = time.process_time()
        output: Any = sink_generate(model, torch.tensor([text[-1:]]), cache=cache, **options)
        written.append((time.process_time() - start) / length * 1e3)
        record(output.sequences[0, :-1].tolist())
        errors.append(error(output.logits[-1][0]))
        pending = output.sequences[0, -1:].tolist()

        if cache.get_seq_length() >= tokens * (len(rows) + 1) / samples:
            gc.collect()
            rows.append(
                {
                    "tokens": cache.get_seq_length(),
                    "MiB": round(resident_mib(), 2),
                    "objects": len(gc.get_objects()),
                    "error": f"{max(errors):.2e}",
                    "cpu_ms_per_token_read": round(statistics.median(read), 4),
                    "cpu_ms_per_token_written": round(statistics.median(written), 4),
                }
            )
            print(rows[-1], flush=True)
            errors, read, written = [], [], []
    return rows


def plot(rows: Rows, path: Path) -> None:
    """Plot memory, errors and CPU time over the number of tokens, as an SVG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = ((("MiB",), "resident memory (MiB)"), (("error",), "largest error relative to the largest logit"),
              (("cpu_ms_per_token_read", "cpu_ms_per_token_written"), "CPU time per token (ms)"))  # fmt: skip
    for axes, (columns, label) in zip(figure.subplots(1, 3), panels, strict=True):
        for column in columns:
            name = column.rpartition("_")[2] if len(columns) > 1 else None
            axes.plot([row["tokens"] for row in rows], [float(row[column]) for row in rows], label=name)
        axes.set(xlabel="tokens", ylabel=label)
        axes.set_ylim(0, 1.1 * max(float(row[column]) for row in rows for column in columns))
        axes.ticklabel_format(style="sci", scilimits=(-3, 4))
        axes.grid(visible=True, alpha=0.25)
        if len(columns) > 1:
            axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="length of the stream")
    parser.add_argument("--samples", type=int, default=100, help="number of rows to record")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "reliability", help="output folder")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)  # a model of this size is not faster with more threads
    rows = soak(options.tokens, options.samples)
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "soak.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, options.output / "soak.svg")


if __name__ == "__main__":
    main()
