"""A stream of a million tokens: is anything worse at its end? Writes docs/reliability/soak.*: python -m benchmarks.soak

Turns of random length go through one cache: a text is read in chunks of 1 to 64 tokens, each token with its own window,
and an answer is generated token by token. After each turn the logits are compared with those of the same model without
a cache on exactly the kept tokens, which are equal in a model of one layer. Nothing else is kept of the stream.
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
    """A model of one layer whose attention is so sharp that a wrong key, or one at a wrong position, shows."""
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
    """Resident memory of this process; on Linux, elsewhere 0."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20 if statm.exists() else 0.0


@torch.no_grad()
def soak(tokens: int, samples: int) -> Rows:
    """A row for each of `samples` parts of a stream of `tokens` tokens."""
    model, chooses = sharp_model(), random.Random(0)
    cache = SinkCache(model.config, WINDOW_LENGTH, NUM_SINK_TOKENS)
    first: list[int] = []
    recent: deque[int] = deque(maxlen=WINDOW_LENGTH - NUM_SINK_TOKENS)
    unread = [0]
    rows: Rows = []
    errors: list[float] = []
    # Of each turn, ms of the processor's time per token: what else a machine does is of no matter.
    read: list[float] = []
    written: list[float] = []

    def note(new: list[int]) -> None:
        for token in new:
            (first if len(first) < NUM_SINK_TOKENS else recent).append(token)

    def error(logits: Tensor) -> float:
        expected = model(torch.tensor([[*first, *recent]]), use_cache=False).logits[0, -1]
        return float((logits - expected).abs().max() / expected.abs().max())

    while cache.get_seq_length() < tokens:
        text = [*unread, *(chooses.randrange(VOCAB_SIZE) for _ in range(chooses.randrange(1, 400)))]
        started = time.process_time()
        for output in sink_prefill(model, torch.tensor([text[:-1]]), cache, chooses.choice([1, 7, 32, 64, 64])):
            logits: Any = output.logits
        read.append((time.process_time() - started) / (len(text) - 1) * 1e3)
        note(text[:-1])
        errors.append(error(logits[0, -1]))

        length = chooses.randrange(1, 100)
        options: dict[str, Any] = {"max_new_tokens": length, "do_sample": True, "pad_token_id": 0, "eos_token_id": None}
        options |= {"output_logits": True, "return_dict_in_generate": True}
        started = time.process_time()
        made: Any = sink_generate(model, torch.tensor([text[-1:]]), cache=cache, **options)
        written.append((time.process_time() - started) / length * 1e3)
        note(made.sequences[0, :-1].tolist())
        errors.append(error(made.logits[-1][0]))
        unread = made.sequences[0, -1:].tolist()

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
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    shown = ((("MiB",), "resident memory, MiB"), (("error",), "error on the scale of the logits"),
             (("cpu_ms_per_token_read", "cpu_ms_per_token_written"), "CPU time per token, ms"))  # fmt: skip
    for axes, (columns, label) in zip(figure.subplots(1, 3), shown, strict=True):
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
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "reliability")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)  # a model as small as this one gains nothing from more
    rows = soak(options.tokens, options.samples)
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "soak.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, options.output / "soak.svg")


if __name__ == "__main__":
    main()
