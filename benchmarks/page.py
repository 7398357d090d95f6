"""Write `docs/benchmarks.md` and its plots from the recorded results."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

from .measure import median_and_quartiles

mpl.use("svg")
from matplotlib import pyplot as plt

SECTIONS = [
    "update", "decode", "video", "compiled", "prefill", "session", "stream", "memory", "construct",
    "gpu_update", "gpu_decode", "gpu_compiled", "gpu_prefill",
]  # fmt: skip
# Memory bandwidth in bytes per second, from the data sheet.
BANDWIDTH = {"NVIDIA H200": 4.8e12}

Rows = list[dict[str, Any]]

INTRODUCTION = """# Benchmarks

`make bench` (`python -m benchmarks`) writes this page. The results behind each table are in [benchmarks/](benchmarks/).
The candidates of a table alternate in one process, and each ratio compares two candidates in the same round. A cell
shows the median, with the quartiles in brackets. Weights are random, because time does not depend on their values. The
*floor* is a cache that stores nothing and returns the keys of a full window, which leaves the time of the model itself.
The predecessors of this library run in their own environments.
"""


def table(header: list[str], lines: list[list[str]]) -> str:
    """Return a Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def update(measured: dict[str, Any], folder: Path) -> str:
    rows: Rows = measured["rows"]
    lengths = sorted({row["W"] for row in rows})
    figure, axes = plt.subplots(figsize=(7, 4))
    lines = []
    for name in dict.fromkeys(row["cache"] for row in rows):
        times = {row["W"]: row["us"] for row in rows if row["cache"] == name}
        axes.plot(list(times), [statistics.median(us) for us in times.values()], "o-", label=name)
        lines.append([name, *(median_and_quartiles(times[w], 0) if w in times else "" for w in lengths)])
    axes.set(xscale="log", yscale="log", xlabel="window length W (tokens)", ylabel="µs per layer and update")
    save(figure, axes, folder / f"{measured['name']}.svg", legend="center right")
    return (
        f"Microseconds per layer to update a cache by one token: 8 heads of dimension 128, {dtype_of(measured)}. The "
        "cache has four layers, and its time is divided by four.\n\n"
        + table(["cache", *(f"W = {w:,}" for w in lengths)], lines)
        + f"\n\n![Time of a cache update over the window length]({folder.name}/{measured['name']}.svg)"
    )


def decode(measured: dict[str, Any], folder: Path) -> str:
    header, lines = ["W", "cache", "ms per token", "ratio to the floor"], []
    bandwidth = BANDWIDTH.get(measured["machine"])
    on_gpu = "kernels" in measured["rows"][0]
    if on_gpu:
        header += ["kernels", "synchronises with the device", "share of the memory bandwidth"]
    for row in measured["rows"]:
        line = [
            f"{row['W']:,}",
            row["cache"],
            median_and_quartiles(row["ms"], 1),
            median_and_quartiles(row["ratio"], 3),
        ]
        if on_gpu:
            seconds = statistics.median(row["ms"]) / 1e3
            share = (row["weights"] + row["cached"]) / seconds / bandwidth if bandwidth else None
            line += [str(row["kernels"]), "yes" if row["waits"] else "no", "" if share is None else f"{share:.0%}"]
        lines.append(line)
    return f"One decode step with a full window, in eager mode: {shape_of(measured)}.\n\n" + table(header, lines)


def video(measured: dict[str, Any], folder: Path) -> str:
    return decode(measured, folder) + (
        "\n\nAttention sinks for video were shown with all kept keys of every layer rotated anew in each step "
        "(StreamingVLM, arXiv 2510.09608). The layer that does it here knows all angles beforehand, and writes a new "
        "token over the oldest one in place, as `SinkCache` does."
    )


def compiled(measured: dict[str, Any], folder: Path) -> str:
    lines = [
        [f"{row['W']:,}", row["cache"], median_and_quartiles(row["ms"], 2), median_and_quartiles(row["ratio"], 3)]
        for row in measured["rows"]
    ]
    return (
        f"One decode step with a full window, under `torch.compile(model, fullgraph=True)`: {shape_of(measured)}. In a "
        "compiled model, transformers always passes an attention mask. With a mask, it repeats the keys of grouped "
        "heads. At a large window this costs more than compilation saves, for every cache.\n\n"
        + table(["W", "cache", "ms per token", "ratio to StaticCache, compiled"], lines)
    )


def prefill(measured: dict[str, Any], folder: Path) -> str:
    lines = [
        [
            f"{row['width']:,}, {row['layers']} layer{'s' * (row['layers'] > 1)}",
            f"{row['W']:,}",
            f"{row['chunk']}{', default' * row['default']}",
            median_and_quartiles(row["tokens per s"], 0),
            median_and_quartiles(row["ratio"], 3),
        ]
        for row in measured["rows"]
    ]
    dtype = "bfloat16" if measured["name"].startswith("gpu") else "float32"
    return (
        f"One chunk of a long prompt past a full window, in {dtype}: 576 is the width of SmolLM2-135M, 4,096 that of "
        "Llama 3 8B. In `sink_prefill`, each token sees exactly its own "
        "window. The plain chunk uses a `DynamicCache` of W tokens. `sink_prefill` rotates the four sink keys for each "
        "token of a chunk, so attention reads `4 * chunk` more keys. Their share of the time is largest with a small "
        "window, a small model and a large chunk.\n\n"
        + table(["width", "W", "chunk", "tokens per second", "throughput relative to the plain chunk"], lines)
    )


