"""A model on several devices gives the results of one device, and every layer keeps its ring with its states."""

import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from attention_sinks import SinkCache, SinkSession

from ..support.counting import Transfers
from ..support.distributed import SHARED, STREAMS, prompt, streams
from ..support.models import CACHE, build_config, build_model, random_ids, relative_error
from ..support.streams import S, W
from ..support.tokenizer import byte_tokenizer

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
# They have two heads of keys, one for each of two processes.
ARCHITECTURES = ["llama", "qwen3"]


def launched(command: list[str], processes: int) -> str:
    """Run a command that starts several processes; return what it prints."""
    hidden = {} if torch.cuda.device_count() >= processes else {"CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **hidden}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    ) as launcher:
        try:
            printed, errors = launcher.communicate(timeout=240)
        finally:  # SIGTERM makes the launcher end its processes
            if launcher.poll() is None:
                launcher.send_signal(signal.SIGTERM)
    assert launcher.returncode == 0, (command, printed[-500:], errors[-3000:])
    return printed


def test_a_cache_among_the_inputs_of_a_module_stays_where_its_layers_are() -> None:
    """`accelerate` moves the inputs of a module that it has placed by their method `to`."""
    accelerate: Any = pytest.importorskip("accelerate")
    model = build_model(build_config("llama"))
    ids = random_ids(40)
    plain, other = SinkCache(model.config, W, S), SinkCache(model.config, W, S)
    chunks = ids.split([5, 20, 1, 1, 13], dim=1)
    with torch.no_grad():
        expected = [model(chunk, **{CACHE: plain}).logits for chunk in chunks]
        offloaded = accelerate.cpu_offload(model, execution_device="cpu")
        for chunk, logits in zip(chunks, expected, strict=True):
            assert torch.equal(offloaded(chunk, **{CACHE: other}).logits, logits)
    sent = accelerate.utils.send_to_device({CACHE: other}, "meta")[CACHE]
    assert sent is other
    assert all(layer.keys.device.type == "cpu" for layer in other.layers)


# --- processes that share a model


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of each stream in one process and in each of two processes, by architecture."""
    target = tmp_path_factory.mktemp("shared")
    folders = {name: str(target / name) for name in ARCHITECTURES}
    for name, folder in folders.items():
        build_model(build_config(name, num_hidden_layers=2, vocab_size=98)).save_pretrained(folder)
    launched([*LAUNCH, "2", "-m", "tests.support.distributed", str(target), *folders.values()], processes=2)
    processes = [torch.load(target / f"{rank}.pt") for rank in range(2)]
    found: dict[str, Any] = {
        name: (streams(folder), [results[folder] for results in processes]) for name, folder in folders.items()
    }
    return {**found, "refusals": [results["refusal"] for results in processes]}


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_processes_that_share_a_model_give_the_results_of_one(architecture: str, stream: str, shared: Any) -> None:
    alone, processes = shared[architecture]
    expected = alone[stream]
    for process in processes:
        actual = process[stream]
        assert actual.keys() == expected.keys()
        if "ids" in expected:
            assert torch.equal(actual["ids"], expected["ids"])
        if "logits" in expected:
            assert relative_error(actual["logits"], expected["logits"]) < 1e-4


@pytest.mark.parametrize("stream", [name for name in STREAMS if name != "by_beams"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_process_holds_only_its_own_heads(architecture: str, stream: str, shared: Any) -> None:
    alone, processes = shared[architecture]
    for states in ("keys", "values"):
        whole, parts = alone[stream][states], [process[stream][states] for process in processes]
        assert [part.shape[2] for part in parts] == [whole.shape[2] // 2] * 2
        assert relative_error(torch.cat(parts, dim=2), whole) < 1e-4


def test_a_file_with_the_heads_of_another_process_is_refused(shared: Any) -> None:
    assert "it has the heads of process 1 of 2. Save a file for each process" in shared["refusals"][0]
    assert shared["refusals"][1] == "", "it is its own"


# --- layers on several devices, or on the disk


BEGIN, END = ("model.embed_tokens", "model.rotary_emb"), ("model.norm", "lm_head")
LAYERS = [f"model.layers.{i}" for i in range(4)]
OFFLOADED = {
    "every other layer": dict.fromkeys([*BEGIN, *LAYERS[::2], "model.norm"], "cpu")
    | dict.fromkeys([*LAYERS[1::2], "lm_head"], "disk"),
    "all but the embedding": dict.fromkeys(BEGIN, "cpu") | dict.fromkeys([*LAYERS, *END], "disk"),
}


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("four-layers")
    build_model(build_config("llama", num_hidden_layers=4)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("on_disk", OFFLOADED)
def test_layers_on_the_disk_give_the_results_of_layers_in_memory(
    on_disk: str, four_layers: str, tmp_path: Path
) -> None:
    expected = streams(four_layers)
    actual = streams(four_layers, device_map=OFFLOADED[on_disk], offload_folder=str(tmp_path))
    for stream, results in expected.items():
        for name, result in results.items():
            assert torch.equal(actual[stream][name], result)


@pytest.mark.skipif(
    "tp_plan" in SHARED, reason="early transformers 5 computes nothing of a model that is all on the disk"
)
def test_a_session_with_a_model_on_the_disk_is_resumed(tmp_path: Path) -> None:
    build_model(build_config("llama", num_hidden_layers=2, vocab_size=259)).save_pretrained(tmp_path / "model")
    answers = []
    for options in ({}, {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "offload")}):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options)
        session = SinkSession(model, byte_tokenizer(), window_length=40)
        answers.append("".join(session.chat("Hello", max_new_tokens=50)))
        session.save(tmp_path / "session")
        session = SinkSession.load(tmp_path / "session", model, byte_tokenizer())
        answers[-1] += "".join(session.chat("And then?", max_new_tokens=50))
    assert answers[0] == answers[1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_two_gpus_gives_the_results_of_one(four_layers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device_map: dict[str, int] = dict.fromkeys([*BEGIN, *LAYERS[:2]], 0) | dict.fromkeys([*LAYERS[2:], *END], 1)
    expected, actual = streams(four_layers, device_map={"": 0}), streams(four_layers, device_map=device_map)
    for stream, results in expected.items():
        for name, result in results.items():
            assert relative_error(actual[stream][name].cpu().double(), result.cpu().double()) < 1e-4
    model = AutoModelForCausalLM.from_pretrained(four_layers, device_map=device_map)
    cache, update, transfers = SinkCache(model.config, W, S), SinkCache.update, Transfers()

    def watched(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        with transfers:
            return update(*args, **kwargs)

    monkeypatch.setattr(SinkCache, "update", watched)
    with torch.no_grad():
        for token in prompt(model, 100).split(1, dim=1):
            if cache.get_seq_length() == 2:
                transfers.found.clear()
            model(token, **{CACHE: cache})
    assert [layer.keys.device.index for layer in cache.layers] == [0, 0, 1, 1]
    assert transfers.found == []


# --- examples, started as their docstrings say


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose heads can be divided among two and among three processes."""
    path = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 264}
    build_model(build_config("llama", num_hidden_layers=2, **sizes)).save_pretrained(path)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    "example",
    [
        "data_parallel.py",
        pytest.param(
            "tensor_parallel.py",
            marks=pytest.mark.skipif("tp_plan" in SHARED, reason="early transformers 5 has no such setting"),
        ),
    ],
)
def test_an_example_prints_the_same_in_one_and_in_several_processes(
    example: str, folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ROOT / "examples" / example
    monkeypatch.setattr(sys, "argv", [str(path), folder])
    runpy.run_path(str(path), run_name="__main__")
    alone = capsys.readouterr().out
    assert len(alone) > 100
    for line in re.findall(r"^ {4}torchrun .*|`accelerate launch .*?`", path.read_text(), flags=re.MULTILINE):
        launcher, *options = shlex.split(line.strip(" `"))
        assert options[-1] == f"examples/{example}"
        if launcher == "torchrun":
            command = ["torch.distributed.run", *options]
        else:  # without `--multi_gpu` it starts one process if it finds no GPUs
            more = ["--multi_gpu", "--main_process_port", "0"]
            command = ["accelerate.commands.accelerate_cli", "launch", *more, *options[1:]]
        printed = launched([sys.executable, "-m", *command, folder], processes=int(options[2]))
        assert printed.split() == alone.replace("with 3 of the 3 heads", "with 1 of the 3 heads").split()
