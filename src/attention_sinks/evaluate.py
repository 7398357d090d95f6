"""Perplexity of a model along a text, with a `SinkCache` and with the baselines of StreamingLLM (arXiv 2309.17453).

The baselines are those of Figure 3 and Table 2 of the paper: dense attention (the cache keeps all tokens), window
attention (no sink tokens), and sliding window with recomputation (no cache; each prediction recomputes the window).
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
from .inputs import check_token_ids
from .models import view_of
from .prefill import last_logits_only, sink_prefill

DENSE_CHUNK_SIZE = 256
RECOMPUTE_BATCH_SIZE = 8


class Scores(NamedTuple):
    """Negative log-likelihoods `[n]`, in nats, of the tokens at `positions` `[n]` of a text."""

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
    """Return the scores of a text by name of the cache: one `SinkCache` per number of sink tokens, and the baselines.

    The scores are computed while you iterate over them.

    Args:
        model: causal language model.
        input_ids: token ids of the text, `[1, length]`.
        window_length: window of each `SinkCache` and of the recompute baseline, in tokens.
        num_sink_tokens: numbers of sink tokens to compare; 0 is window attention.
        baselines: names from `"dense"`, `"window"` and `"recompute"`.
        recompute_every: distance between the tokens that the recompute baseline scores.

    Raises:
        TypeError, ValueError: naming the argument and its value.
    """
    model = view_of(model)
    check_token_ids("input_ids", input_ids, model)
    if len(input_ids) != 1:
        raise ValueError(f"`input_ids` must be one text, [1, length], got {[*input_ids.shape]}. Score rows one by one.")
    numbers: list[int | None] = [*sorted({*num_sink_tokens} | ({0} if "window" in baselines else set()))]
    if "dense" in baselines:
        numbers.insert(0, None)
    scores = {
        curve_name(number): _score_chunks(input_ids, logits_along(model, input_ids, window_length, number))
        for number in numbers
    }
    if "recompute" in baselines:
        scores["recompute"] = _score_recomputed(model, input_ids, window_length, recompute_every)
    return scores


def logits_along(
    model: PreTrainedModel, input_ids: Tensor, window_length: int, num_sink_tokens: int | None
) -> Iterator[Tensor]:
    """Yield the logits `[1, chunk_length, vocab_size]` along a text `[1, length]`, chunk by chunk.

    Args:
        model: causal language model.
        input_ids: token ids of the text.
        window_length: window of the `SinkCache`, in tokens. Each token sees exactly its own window.
        num_sink_tokens: number of sink tokens; None for a cache that keeps all tokens, with which the text ends at the
            position limit of the model.
    """
    if num_sink_tokens is None:
        yield from _dense_logits(model, input_ids)
    else:
        cache = SinkCache(model.config, window_length, num_sink_tokens)
        for output in sink_prefill(model, input_ids, cache):
            yield _logits(output)


@torch.no_grad()
def _dense_logits(model: PreTrainedModel, input_ids: Tensor) -> Iterator[Tensor]:
    limit = SinkCache(model.config).position_limit
    cache = DynamicCache(config=model.config)
    for chunk in input_ids[:, :limit].split(DENSE_CHUNK_SIZE, dim=1):
        yield _logits(model(input_ids=chunk, use_cache=True, **with_cache(model.forward, cache)))


def curve_name(num_sink_tokens: int | None) -> str:
    """Return what the curve of a cache is called, see `logits_along`."""
    if num_sink_tokens is None:
        return "dense"
    return "window" if num_sink_tokens == 0 else f"{num_sink_tokens} sink{'s' * (num_sink_tokens > 1)}"


@torch.no_grad()
def _score_recomputed(
    model: PreTrainedModel, input_ids: Tensor, window_length: int, every: int = 1
) -> Iterator[Scores]:
    """Score each `every`-th token of a text `[1, length]` without a cache, from the `window_length` tokens before it.

    Each score needs a forward pass over the whole window.
    """
    length = input_ids.shape[1]
    targets = torch.arange(window_length, length, every)
    for batch in targets.split(RECOMPUTE_BATCH_SIZE):
        windows = torch.cat([input_ids[:, target - window_length : target] for target in batch.tolist()])
        logits = model(input_ids=windows, use_cache=False, **last_logits_only(model)).logits[:, -1]
        yield Scores(batch, _losses(logits, input_ids[0, batch.to(input_ids.device)]))


def _logits(output: Any) -> Tensor:
    logits: Tensor = output.logits
    return logits


def _score_chunks(input_ids: Tensor, logits: Iterable[Tensor]) -> Iterator[Scores]:
    """Score a text `[1, length]` from the logits `[1, chunk_length, vocab_size]` of its chunks."""
    start = 1  # the first token has no prediction
    for chunk in logits:
        targets = input_ids[0, start : start + chunk.shape[1]]
        positions = torch.arange(start, start + len(targets))
        start += chunk.shape[1]
        if len(targets) > 0:
            yield Scores(positions, _losses(chunk[0, : len(targets)], targets))


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.float(), targets, reduction="none").cpu()


def binned(scores: Iterable[Scores], bin_length: int) -> list[dict[str, Any]]:
    """Return the perplexity along a text: one row for each bin of `bin_length` positions."""
    positions, losses = (torch.cat(parts) for parts in zip(*scores, strict=True))
    bins = positions // bin_length
    rows = []
    for index in bins.unique().tolist():
        scored = Scores(positions[bins == index], losses[bins == index])
        rows.append(
            {"position": index * bin_length, "tokens": len(scored.losses), "perplexity": round(scored.perplexity, 4)}
        )
    return rows


def perplexity_from(rows: Iterable[dict[str, Any]], first: int) -> float:
    """Return the perplexity of all tokens in the rows that start at position `first` or later."""
    selected = [(row["tokens"], math.log(row["perplexity"])) for row in rows if row["position"] >= first]
    tokens = sum(count for count, _ in selected)
    return math.exp(sum(count * loss for count, loss in selected) / tokens) if tokens > 0 else math.nan


def write_csv(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Write the rows of every curve to a CSV file; the first column is the name of the curve."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["cache", "position", "tokens", "perplexity"])
        for name, bins in rows.items():
            writer.writerows([name, *row.values()] for row in bins)


def plot(rows: dict[str, list[dict[str, Any]]], path: Path, title: str, context: int | None = None) -> None:
    """Plot perplexity over position as a PNG file, one line for each curve.

    Args:
        rows: rows of each curve, by name.
        path: file to write.
        title: title of the plot.
        context: context length of the model in tokens; a vertical line marks it.
    """
    from matplotlib.figure import Figure  # an optional dependency, in the extra `cli`

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    last = max(bins[-1]["position"] for bins in rows.values())
    if context is not None and context < last:
        axes.axvline(
            context, color="grey", linestyle="--", linewidth=1, label=f"context length of the model: {context:,}"
        )
    for name, bins in rows.items():
        # Recomputation scores only some tokens, so draw points instead of a line.
        style = {"marker": ".", "linestyle": "none", "color": "black"} if name == "recompute" else {"linewidth": 1.5}
        axes.plot([row["position"] for row in bins], [row["perplexity"] for row in bins], label=name, **style)
    axes.set(xlabel="position in the text (tokens)", ylabel="perplexity", yscale="log", title=title)
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(fontsize=8, ncols=2, loc="upper left")
    figure.savefig(path, dpi=120)
