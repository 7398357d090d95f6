"""Nothing grows along a stream: the short form of `python -m benchmarks.soak`, in a process."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.docs, pytest.mark.processes]

ROOT = Path(__file__).parents[2]


def test_memory_and_error_are_flat_along_a_stream(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.soak", "--tokens", "60000", "--samples", "20"]
    command += ["--output", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600, stdout=subprocess.DEVNULL)
    with (tmp_path / "soak.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    assert int(rows[-1]["tokens"]) >= 60_000, "positions are rebased on the way"
    warm = rows[4:]
    assert max(float(row["MiB"]) for row in warm) < float(warm[0]["MiB"]) + 4
    objects = [int(row["objects"]) for row in warm]
    assert max(objects) < min(objects) + 2000
    assert max(float(row["error"]) for row in rows) < 2e-4
    assert (tmp_path / "soak.svg").stat().st_size > 0
