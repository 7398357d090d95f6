"""The first `SinkCache` of a config: its CPU time, wall time and memory, in a process without OpenMP threads.

`SinkCache(config)` measures the model that the config describes. Further caches of an equal config use the results.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig

from attention_sinks import SinkCache

ROOT = Path(__file__).resolve().parents[1]
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1 + i / 100 for i in range(64)],
    "long_factor": [2 + i / 10 for i in range(64)], "original_max_position_embeddings": 4096,
}  # fmt: skip
# Model types and the sizes of large models.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 3.1 405B": ("llama", {
        "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rope_parameters": LLAMA3_ROPE,
    }),
    "Qwen3 32B": ("qwen3", {
        "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
    }),
    "Gemma 3 27B": ("gemma3_text", {
        "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "num_attention_heads": 32,
        "num_key_value_heads": 16, "head_dim": 128, "sliding_window": 1024, "max_position_embeddings": 131072,
    }),
    "Mistral 7B v0.1": ("mistral", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 32768,
    }),
    "Mixtral 8x22B": ("mixtral", {
        "hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56, "num_attention_heads": 48,
        "num_key_value_heads": 8, "num_local_experts": 8, "max_position_embeddings": 65536,
    }),
    "gpt-oss 120B": ("gpt_oss", {"num_hidden_layers": 36, "num_local_experts": 128}),
    "Phi-3 medium 128k": ("phi3", {
        "hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40, "num_attention_heads": 40,
        "num_key_value_heads": 10, "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
        "sliding_window": 131072, "rope_parameters": LONG_ROPE,
    }),
    "DeepSeek V3": ("deepseek_v3", {}),
    "Falcon-H1 34B": ("falcon_h1", {
        "hidden_size": 5120, "intermediate_size": 21504, "num_hidden_layers": 72, "num_attention_heads": 20,
        "num_key_value_heads": 4, "head_dim": 128, "mamba_d_ssm": 10240, "mamba_n_heads": 80, "mamba_d_head": 128,
        "mamba_d_state": 256, "mamba_n_groups": 2,
    }),
}  # fmt: skip


def construct(names: list[str], rounds: int) -> list[dict[str, Any]]:
    """Return the CPU time, wall time and memory of the first `SinkCache` of each model, alone and beside busy CPUs."""
    # A program of its own forks a process for each measurement, so that PyTorch is imported only once. Here, other
    # sections may have started the threads of OpenMP, which no forked process has.
    command = [sys.executable, "-m", "benchmarks.construct", str(rounds), *names]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
    rows: list[dict[str, Any]] = json.loads(output)
    return rows


def measure(names: list[str], rounds: int) -> list[dict[str, Any]]:
    configs: dict[str, Any] = {name: AutoConfig.for_model(SHAPES[name][0], **SHAPES[name][1]) for name in names}
    for config in configs.values():
        _ = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # loads the code of the model, as it is where there is a model
    alone: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    busy: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            alone[name].append(in_new_process(configs[name]))
        with busy_cpus():
            for name in names:
                busy[name].append(in_new_process(configs[name]))
    rows: list[dict[str, Any]] = []
    for name in names:
        cpu, wall, mebibytes = zip(*alone[name], strict=True)
        busy_cpu, busy_wall, _ = zip(*busy[name], strict=True)
        row = {"cpu ms": cpu, "ms": wall, "busy cpu ms": busy_cpu, "busy ms": busy_wall, "MiB": mebibytes}
        rows.append({"model": name, "layers": configs[name].num_hidden_layers, **row})
    return rows


def in_new_process(config: PreTrainedConfig) -> tuple[float, ...]:
    """Return the milliseconds of CPU and of wall time, and the MiB, that the first cache of a config takes."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _memory("VmRSS")
        started, cpu_started = time.perf_counter(), time.process_time()
        SinkCache(config)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        os.write(writer, json.dumps([cpu_seconds * 1e3, seconds * 1e3, _memory("VmHWM") - before]).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as file:
        measured = json.loads(file.read())
    os.waitpid(process, 0)
    return tuple(measured)


def _memory(name: str) -> float:
    """Return an entry of the status of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


@contextlib.contextmanager
def busy_cpus() -> Iterator[None]:
    """Inside, another process on each CPU computes without a pause."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[2:], int(sys.argv[1]))))
