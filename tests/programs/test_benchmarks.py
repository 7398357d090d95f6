"""The benchmarks run, and their page shows the measured figures."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import page

pytestmark = [pytest.mark.docs, pytest.mark.processes]

ROOT = Path(__file__).parents[2]


def test_every_section_runs_and_writes_its_table(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--quick", "--no-predecessors", "--output", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=600)
    written = (tmp_path / "benchmarks.md").read_text()
    for title, _ in page.TITLES.values():
        assert f"## {title}\n" in written
    assert written.count("| SinkCache") >= 3
    assert "Not measured yet" in written, "there is no GPU table without a GPU"
    assert {path.name for path in (tmp_path / "benchmarks").glob("*.svg")} == {"update.svg", "stream.svg"}


def test_the_page_shows_the_measured_figures(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs" / "benchmarks", tmp_path / "benchmarks")
    page.write(tmp_path)
    assert (tmp_path / "benchmarks.md").read_text() == (ROOT / "docs" / "benchmarks.md").read_text()


def test_a_cache_holds_at_most_two_per_cent_more_bytes_than_its_window() -> None:
    rows = page.load(ROOT / "docs" / "benchmarks", "memory")["rows"]
    assert rows
    assert all(0 <= row["over"] <= 0.02 for row in rows)
