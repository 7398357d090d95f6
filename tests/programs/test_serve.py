"""`transformers serve` and `transformers chat` with a model folder that holds what `make hub` built."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from attention_sinks import sink_generate

from ..support.hub import save_with_hub
from ..support.programs import ENVIRONMENT
from ..support.tokenizer import byte_tokenizer, chat_model

pytestmark = [pytest.mark.slow, pytest.mark.processes]

PROGRAM = str(Path(sys.executable).with_name("transformers"))
WINDOW = 64
CHUNK = 16
LENGTH = 48  # tokens of an answer
QUESTIONS = ["Hello, who are you?", "What did you say?", "And before that?", "Say it once more, please."]
# Console output is easier to read back if answers are made of letters.
LETTERS = set("abcdefghijklmnopqrstuvwxyz")


@pytest.fixture(scope="module")
def model() -> Any:
    tokenizer = byte_tokenizer()
    model = chat_model(eos_token_id=None, max_position_embeddings=4096)
    others = [i for i in range(model.config.vocab_size) if tokenizer.decode([i]) not in LETTERS]
    model.generation_config.update(suppress_tokens=others, pad_token_id=0, no_repeat_ngram_size=3)
    return model


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "model"
    save_with_hub(model, folder, window_length=WINDOW, prefill_chunk_size=CHUNK)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    """The address of a running `transformers serve`."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    command = [PROGRAM, "serve", str(folder), "--trust-remote-code", "--device", "cpu", "--port", str(port)]
    environment = {**ENVIRONMENT, "HF_MODULES_CACHE": str(folder.parent / "modules")}
    with (folder.parent / "log").open("w+") as log:
        process = subprocess.Popen(command, cwd=folder.parent, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            for _ in range(600):
                assert process.poll() is None, (folder.parent / "log").read_text()
                try:
                    urllib.request.urlopen(f"http://localhost:{port}/health", timeout=10).close()
                    break
                except (urllib.error.URLError, ConnectionError):
                    time.sleep(0.2)
            yield f"http://localhost:{port}"
        finally:
            process.terminate()
            process.wait(timeout=60)


def expected_answer(model: Any, messages: list[dict[str, str]], window_length: int) -> str:
    tokenizer = byte_tokenizer()
    inputs: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        output = sink_generate(
            model,
            **inputs,
            window_length=window_length,
            prefill_chunk_size=CHUNK,
            max_new_tokens=LENGTH,
            do_sample=False,
        )
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_a_served_conversation_several_times_the_window_has_the_answers_of_the_window(
    model: Any, folder: Path, server: str
) -> None:
    messages: list[dict[str, str]] = []
    num_tokens = 0
    answers, wider = [], []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        body = {"model": str(folder), "messages": messages, "max_tokens": LENGTH, "temperature": 0}
        request = urllib.request.Request(
            f"{server}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            reply = json.load(response)
        answers.append(reply["choices"][0]["message"]["content"])
        num_tokens = reply["usage"]["total_tokens"]
        assert answers[-1] == expected_answer(model, messages, WINDOW)
        wider.append(expected_answer(model, messages, 4096))
        messages.append({"role": "assistant", "content": answers[-1]})
    assert num_tokens > 5 * WINDOW
    assert answers[1:] != wider[1:], "the window makes no difference to this model"


def test_a_chat_past_the_window_shows_the_answers_of_the_window(model: Any, folder: Path, server: str) -> None:
    flags = [f"max_new_tokens={LENGTH}", "do_sample=False"]
    typed = "".join(f"{question}\nn\n" for question in QUESTIONS) + "!exit\n"  # `n`: an answer is not continued
    result = subprocess.run(
        [PROGRAM, "chat", str(folder), server, *flags],
        input=typed,
        env={**ENVIRONMENT, "HF_HUB_OFFLINE": "0"},  # or its client refuses even a server on this machine
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    messages: list[dict[str, str]] = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": expected_answer(model, messages, WINDOW)})
        assert messages[-1]["content"] in result.stdout