def session(measured: dict[str, Any], folder: Path) -> str:
    lines = [
        [f"{row['W']:,}", row["what"], median_and_quartiles(row["ms"], 1), median_and_quartiles(row["ratio"], 3)]
        for row in measured["rows"]
    ]
    return (
        f"A token of an answer of `SinkSession`, as text and from its own thread, against one of `sink_generate`, "
        f"{shape_of(measured)}. Starting an answer is part of it.\n\n"
        + table(["W", "", "ms per token", "ratio to sink_generate"], lines)
    )


def stream(measured: dict[str, Any], folder: Path) -> str:
    rows: Rows = measured["rows"]
    columns = table_columns(sorted({row["seen"] for row in rows}))
    figure, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(10, 4))
    lines = []
    for name in dict.fromkeys(row["cache"] for row in rows):
        curve = [row for row in rows if row["cache"] == name]
        seen = [row["seen"] for row in curve]
        time_axes.plot(seen, [row["ms"] for row in curve], "o-", label=name)
        memory_axes.plot(seen, [row["MiB"] for row in curve], "o-", label=name)
        lines.append([name, *(f"{row['ms']:,.0f} / {row['MiB']:,.0f}" for row in curve if row["seen"] in columns)])
    time_axes.set(xlabel="tokens seen", ylabel="ms per token", yscale="log")
    memory_axes.set(xlabel="tokens seen", ylabel="cache memory (MiB)")
    save(figure, memory_axes, folder / "stream.svg", legend="upper left")
    return (
        f"One decode step after a number of tokens seen: {shape_of(measured)}. The window length is 1,024 tokens. "
        "A cell shows milliseconds per token / MiB of cache.\n\n"
        + table(["tokens seen", *(f"{seen:,}" for seen in columns)], lines)
        + f"\n\n![Time per token and cache memory along a stream]({folder.name}/stream.svg)"
    )


def table_columns(seen: list[int]) -> list[int]:
    """Return the numbers of tokens to show in the table; the plot shows all."""
    return seen if len(seen) < 6 else [seen[i] for i in (0, 2, 4, -4, -3, -1)]


def memory(measured: dict[str, Any], folder: Path) -> str:
    lines = [[f"{row['W']:,}", row["dtype"], f"{row['MiB']:,.2f}", f"{row['over']:+.2%}"] for row in measured["rows"]]
    return (
        f"Memory of a full cache, including the original sink keys: {shape_of(measured)}. The last column compares it "
        "with `2 * layers * heads * W * head_dim * itemsize` bytes, where `heads` counts key-value heads.\n\n"
        + table(["W", "dtype", "MiB", "more than the formula"], lines)
    )


def construct(measured: dict[str, Any], folder: Path) -> str:
    columns = ("cpu ms", "ms", "busy cpu ms", "busy ms", "MiB")
    lines = [
        [row["model"], str(row["layers"]), *(median_and_quartiles(row[column], 0) for column in columns)]
        for row in measured["rows"]
    ]
    return (
        "The first `SinkCache(config)` of a process, for configs of large models. It measures how the model tells "
        "positions apart; later caches of an equal config use the result. PyTorch and the code of the model are loaded "
        "before. *Busy* means beside one process for each CPU that computes without a pause. The memory is the peak "
        "above what the process held before.\n\n"
        + table(["config", "layers", "CPU ms", "ms", "CPU ms, busy", "ms, busy", "MiB"], lines)
    )


TITLES: dict[str, tuple[str, Callable[[dict[str, Any], Path], str]]] = {
    "update": ("Cache update", update),
    "decode": ("Decode step", decode),
    "video": ("Against rotating all keys", video),
    "compiled": ("Compiled decode step", compiled),
    "prefill": ("Chunked prefill", prefill),
    "session": ("Session", session),
    "stream": ("Time and memory along a stream", stream),
    "memory": ("Memory", memory),
    "construct": ("First construction", construct),
}


def dtype_of(measured: dict[str, Any]) -> str:
    return "bfloat16" if measured["name"].startswith("gpu") else "float32"


def shape_of(measured: dict[str, Any]) -> str:
    if measured["name"].startswith("gpu"):
        return "shape of Llama 3 8B, bfloat16"
    if measured["name"] == "video":
        return "shape of the text model of Qwen2.5-VL-3B, four layers, a vocabulary of 8,192, float32"
    layers = ", six layers" if measured["name"] == "compiled" else ""
    return f"shape of SmolLM2-135M{layers}, float32"


def save(figure: Any, axes: Any, path: Path, legend: str) -> None:
    """Save a figure with a grid in each panel and a legend in `axes`."""
    axes.legend(fontsize=8, loc=legend)
    for panel in figure.axes:
        panel.grid(visible=True, alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def load(folder: Path, name: str) -> dict[str, Any]:
    """Return the recorded results of a section."""
    return {"name": name, **json.loads((folder / f"{name}.json").read_text())}


def write(output: Path) -> None:
    """Write the page and its plots from all recorded results."""
    mpl.rcParams["svg.hashsalt"] = "attention-sinks"  # equal results give equal files
    folder = output / "benchmarks"
    parts = [INTRODUCTION]
    for name in SECTIONS:
        path = folder / f"{name}.json"
        on_gpu = name.startswith("gpu_")
        title, render = TITLES[name.removeprefix("gpu_")]
        if not path.exists():
            continue
        measured = load(folder, name)
        source = (
            f"Measured by `python -m benchmarks {name}` on {measured['date']}: {measured['machine']}, "
            f"{measured['versions']}."
        )
        parts.append(f"## {title}{', on a GPU' if on_gpu else ''}\n\n{render(measured, folder)}\n\n{source}\n")
    if not list(folder.glob("gpu_*.json")):
        parts.append(
            "## On a GPU\n\nNot measured yet. On a machine with a CUDA device, `make bench` adds these tables for the "
            "shape of Llama 3 8B in bfloat16.\n"
        )
    (output / "benchmarks.md").write_text("\n".join(parts))
