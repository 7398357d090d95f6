"""Streams in files: resumed bitwise, refused if anything about the file is wrong, whole whenever a save is killed."""

import copy
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from attention_sinks import Rotation, SinkCache, sink_generate, sink_prefill

from ..support.inside import FORMAT, SinkLayer, buffers, rotation_of, seen_of
from ..support.models import CACHE, LATER, MIXED, build_config, random_ids, tiny_model
from ..support.streams import S, W, read_random
from ..support.versions import RECORDS_PAST

NAMES = ["llama", "cohere", "gptj", "deepseek_v3", "smollm3", "mistral-sliding", "mpt", *MIXED, *sorted(LATER)]

pytestmark = pytest.mark.usefixtures("no_grad")


def recorded(model: Any, cache: SinkCache) -> None:
    read_random(model, cache, [20, 1])
    cache.activate_past_recording()  # type: ignore[no-untyped-call]
    read_random(model, cache, [4])


def go_on(model: Any, cache: SinkCache) -> list[Tensor]:
    if RECORDS_PAST and cache.is_recording_past(0):  # early transformers 5 never does
        cache.crop(-2)
        cache.deactivate_past_recording()
    return read_random(model, cache, [1, 1, 3, 1, 20, *[1] * 15], seed=1)


def cropped(model: Any, cache: SinkCache) -> None:
    read_random(model, cache, [W + 5, 1, 1])
    cache.crop(-4)


def wound_back(model: Any, cache: SinkCache) -> None:
    read_random(model, cache, [20, 1, 1])
    cache.rebase()


def compacted(model: Any, cache: SinkCache) -> None:
    read_random(model, cache, [20, 1, 1])
    cache.compact()
    read_random(model, cache, [1])


def repeated(model: Any, cache: SinkCache) -> None:
    read_random(model, cache, [20, 1])
    cache.batch_repeat_interleave(3)


