"""The command line runs in processes, and its chat in a real terminal."""

import csv
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from attention_sinks import SinkCache

from ..support.models import CACHE
from ..support.programs import COMMAND, ENVIRONMENT
from ..support.tokenizer import WORDS, byte_tokenizer, chat_model

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model whose answers never end by themselves."""
    path = tmp_path_factory.mktemp("model")
    model = chat_model(eos_token_id=None)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox. " * 30, encoding="utf-8")
    return path


def run(*arguments: object, directory: Path) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=directory, env=ENVIRONMENT, timeout=300, check=False
    )


@pytest.mark.parametrize("command", ["chat", "generate", "perplexity", "recall", "info"])
def test_help_shows_the_usage_of_every_command(command: str, tmp_path: Path) -> None:
    result = run(command, "--help", directory=tmp_path)
    assert result.returncode == 0
    assert f"Usage: python -m attention_sinks.cli {command}" in result.stdout
    assert "--window-length" in result.stdout


def test_bad_input_gives_one_line_and_exit_code_two(folder: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    (tmp_path / "short.txt").write_text("abc")
    refused = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=259)).save_pretrained(refused)
    silent = tmp_path / "silent"
    byte_tokenizer(None).save_pretrained(silent)
    for name in ("config.json", "model.safetensors"):
        (silent / name).symlink_to(folder / name)
    for arguments, message in [
        (
            ("info", refused),
            "does not support the model type 'gpt2': its cached keys and values depend on absolute positions",
        ),
        (("chat", "-m", silent), "has no chat template. Choose a model that was trained to chat"),
        (("chat", "-m", folder, "-w", 20, "--system", "Be a good boy. " * 9), "`system` must fit the window"),
        (("chat", "-m", "no-such-folder-here"), "no-such-folder-here"),
        (("perplexity", "latin.txt"), "latin.txt is not UTF-8 (byte 1)"),
        (("perplexity", "nothing.txt"), "No such file or directory: 'nothing.txt'"),
        (("perplexity", text, "--baselines", "dense,best"), "must be names from dense, window, recompute, got 'best'"),
        (("perplexity", text, "-s", "4,x"), "must be numbers from 0 to 255 (below `--window-length`), got 'x'"),
        (("perplexity", text, "-s", ""), "There is nothing to measure"),
        (("perplexity", text, "-o", "missing/p"), "`--output` must be in an existing folder"),
        (("perplexity", "short.txt", "-m", folder), "must be longer than the window, got 3 tokens"),
        (("generate", "-m", folder), "Give either PROMPT or `--file`"),
        (("generate", "", "-m", folder), "the text is empty"),
        (("generate", "a", "-m", folder, "-w", 4), "`num_sink_tokens` must be smaller than `window_length`"),
    ]:
        result = run(*arguments, directory=tmp_path)
        assert result.returncode == 2, arguments
        (line,) = result.stderr.splitlines()
        assert line.startswith("attention-sinks: ")
        assert message in line
    for arguments in (("chat", "--window-length", "x"), ("chatter",), ("generate", "a", "--max-new-tokens", 0)):
        result = run(*arguments, directory=tmp_path)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr


def test_without_the_cli_extra_the_error_says_what_to_install(tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['typer'] = None; import attention_sinks.cli"
    result = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert 'pip install "attention-sinks[cli]>=1"' in line


def test_info_shows_how_the_cache_supports_the_model_and_how_much_it_holds(folder: Path, tmp_path: Path) -> None:
    result = run("info", folder, "-w", 100, "--dtype", "float32", directory=tmp_path)
    assert result.returncode == 0, result.stderr
    model: Any = chat_model()
    cache = SinkCache(model.config, 100)
    with torch.no_grad():
        model(torch.ones(1, 1, dtype=torch.long), **{CACHE: cache})
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    for words in (
        "supported: exact",
        "layers 0-1",
        "RoPE: 16 rotary dimensions from dimension 0, rotate-half layout, wavelengths 6.3 to ",
        f"{held * 10 / 2**20:.2f} MiB for 1,000 tokens of window, float32",
        f"{held / 2**20:.2f} MiB for this window of 100",
    ):
        assert words in result.stdout


def test_generate_continues_past_the_window_and_repeats_itself_with_the_same_seed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("Once upon a time " * 10)
    arguments = "generate", "--file", "long.txt", "-m", folder, "-w", 32, "--max-new-tokens", 80
    first, second = (run(*arguments, directory=tmp_path) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert first.stdout.startswith("Once upon a time " * 10)
    assert len(first.stdout) > 170 + 30


def test_perplexity_writes_curves_and_a_table(folder: Path, text: Path, tmp_path: Path) -> None:
    result = run(
        "perplexity", text, text, "-m", folder, "-w", 64, "-s", "2,4", "--baselines", "dense,window,recompute",
        "--max-tokens", 500, "-o", "out", directory=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = ["dense", "window", "2 sinks", "4 sinks", "recompute"]
    assert list(dict.fromkeys(row["cache"] for row in rows)) == names
    assert {sum(int(row["tokens"]) for row in rows if row["cache"] == name) for name in names[:4]} == {499}
    assert (tmp_path / "out.png").stat().st_size > 10_000
    for name in names:
        assert re.search(rf"│ {name} +│ +[\d,.]+ +│ +[\d,.]+ +│", result.stdout)


def test_recall_writes_curves_and_a_table(tmp_path: Path) -> None:
    chat_model(vocab_size=259 + len(WORDS)).save_pretrained(tmp_path / "model")
    byte_tokenizer(words=WORDS).save_pretrained(tmp_path / "model")
    arguments = ("recall", "-m", "model", "-w", 64, "-s", 2, "--distances", "5,10", "--num-lines", 30)
    result = run(*arguments, "--num-streams", 2, "-o", "out", directory=tmp_path)
    assert result.returncode == 0, result.stderr
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["cache"], row["distance"]) for row in rows] == [
        (name, distance) for name in ("dense", "window", "2 sinks") for distance in ("5", "10")
    ]
    assert (tmp_path / "out.png").stat().st_size > 10_000
    for distance in (5, 10):
        assert re.search(rf"│ {distance} +│ +[\d,]+ +│ +\d+ +(│ +\d+% +){{3}}│", result.stdout)


class Terminal:
    """A process in its own terminal."""

    def __init__(self, *arguments: object, directory: Path) -> None:
        self.screen, inside = pty.openpty()
        # The terminal controls a new session, so that its keys become signals; the process does not ignore them.
        take_it = (
            "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
            "signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", take_it, *COMMAND, *map(str, arguments)],
            stdin=inside, stdout=inside, stderr=inside, start_new_session=True, cwd=directory, env=ENVIRONMENT,
        )  # fmt: skip
        os.close(inside)
        self._unread = ""

    def read_until(self, words: str, seconds: float = 120) -> str:
        """Return the output up to and including `words`."""
        end = time.monotonic() + seconds
        while words not in self._unread:
            assert time.monotonic() < end, f"{words!r} did not appear: {self._unread!r}"
            if select.select([self.screen], [], [], 0.2)[0]:
                self._unread += os.read(self.screen, 4096).decode(errors="replace")
        before, found, self._unread = self._unread.partition(words)
        return before + found

    def type(self, keys: str) -> None:
        os.write(self.screen, keys.encode())


@pytest.fixture
def chat(folder: Path, tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal("chat", "-m", folder, "-w", 64, directory=tmp_path)
    yield terminal
    terminal.process.kill()
    terminal.process.wait()
    os.close(terminal.screen)


def test_a_chat_continues_past_the_window_and_ctrl_c_stops_only_the_answer(chat: Terminal, tmp_path: Path) -> None:
    chat.read_until("> ")
    seen = 0
    for message in ("Hello", "And again", "And a third time"):
        chat.type(message + "\n")
        chat.read_until(message)
        time.sleep(1.5)
        chat.type("\x03")
        status = re.search(
            r"([\d,]+) tokens seen · ([\d,]+) kept · ([\d.]+) MiB · [\d.]+ tokens per second",
            chat.read_until("tokens per second"),
        )
        assert status is not None
        now, kept = (int(status[i].replace(",", "")) for i in (1, 2))
        assert now > seen + 20
        assert kept == min(now - 1, 64)
        seen = now
        chat.read_until("> ")
    assert seen > 3 * 64
    chat.type("\x03")
    chat.read_until("/reset clears")
    chat.type("/save conversation.md\n")
    chat.read_until("6 messages in conversation.md")
    saved = (tmp_path / "conversation.md").read_text(encoding="utf-8")
    assert saved.count("## user") == saved.count("## assistant") == 3
    assert "And a third time" in saved
    chat.type("/save\n")
    chat.read_until("needs the name of a file")
    chat.type("/save missing/folder\n")
    chat.read_until("No such file")
    chat.type("/reset\n")
    chat.read_until("conversation cleared")
    chat.read_until("> ")
    chat.type("\x04")
    assert chat.process.wait(timeout=60) == 0
