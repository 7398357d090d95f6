"""A file is whole whenever a save is killed. Processes are started and killed for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..support.programs import ROOT

pytestmark = pytest.mark.processes

KILLED = '''
import json, os, random, resource, signal, sys, time
import torch
from transformers import LlamaConfig
from attention_sinks import SinkCache
from tests.support.inside import FILES

torch.set_num_threads(1)
torch.set_grad_enabled(False)
folder, rounds = sys.argv[1], int(sys.argv[2])
path = os.path.join(folder, "stream")
config = LlamaConfig(num_hidden_layers=2, hidden_size=128, num_attention_heads=2, intermediate_size=32, vocab_size=8)
cache = SinkCache(config, 256, 4)


def feed(count):
    for _ in range(count):
        states = torch.full((1, 2, 1, 64), float(cache.get_seq_length()))
        for layer in range(2):
            cache.update(states, states, layer)


def check():
    """The file is one of those that were saved, and whole: every value is that of its token."""
    loaded = SinkCache.load(path, config)
    seen = loaded.get_seq_length()
    for layer in loaded.layers:
        values = sorted(layer.values[0, 0, : min(seen, 256), 0].tolist())
        assert values == [float(t) for t in [*range(4), *range(max(seen - 252, 4), seen)]], seen
    return seen


def in_child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
            os._exit(1)
    return pid


feed(300)
laps = []
for _ in range(5):
    begin = time.perf_counter()
    cache.save(path)
    laps.append(time.perf_counter() - begin)
seen = check()
generator = random.Random(0)

# At any moment.
def save_on_and_on():
    while True:
        feed(1)
        cache.save(path)

survived = set()
for _ in range(rounds):
    pid = in_child(save_on_and_on)
    time.sleep(generator.uniform(0.0, 4 * max(laps)))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    survived.add(check())

# Between any two calls of the system that a save makes, and half-way through the writing.
def dies(name, module, partial=False):
    def work():
        real = getattr(module, name)
        def killed(*args):
            if partial:
                with open(args[1], "wb") as file:
                    file.write(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
        setattr(module, name, killed)
        feed(1)
        cache.save(path)
    return work

cache.save(path)
for work in (dies("save_file", FILES), dies("save_file", FILES, True), dies("fsync", os), dies("replace", os)):
    pid = in_child(work)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert check() == 300

# A disk that is full.
def save_without_room():
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    before = os.listdir(folder)
    feed(1)
    try:
        cache.save(path)
    except OSError:
        assert os.listdir(folder) == before
        return
    os._exit(2)

pid = in_child(save_without_room)
assert os.waitpid(pid, 0)[1] == 0
assert check() == 300
print(json.dumps({"different": len(survived), "left": len(os.listdir(folder)) - 1}))
'''


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_file_is_whole_whenever_a_save_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), "100"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert result["different"] > 2, "some saves end before the process is killed"