MOMENTS: dict[str, Callable[[Any, SinkCache], object]] = {
    "empty": lambda model, cache: None,
    "one token": lambda model, cache: read_random(model, cache, [1]),
    "below the window": lambda model, cache: read_random(model, cache, [3, 1, 4]),
    "at its edge": lambda model, cache: read_random(model, cache, [W - 1, 1]),
    "past it": lambda model, cache: read_random(model, cache, [W + 5, *[1] * 9, 4]),
    "after a crop": cropped,
    "while candidates may be taken back": recorded,
    "after winding back": wound_back,
    "after compaction": compacted,
    "with three rows": repeated,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_resumed_stream_is_bitwise_the_one_that_never_stopped(name: str, moment: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    cache = SinkCache(model.config, W, S)
    if moment in ("after winding back", "after compaction") and not cache.can_rebase:
        pytest.skip("its positions cannot be wound back")
    if moment in ("after a crop", "while candidates may be taken back"):
        if any(type(layer) is not SinkLayer for layer in cache.layers) and name != "deepseek_v32":
            pytest.skip("its other layers cannot take tokens back")
        if moment.startswith("while") and not RECORDS_PAST:
            pytest.skip("early transformers 5 does not record the past")
    MOMENTS[moment](model, cache)
    cache.save(tmp_path / "stream")
    resumed = SinkCache.load(tmp_path / "stream", model.config)
    assert (resumed.get_seq_length(), resumed.kept_length) == (cache.get_seq_length(), cache.kept_length)
    for mine, others in zip(go_on(model, resumed), go_on(model, cache), strict=True):
        assert torch.equal(mine, others)
    assert resumed.get_seq_length() == cache.get_seq_length()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_resumed_bitwise(dtype: torch.dtype, tmp_path: Path) -> None:
    with torch.device("cpu"):
        model = transformers.LlamaForCausalLM._from_config(build_config("llama", num_hidden_layers=2), dtype=dtype)
    cache = SinkCache(model.config, W, S)
    read_random(model, cache, [20, 1, 1])
    cache.save(tmp_path / "stream")
    resumed = SinkCache.load(tmp_path / "stream", model.config)
    for mine, others in zip(go_on(model, resumed), go_on(model, cache), strict=True):
        assert torch.equal(mine, others)


@pytest.mark.parametrize("steps", [1, 10, 40])
def test_padded_rows_are_resumed_bitwise(steps: int, tmp_path: Path) -> None:
    model = tiny_model("llama")
    ids, mask = random_ids(14, batch_size=3).clamp(min=1), torch.ones(3, 14, dtype=torch.long)
    mask[0, :9] = mask[1, :1] = 0
    options: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    output: Any = sink_generate(
        model, ids * mask, attention_mask=mask, window_length=W, num_sink_tokens=S, max_new_tokens=steps,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    cache = output[CACHE]
    cache.save(tmp_path / "stream")
    resumed = SinkCache.load(tmp_path / "stream", model.config)
    more: list[Any] = [
        sink_generate(
            model, output.sequences[:, -1:], past_key_values=each, max_new_tokens=30, output_logits=True,
            return_dict_in_generate=True, **options,
        )
        for each in (resumed, cache)
    ]  # fmt: skip
    assert torch.equal(more[0].sequences, more[1].sequences)
    assert torch.equal(torch.stack(more[0].logits), torch.stack(more[1].logits))


def test_a_save_changes_nothing_and_a_loaded_cache_shares_nothing(tmp_path: Path) -> None:
    model = tiny_model("llama")
    cache, untouched = SinkCache(model.config, W, S), SinkCache(model.config, W, S)
    for each in (cache, untouched):
        read_random(model, each, [20, 1, 1])
    cache.save(tmp_path / "stream")
    first = SinkCache.load(tmp_path / "stream", model.config)
    read_random(model, first, [7])
    cache.save(tmp_path / "stream")  # over the file that `first` came from
    read_random(model, first, [7])
    for mine, others in zip(go_on(model, cache), go_on(model, untouched), strict=True):
        assert torch.equal(mine, others)


def test_a_rotation_stated_by_hand_is_resumed(tmp_path: Path) -> None:
    model = tiny_model("llama")
    inv_freq = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    cache = SinkCache(model.config, W, S, rotation=Rotation(inv_freq))
    read_random(model, cache, [20, 1])
    cache.save(tmp_path / "stream")
    resumed = SinkCache.load(tmp_path / "stream", model.config)
    rotation = rotation_of(resumed.layers[0])
    assert rotation is not None
    assert torch.equal(rotation.inv_freq, Rotation(inv_freq).inv_freq)
    for mine, others in zip(go_on(model, resumed), go_on(model, cache), strict=True):
        assert torch.equal(mine, others)


# --- files that are refused


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file of a stream through the tiniest cache."""
    model = tiny_model("llama", num_hidden_layers=1)
    cache = SinkCache(model.config, 3, 1)
    with torch.no_grad():
        read_random(model, cache, [7, 1])
    path = tmp_path_factory.mktemp("good") / "stream"
    cache.save(path)
    return path.read_bytes()


CONFIG = build_config("llama", num_hidden_layers=1)
WRONG = "`path` must be a file that `save` of a cache wrote"


@given(data=st.data())
def test_every_changed_byte_and_every_truncation_is_noticed(
    good: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    damaged = bytearray(good)
    if data.draw(st.booleans(), label="truncated"):
        del damaged[data.draw(st.integers(0, len(good) - 1)) :]
    else:
        damaged[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=WRONG):
        SinkCache.load(path, CONFIG)


def test_bytes_that_follow_the_file_are_noticed(good: bytes, tmp_path: Path) -> None:
    (tmp_path / "longer").write_bytes(good + b"\0" * 8)
    with pytest.raises(ValueError, match=WRONG):
        SinkCache.load(tmp_path / "longer", CONFIG)


def test_a_foreign_a_newer_and_a_missing_file_are_told_apart(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=f"{WRONG}, got '{path}': it is of another program"):
        SinkCache.load(path, CONFIG)
    path.write_bytes(good)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, {**metadata, "attention_sinks.format": str(FORMAT + 1)})
    with pytest.raises(ValueError, match=rf"newer version \(format {FORMAT + 1}; this one reads {FORMAT}\). Upgrade"):
        SinkCache.load(path, CONFIG)
    save_file(load_file(path), path, {**metadata, "attention_sinks.kind": "session"})
    with pytest.raises(ValueError, match="damaged"):
        SinkCache.load(path, CONFIG)
    path.write_bytes(b"\x80\x04K\x01.")  # a pickle
    with pytest.raises(ValueError, match="truncated, damaged or no safetensors file"):
        SinkCache.load(path, CONFIG)
    for missing in (tmp_path / "missing", tmp_path):
        with pytest.raises(FileNotFoundError, match="There is no file"):
            SinkCache.load(missing, CONFIG)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (build_config("llama", num_hidden_layers=2), "num_hidden_layers was 1, got 2"),
        (build_config("llama", num_hidden_layers=1, num_key_value_heads=4), "num_key_value_heads was 2, got 4"),
        (build_config("llama-linear", num_hidden_layers=1), "rope_parameters was .*, got .*'linear'"),
        (build_config("mistral", num_hidden_layers=1), "model_type was 'llama', got 'mistral'"),
        (build_config("llama", num_hidden_layers=1, rms_norm_eps=0.1), "rms_norm_eps was 1e-06, got 0.1"),
    ],
    ids=["depth", "heads", "frequencies", "type", "norm"],
)
def test_the_stream_of_another_model_is_refused_by_what_differs(
    config: Any, message: str, good: bytes, tmp_path: Path
) -> None:
    (tmp_path / "stream").write_bytes(good)
    with pytest.raises(ValueError, match=f"`config` must be that of the model whose stream was saved: {message}"):
        SinkCache.load(tmp_path / "stream", config)
    same = build_config("llama", num_hidden_layers=1, use_cache=False, pad_token_id=3, dtype="bfloat16")
    assert SinkCache.load(tmp_path / "stream", same).get_seq_length() == 8


def test_what_is_no_config_and_a_device_that_is_not_there_are_refused(good: bytes, tmp_path: Path) -> None:
    (tmp_path / "stream").write_bytes(good)
    with pytest.raises(TypeError, match="`config` must be the config of the model, got 'llama'"):
        SinkCache.load(tmp_path / "stream", "llama")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`device` must be at hand, got 'cuda:77' for states that were on cpu"):
        SinkCache.load(tmp_path / "stream", CONFIG, device="cuda:77")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="`device` must be at hand, got 0"):
            SinkCache.load(tmp_path / "stream", CONFIG, device=0)  # type: ignore[arg-type]


def test_states_go_to_the_device_that_is_named(good: bytes, tmp_path: Path) -> None:
    (tmp_path / "stream").write_bytes(good)
    layer = SinkCache.load(tmp_path / "stream", CONFIG, device="meta").layers[0]
    assert {states.device.type for states in buffers(layer)} == {layer.device.type} == {"meta"}


def test_an_interrupted_cache_is_not_saved(tmp_path: Path) -> None:
    model = tiny_model("llama")
    cache = SinkCache(model.config, W, S)
    read_random(model, cache, [20])
    layer = cache.layers[0]
    cache.update(layer.keys[:, :, :1].clone(), layer.values[:, :, :1].clone(), 0)
    with pytest.raises(RuntimeError, match="interrupted"):
        cache.save(tmp_path / "stream")
    assert not any(tmp_path.iterdir())


# --- saves that are killed

KILLED = '''
import json, os, random, resource, signal, sys, time
import torch
from attention_sinks import SinkCache, files
from transformers import LlamaConfig

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
cache.save(path)
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
    time.sleep(generator.uniform(0.0, 0.05))
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
for work in (dies("save_file", files), dies("save_file", files, True), dies("fsync", os), dies("replace", os)):
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
def test_whenever_a_save_is_killed_the_file_is_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), "100"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert result["different"] > 2, "saves must have ended, and begun, in between"


def test_the_disk_is_told_before_the_name_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that stops may lose what was not flushed: first the file, then its name, then the folder."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def flushed(file: int) -> None:
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{file}") else "file")
        fsync(file)

    def named(*paths: Any) -> None:
        calls.append("name")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", named)
    SinkCache(CONFIG, W, S).save(tmp_path / "stream")
    assert calls == ["file", "name", "folder"]
    assert [path.name for path in tmp_path.iterdir()] == ["stream"]


def test_permissions_are_those_of_the_old_file_or_of_any_new_one(tmp_path: Path) -> None:
    path, other = tmp_path / "stream", tmp_path / "other"
    other.touch()
    SinkCache(CONFIG, W, S).save(path)
    assert path.stat().st_mode == other.stat().st_mode
    path.chmod(0o640)
    SinkCache(CONFIG, W, S).save(path)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_save_beside_a_running_forward_pass_is_whole_or_refused(tmp_path: Path) -> None:
    """Another thread feeds the cache all the time: no file may hold half of a pass."""
    model = tiny_model("llama")
    cache, ended, path = SinkCache(model.config, W, S), threading.Event(), tmp_path / "stream"
    read_random(model, cache, [20])

    def run() -> None:
        with torch.no_grad():
            while not ended.is_set():
                read_random(model, cache, [1, 1, 5])

    thread = threading.Thread(target=run)
    thread.start()
    saved = 0
    try:
        for _ in range(2000):
            try:
                cache.save(path)
            except RuntimeError as error:
                assert "forward pass" in str(error)  # noqa: PT017
                continue
            saved += 1
            loaded = SinkCache.load(path, model.config)
            assert {seen_of(layer) for layer in loaded.layers} == {loaded.get_seq_length()}
            if saved == 20:
                break
    finally:
        ended.set()
        thread.join()
    cache.save(path)
    for mine, others in zip(go_on(model, SinkCache.load(path, model.config)), go_on(model, cache), strict=True):
        assert torch.equal(mine, others)


def test_a_stream_that_is_loaded_under_inference_mode_goes_on_outside_of_it(tmp_path: Path) -> None:
    model = tiny_model("llama")
    cache = SinkCache(model.config, W, S)
    read_random(model, cache, [20, 1])
    cache.save(tmp_path / "stream")
    with torch.inference_mode():
        resumed = SinkCache.load(tmp_path / "stream", model.config)
    for mine, others in zip(go_on(model, resumed), go_on(model, cache), strict=True):
        assert torch.equal(mine, others)


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").touch()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    SinkCache(CONFIG, W, S).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert SinkCache.load(tmp_path / "real", CONFIG).get_seq_length() == 0


def test_a_copy_and_a_file_agree(tmp_path: Path) -> None:
    """A stream of chunks with a window for each token, continued from a deep copy and from a file."""
    model = tiny_model("llama")
    cache = SinkCache(model.config, W, S)
    for _ in sink_prefill(model, random_ids(100), cache, 7):
        pass
    cache.save(tmp_path / "stream")
    outputs = [
        [output.logits for output in sink_prefill(model, random_ids(50, seed=1), each, 7)]
        for each in (copy.deepcopy(cache), SinkCache.load(tmp_path / "stream", model.config))
    ]
    for mine, others in zip(*outputs, strict=True):
        assert torch.equal(mine, others)
