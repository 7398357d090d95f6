"""The figures of an evaluation equal their definitions."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from attention_sinks import SinkCache
from attention_sinks.evaluate import Scores, binned, curves, perplexity_from, plot, write_csv

from ..support.models import CACHE, build_config, build_model, random_ids, tiny_model

LENGTH, WINDOW = 90, 24


pytestmark = pytest.mark.usefixtures("no_grad")


def joined(scores: Any) -> Scores:
    return Scores(*(torch.cat(parts) for parts in zip(*scores, strict=True)))


def losses(logits: Tensor, ids: Tensor) -> Tensor:
    return cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")


def test_every_token_is_scored_once_by_the_definition_of_its_curve() -> None:
    model, ids = tiny_model("llama", num_hidden_layers=2), random_ids(LENGTH)
    found = curves(model, ids, WINDOW, [4, 0], ["dense", "window", "recompute"], recompute_every=7)
    assert list(found) == ["dense", "window", "4 sinks", "recompute"]
    scored = {name: joined(scores) for name, scores in found.items()}
    for name in ("dense", "window", "4 sinks"):
        assert scored[name].positions.tolist() == list(range(1, LENGTH))
    assert torch.allclose(scored["dense"].losses, losses(model(ids).logits, ids), atol=1e-4)
    for name, num_sink_tokens in (("window", 0), ("4 sinks", 4)):
        cache = SinkCache(model.config, WINDOW, num_sink_tokens)
        logits = torch.cat([model(token, **{CACHE: cache}).logits for token in ids.split(1, dim=1)], dim=1)
        assert torch.allclose(scored[name].losses, losses(logits, ids), atol=1e-3)
    assert scored["recompute"].positions.tolist() == list(range(WINDOW, LENGTH, 7))
    for position, loss in zip(*scored["recompute"], strict=True):
        window = ids[:, int(position) - WINDOW : int(position)]
        expected = cross_entropy(model(window).logits[0, -1:], ids[0, position][None])
        assert float(loss) == pytest.approx(float(expected), abs=1e-4)


def test_the_dense_curve_ends_where_the_positions_of_the_model_end() -> None:
    model = build_model(build_config("gptj", num_hidden_layers=1, max_position_embeddings=300))
    ids = random_ids(700)
    found = curves(model, ids, WINDOW, [4], ["dense"])
    assert int(joined(found["dense"]).positions[-1]) == 300
    assert int(joined(found["4 sinks"]).positions[-1]) == 699


def test_bins_keep_the_mean_and_the_files_keep_the_bins(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = Scores(torch.arange(1, 101), torch.rand(100, generator=generator) * 3)
    rows = {"4 sinks": binned([scores], 16)}
    assert [row["position"] for row in rows["4 sinks"]] == list(range(0, 101, 16))
    assert sum(row["tokens"] for row in rows["4 sinks"]) == 100
    assert perplexity_from(rows["4 sinks"], 0) == pytest.approx(scores.perplexity, rel=1e-3)
    late = math.exp(float(scores.losses[47:].mean()))
    assert perplexity_from(rows["4 sinks"], 48) == pytest.approx(late, rel=1e-3)
    assert math.isnan(perplexity_from(rows["4 sinks"], 1000))
    write_csv(rows, tmp_path / "p.csv")
    with (tmp_path / "p.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert read == [{"cache": "4 sinks"} | {key: str(value) for key, value in row.items()} for row in rows["4 sinks"]]
    plot(rows, tmp_path / "p.png", "title")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
