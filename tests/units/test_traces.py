"""The construction of a cache leaves no trace: it draws from no global generator, and it computes on one CPU."""

import contextlib
import os
import pickle
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch._subclasses import FakeTensorMode
from transformers import CONFIG_MAPPING, DiffLlamaConfig, LlamaConfig, PreTrainedConfig
from transformers.models.auto import modeling_auto

from attention_sinks import SinkCache

from ..support.inside import forget_measurements, gnu_openmp, sink_layers
from ..support.programs import ENVIRONMENT, ROOT
from ..support.versions import HAS_LATER_MODELS

# Their models draw random numbers by other functions than most.
BY_NAME: dict[str, Any] = {"diffllama": DiffLlamaConfig(num_hidden_layers=2)}
if HAS_LATER_MODELS:
    BY_NAME["olmo_hybrid"] = transformers.OlmoHybridConfig(
        num_hidden_layers=2, layer_types=["linear_attention", "full_attention"]
    )


def generators() -> list[Any]:
    """The states of all global generators of random numbers."""
    states: list[Any] = [random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist()]  # noqa: NPY002
    if torch.accelerator.is_available():
        module = torch.get_device_module(torch.accelerator.current_accelerator())
        states += [module.get_rng_state(i).tolist() for i in range(torch.accelerator.device_count())]
    return states


def draws(config: PreTrainedConfig) -> bool:
    """Return True if the first cache of a config uses a global generator, where another device is the default."""
    before = generators()
    forget_measurements()
    device = torch.accelerator.current_accelerator(check_available=True) or "meta"
    with torch.device(device), contextlib.suppress(NotImplementedError, ValueError):
        SinkCache(config, 8)
    return generators() != before


@pytest.mark.parametrize("config", BY_NAME.values(), ids=BY_NAME)
def test_the_first_cache_of_a_config_draws_from_no_global_generator(config: PreTrainedConfig) -> None:
    assert not draws(config)


def text_configs() -> dict[type[PreTrainedConfig], PreTrainedConfig]:
    """A config of each class that describes the text model of a registered type, with few layers if it can have few."""
    configs: dict[type[PreTrainedConfig], PreTrainedConfig] = {}
    for registry in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"):
        for model_type in getattr(modeling_auto, f"MODEL_FOR_{registry}_MAPPING_NAMES", ()):
            with contextlib.suppress(Exception):  # there is none by default
                config = CONFIG_MAPPING[model_type]().get_text_config(decoder=True)
                configs.setdefault(type(config), config)
    config_class: Any
    for config_class in configs:
        with contextlib.suppress(Exception):  # as many layers as other settings say
            configs[config_class] = config_class(num_hidden_layers=4)
    return configs


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")  # of the code of models
def test_no_model_type_draws_from_a_global_generator() -> None:
    assert [config.model_type for config in text_configs().values() if draws(config)] == []


@pytest.mark.parametrize(
    "mode",
    [FakeTensorMode, lambda: torch.device("meta"), torch.inference_mode],
    ids=["fake", "on meta", "inference"],
)
def test_a_first_cache_measures_the_same_in_whatever_mode_the_caller_is(mode: Any) -> None:
    config = LlamaConfig(num_hidden_layers=2)

    def rotation() -> Any:
        forget_measurements()
        (rotation,) = {each.rotation for each in sink_layers(SinkCache(config, 8))}
        return rotation

    expected = rotation()
    with mode():
        measured = rotation()
    assert type(measured.inv_freq) is torch.Tensor
    assert torch.equal(measured.inv_freq, expected.inv_freq)
    assert not measured.inv_freq.is_inference()


# Counts the threads of the process while caches are constructed: of OpenMP there are none before its first use.
THREADS = """
import os, threading, time, torch
from transformers import GptOssConfig, LlamaConfig
from attention_sinks import SinkCache

def constructed(config):
    counts, done = [len(os.listdir("/proc/self/task"))], threading.Event()
    def count():
        while not done.is_set():
            counts.append(len(os.listdir("/proc/self/task")))
            time.sleep(1e-3)
    counter = threading.Thread(target=count)
    counter.start()
    SinkCache(config)
    done.set()
    counter.join()
    return max(counts) - counts[0]

added = [constructed(LlamaConfig(num_hidden_layers=2))]
torch.set_num_threads(4)
added.append(constructed(GptOssConfig(num_hidden_layers=2)))
torch.ones(500, 500) @ torch.ones(500, 500)
assert torch.get_num_threads() == 4
in_thread = []
thread = threading.Thread(target=lambda: in_thread.append(torch.get_num_threads()))
thread.start()
thread.join()
assert in_thread == [4]
print(*added)
"""


@pytest.mark.processes
@pytest.mark.skipif(gnu_openmp() is None or not os.path.exists("/proc/self/task"), reason="needs GNU OpenMP on Linux")
def test_a_construction_uses_one_thread_and_leaves_the_number_of_threads_alone() -> None:
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "4"}
    process = subprocess.run(
        [sys.executable, "-c", THREADS], cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    # The counter and the measuring thread.
    assert all(int(number) <= 2 for number in process.stdout.split())
