"""How well a model predicts a text through a `SinkCache`, and through what the paper compares it with.

StreamingLLM (arXiv 2309.17453) calls them dense attention (a cache that keeps everything), window attention (no sinks)
and the sliding window with recomputation (no cache, the last tokens anew for each prediction): Figure 3 and Table 2.
"""

import csv
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel

from .cache import SinkCache
from .compat import with_cache
from .prefill import last_logits_only, sink_prefill

DENSE_CHUNK_SIZE = 256
RECOMPUTE_BATCH_SIZE = 8


class Scores(NamedTuple):
    """The negative log-likelihoods `[n]`, in nats, of the tokens at `positions` `[n]` of a text."""

    positions: Tensor
    losses: Tensor

    @property
    def perplexity(self) -> float:
        return math.exp(float(self.losses.mean()))


def curves(
    model: PreTrainedModel,
    input_ids: Tensor,
    window_length: int,
    num_sink_tokens: Iterable[int] = (),
    baselines: Iterable[str] = (),
    recompute_every: int = 16,
) -> dict[str, Iterator[Scores]]:
    """What is to be compared on a text `[1, length]`, by name: a `SinkCache` for each number of sinks, and baselines.

    Args:
        model: a causal language model.
        input_ids: the text.
        window_length: the most tokens that a `SinkCache`, and recomputation, see.
        num_sink_tokens: numbers of sinks; 0 is window attention.
        baselines: of `"dense"`, `"window"` and `"recompute"`.
        recompute_every: recomputation scores one token of so many.
    """
    found: dict[str, Iterator[Scores]] = {}
    if "dense" in baselines:
        found["dense"] = _through_all(model, input_ids)
    sinks = {*num_sink_tokens} | ({0} if "window" in baselines else set())
    for num in sorted(sinks):
        name = "window" if num == 0 else f"{num} sink{'s' * (num > 1)}"
        found[name] = _through_sinks(model, input_ids, window_length, num)
    if "recompute" in baselines:
        found["recompute"] = _recomputed(model, input_ids, window_length, recompute_every)
    return found


def _through_sinks(
    model: PreTrainedModel, input_ids: Tensor, window_length: int, num_sink_tokens: int
) -> Iterator[Scores]:
    """Score a text `[1, length]` through a `SinkCache`, each token with exactly its own window.

    `num_sink_tokens=0` is window attention.
    """
    cache = SinkCache(model.config, window_length, num_sink_tokens)
    return _scored(input_ids, (_logits(output) for output in sink_prefill(model, input_ids, cache)))


def _through_all(model: PreTrainedModel, input_ids: Tensor) -> Iterator[Scores]:
    """Score a text `[1, length]` through a cache that keeps everything.

    It ends where the positions of the model end, or change their meaning.
    """

    limit = SinkCache(model.config).position_limit

    @torch.no_grad()
    def logits() -> Iterator[Tensor]:
        cache = DynamicCache(config=model.config)
        for chunk in input_ids[:, :limit].split(DENSE_CHUNK_SIZE, dim=1):
            yield _logits(model(input_ids=chunk, use_cache=True, **with_cache(model.forward, cache)))

    return _scored(input_ids, logits())


@torch.no_grad()
def _recomputed(model: PreTrainedModel, input_ids: Tensor, window_length: int, every: int = 1) -> Iterator[Scores]:
    """Score each `every`-th token of a text `[1, length]` from the `window_length` tokens before it, without a cache.

    The yardstick, in `window_length` times the work.
    """
    length = input_ids.shape[1]
    ends = torch.arange(window_length, length, every)
    for some in ends.split(RECOMPUTE_BATCH_SIZE):
        windows = torch.cat([input_ids[:, end - window_length : end] for end in some.tolist()])
        logits = model(input_ids=windows, use_cache=False, **last_logits_only(model)).logits[:, -1]
        yield Scores(some, _losses(logits, input_ids[0, some.to(input_ids.device)]))


def _logits(output: Any) -> Tensor:
    logits: Tensor = output.logits
    return logits


def _scored(input_ids: Tensor, logits: Iterable[Tensor]) -> Iterator[Scores]:
    """Scores from the logits `[1, chunk, vocab_size]` of a text in chunks."""
    seen = 0
    for chunk in logits:
        targets = input_ids[0, seen + 1 : seen + 1 + chunk.shape[1]]
        positions = torch.arange(seen + 1, seen + 1 + len(targets))
        seen += chunk.shape[1]
        if len(targets) > 0:
            yield Scores(positions, _losses(chunk[0, : len(targets)], targets))


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.float(), targets, reduction="none").cpu()


def binned(scores: Iterable[Scores], bin_length: int) -> list[dict[str, Any]]:
    """Perplexity along a text: a row for every `bin_length` positions."""
    pieces = list(scores)
    positions, losses = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    bins = positions // bin_length
    rows = []
    for index in bins.unique().tolist():
        inside = Scores(positions[bins == index], losses[bins == index])
        rows.append(
            {"position": index * bin_length, "tokens": len(inside.losses), "perplexity": round(inside.perplexity, 4)}
        )
    return rows


def perplexity_from(rows: Iterable[dict[str, Any]], first: int) -> float:
    """The perplexity of all tokens in the rows that begin at position `first` or later."""
    late = [(row["tokens"], math.log(row["perplexity"])) for row in rows if row["position"] >= first]
    tokens = sum(count for count, _ in late)
    return math.exp(sum(count * loss for count, loss in late) / tokens) if tokens > 0 else math.nan


def write_csv(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Write the rows of every curve, with its name, to a file."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["cache", "position", "tokens", "perplexity"])
        for name, bins in rows.items():
            writer.writerows([name, *row.values()] for row in bins)


def plot(rows: dict[str, list[dict[str, Any]]], path: Path, title: str, context: int | None = None) -> None:
    """Draw perplexity over position, a line for each curve, as a PNG; `context` is the length the model can read."""
    from matplotlib.figure import Figure  # of the command line's extra

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    last = max(bins[-1]["position"] for bins in rows.values())
    if context is not None and context < last:
        axes.axvline(context, color="grey", linestyle="--", linewidth=1, label=f"context of the model, {context:,}")
    for name, bins in rows.items():
        # What scores only some tokens is a cloud of points.
        style = {"marker": ".", "linestyle": "none", "color": "black"} if name == "recompute" else {"linewidth": 1.5}
        axes.plot([row["position"] for row in bins], [row["perplexity"] for row in bins], label=name, **style)
    axes.set(xlabel="position in the text (tokens)", ylabel="perplexity", yscale="log", title=title)
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(fontsize=8, ncols=2, loc="upper left")
    figure.savefig(path, dpi=120)
