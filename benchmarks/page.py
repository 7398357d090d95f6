"""`docs/benchmarks.md` and its plots, from the figures that were measured last."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

from .measure import spread

mpl.use("svg")
from matplotlib import pyplot as plt

SECTIONS = [
    "update", "decode", "compiled", "prefill", "session", "stream", "memory",
    "gpu_update", "gpu_decode", "gpu_compiled", "gpu_prefill",
]  # fmt: skip
# By its data sheet, bytes per second.
BANDWIDTH = {"NVIDIA H200": 4.8e12}

Rows = list[dict[str, Any]]

INTRODUCTION = """# Benchmarks

Written by `make bench` (`python -m benchmarks`); the figures behind each table are in [benchmarks/](benchmarks/). The
candidates of a table take turns in one process, round by round, and ratios are those of a round: medians, with the
quartiles in brackets. Weights are random; time does not depend on them. The *floor* is a cache that stores nothing and
returns as many keys as a full window has: the model's own time. The predecessors run for real, each in an environment
of its own.
"""


def table(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def update(measured: dict[str, Any], folder: Path) -> str:
    rows: Rows = measured["rows"]
    lengths = sorted({row["W"] for row in rows})
    figure, axes = plt.subplots(figsize=(7, 4))
    lines = []
    for name in dict.fromkeys(row["cache"] for row in rows):
        mine = {row["W"]: row["us"] for row in rows if row["cache"] == name}
        axes.plot(list(mine), [statistics.median(us) for us in mine.values()], "o-", label=name)
        lines.append([name, *(spread(mine[w], 0) if w in mine else "" for w in lengths)])
    axes.set(xscale="log", yscale="log", xlabel="window or length (tokens)", ylabel="µs for one layer's update")
    save(figure, axes, folder / f"{measured['name']}.svg", legend="center right")
    return (
        f"Microseconds to update a layer by one token, 8 heads of 128, {dtype_of(measured)}, in a cache of four "
        "layers, which share what a step does once.\n\n"
        + table(["", *(f"W = {w:,}" for w in lengths)], lines)
        + f"\n\n![Cost of an update against the window]({folder.name}/{measured['name']}.svg)"
    )


def decode(measured: dict[str, Any], folder: Path) -> str:
    header, lines = ["W", "", "ms per token", "ratio to the floor"], []
    bandwidth = BANDWIDTH.get(measured["machine"])
    on_gpu = "kernels" in measured["rows"][0]
    if on_gpu:
        header += ["kernels", "waits for the device", "share of the memory bandwidth"]
    for row in measured["rows"]:
        line = [f"{row['W']:,}", row["cache"], spread(row["ms"], 1), spread(row["ratio"], 3)]
        if on_gpu:
            seconds = statistics.median(row["ms"]) / 1e3
            share = (row["weights"] + row["cached"]) / seconds / bandwidth if bandwidth else None
            line += [str(row["kernels"]), "yes" if row["waits"] else "no", "" if share is None else f"{share:.0%}"]
        lines.append(line)
    return f"One decoded token with a full window, eager, {shape_of(measured)}.\n\n" + table(header, lines)


def compiled(measured: dict[str, Any], folder: Path) -> str:
    lines = [[f"{row['W']:,}", row["cache"], spread(row["ms"], 2), spread(row["ratio"], 3)] for row in measured["rows"]]
    return (
        f"The same under `torch.compile(model, fullgraph=True)`, {shape_of(measured)}. In a compiled model "
        "transformers does not leave out a mask that hides nothing, and repeats the keys of grouped heads where there "
        "is a mask: with a large window that costs more than compiling saves, whatever the cache.\n\n"
        + table(["W", "", "ms per token", "ratio to StaticCache, compiled"], lines)
    )


def prefill(measured: dict[str, Any], folder: Path) -> str:
    lines = [
        [f"{row['W']:,}", str(row["chunk"]), spread(row["tokens per s"], 0), spread(row["ratio"], 3)]
        for row in measured["rows"]
    ]
    return (
        "A long prompt in chunks (`sink_prefill`, every token with exactly its own window) past a full window, against "
        f"a plain chunk on a `DynamicCache` of W tokens, {shape_of(measured)}. Each token of a chunk has copies of the "
        "four sinks turned for its own window, so that attention meets `4 * chunk` more keys: beside a small window "
        "and in a small model, large chunks pay for them.\n\n"
        + table(["W", "chunk", "tokens per second", "throughput against the plain chunk"], lines)
    )


def session(measured: dict[str, Any], folder: Path) -> str:
    lines = [[f"{row['W']:,}", row["what"], spread(row["ms"], 1), spread(row["ratio"], 3)] for row in measured["rows"]]
    return (
        f"A token of an answer of `SinkSession`, as text and from its own thread, against one of `sink_generate`, "
        f"{shape_of(measured)}. Starting an answer is part of it.\n\n"
        + table(["W", "", "ms per token", "ratio to sink_generate"], lines)
    )


def stream(measured: dict[str, Any], folder: Path) -> str:
    rows: Rows = measured["rows"]
    places = sorted({row["seen"] for row in rows})
    figure, both = plt.subplots(1, 2, figsize=(10, 4))
    lines = []
    for name in dict.fromkeys(row["cache"] for row in rows):
        mine = [row for row in rows if row["cache"] == name]
        seen = [row["seen"] for row in mine]
        both[0].plot(seen, [row["ms"] for row in mine], "o-", label=name)
        both[1].plot(seen, [row["MiB"] for row in mine], "o-", label=name)
        figures = [f"{row['ms']:,.0f} / {row['MiB']:,.0f}" for row in mine if row["seen"] in shown(places)]
        lines.append([name, *figures])
    both[0].set(xlabel="tokens seen", ylabel="ms per token", yscale="log")
    both[1].set(xlabel="tokens seen", ylabel="MiB of cache")
    save(figure, both[1], folder / "stream.svg", legend="upper left")
    return (
        f"Decoding along one stream, {shape_of(measured)}; the windows hold 1,024 tokens. "
        "Milliseconds per token / MiB of cache.\n\n"
        + table(["tokens seen", *(f"{place:,}" for place in shown(places))], lines)
        + f"\n\n![Time per token and memory along a stream]({folder.name}/stream.svg)"
    )


def shown(places: list[int]) -> list[int]:
    return places if len(places) < 6 else [places[i] for i in (0, 2, 4, -4, -3, -1)]


def memory(measured: dict[str, Any], folder: Path) -> str:
    lines = [[f"{row['W']:,}", row["dtype"], f"{row['MiB']:,.2f}", f"{row['over']:+.2%}"] for row in measured["rows"]]
    return (
        "The bytes of a full cache, pristine sinks included, against `2 * layers * heads * W * head_dim * itemsize`, "
        f"{shape_of(measured)}.\n\n" + table(["W", "dtype", "MiB", "over the formula"], lines)
    )


TITLES: dict[str, tuple[str, Callable[[dict[str, Any], Path], str]]] = {
    "update": ("One update", update),
    "decode": ("A decoded token against the floor", decode),
    "compiled": ("Compiled", compiled),
    "prefill": ("Long prompts", prefill),
    "session": ("Sessions", session),
    "stream": ("Along a stream", stream),
    "memory": ("Memory", memory),
}


def dtype_of(measured: dict[str, Any]) -> str:
    return "bfloat16" if measured["name"].startswith("gpu") else "float32"


def shape_of(measured: dict[str, Any]) -> str:
    if measured["name"].startswith("gpu"):
        return "the shape of Llama 3 8B in bfloat16"
    layers = "six layers of " if measured["name"] in ("compiled", "prefill") else ""
    return f"{layers}the shape of SmolLM2-135M in float32"


def save(figure: Any, axes: Any, path: Path, legend: str) -> None:
    axes.legend(fontsize=8, loc=legend)
    for one in figure.axes:
        one.grid(visible=True, alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def load(folder: Path, name: str) -> dict[str, Any]:
    """What was measured for a section."""
    return {"name": name, **json.loads((folder / f"{name}.json").read_text())}


def write(output: Path) -> None:
    """Write the page of all that was measured."""
    mpl.rcParams["svg.hashsalt"] = "attention-sinks"  # the same figures give the same file
    folder = output / "benchmarks"
    parts = [INTRODUCTION]
    for name in SECTIONS:
        path = folder / f"{name}.json"
        on_gpu = name.startswith("gpu_")
        title, render = TITLES[name.removeprefix("gpu_")]
        if not path.exists():
            continue
        measured = load(folder, name)
        where = f"{measured['machine']}, {measured['versions']}, {measured['date']}"
        command = f"`python -m benchmarks {name}`"
        parts.append(
            f"## {title}{', on a GPU' if on_gpu else ''}\n\n{render(measured, folder)}\n\n{command}: {where}.\n"
        )
    if not list(folder.glob("gpu_*.json")):
        parts.append(
            "## On a GPU\n\nNot measured yet: no CUDA device was at hand. On one `make bench` adds the tables, for the "
            "shape of Llama 3 8B in bfloat16.\n"
        )
    (output / "benchmarks.md").write_text("\n".join(parts))
