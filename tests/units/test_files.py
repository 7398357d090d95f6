"""A file is whole, or refused if anything about it is wrong."""

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from attention_sinks import SinkCache

from ..support.inside import FILES, FORMAT, buffers
from ..support.models import LATER, build_config, tiny_model
from ..support.streams import S, W, read_random

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a saved stream with a tiny cache."""
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
    with pytest.raises(ValueError, match=f"{WRONG}, got '{path}': another program wrote it"):
        SinkCache.load(path, CONFIG)
    path.write_bytes(good)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, {**metadata, "attention_sinks.format": str(FORMAT + 1)})
    with pytest.raises(
        ValueError, match=rf"newer version wrote it \(format {FORMAT + 1}; this one reads {FORMAT}\). Upgrade"
    ):
        SinkCache.load(path, CONFIG)
    save_file(load_file(path), path, {**metadata, "attention_sinks.kind": "session"})
    with pytest.raises(ValueError, match="damaged"):
        SinkCache.load(path, CONFIG)
    path.write_bytes(b"\x80\x04K\x01.")  # a pickle
    with pytest.raises(ValueError, match="truncated, damaged or not a safetensors file"):
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
def test_an_error_names_how_the_config_differs_from_that_of_the_file(
    config: Any, message: str, good: bytes, tmp_path: Path
) -> None:
    (tmp_path / "stream").write_bytes(good)
    with pytest.raises(ValueError, match=f"`config` must be that of the model whose stream was saved: {message}"):
        SinkCache.load(tmp_path / "stream", config)
    same = build_config("llama", num_hidden_layers=1, use_cache=False, pad_token_id=3, dtype="bfloat16")
    assert SinkCache.load(tmp_path / "stream", same).get_seq_length() == 8


def test_a_wrong_config_and_an_absent_device_are_refused(good: bytes, tmp_path: Path) -> None:
    (tmp_path / "stream").write_bytes(good)
    with pytest.raises(TypeError, match="`config` must be the config of the model, got 'llama'"):
        SinkCache.load(tmp_path / "stream", "llama")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`device` must be at hand, got 'cuda:77' for states that were on cpu"):
        SinkCache.load(tmp_path / "stream", CONFIG, device="cuda:77")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="`device` must be at hand, got 0"):
            SinkCache.load(tmp_path / "stream", CONFIG, device=0)  # type: ignore[arg-type]


def test_a_stream_is_loaded_onto_the_named_device(good: bytes, tmp_path: Path) -> None:
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


# --- how a file is written


def test_a_file_is_flushed_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash loses what was not flushed. So the file is flushed first, then renamed, then its folder is flushed."""
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


def test_a_saved_file_has_the_permissions_of_the_old_file_or_of_a_new_one(tmp_path: Path) -> None:
    path, other = tmp_path / "stream", tmp_path / "other"
    other.touch()
    SinkCache(CONFIG, W, S).save(path)
    assert path.stat().st_mode == other.stat().st_mode
    path.chmod(0o640)
    SinkCache(CONFIG, W, S).save(path)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").touch()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    SinkCache(CONFIG, W, S).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert SinkCache.load(tmp_path / "real", CONFIG).get_seq_length() == 0


Place = tuple[Any, ...]
DATA = Path(__file__).parents[1] / "data"


def places(state: Any, at: Place = ()) -> Iterator[Place]:
    """Where the entries of a state are, those of the config apart, which may differ between versions."""
    if isinstance(state, dict | list):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            if isinstance(state, dict):
                yield (*at, key)
            if key != "config":
                yield from places(value, (*at, key))


def removed(holder: dict[str, Any], name: str) -> None:
    del holder[name]


def renamed(holder: dict[str, Any], name: str) -> None:
    holder[f"{name} of old"] = holder.pop(name)


def mistyped(holder: dict[str, Any], name: str) -> None:
    holder[name] = 1.5j


def changed(state: Any, place: Place, change: Callable[[dict[str, Any], str], None]) -> Any:
    """A copy of a state with one entry changed."""
    holder = state = copy.deepcopy(state)
    for key in place[:-1]:
        holder = holder[key]
    change(holder, place[-1])
    return state


@pytest.mark.parametrize("change", [removed, renamed, mistyped])
@pytest.mark.parametrize("name", ["llama", *sorted(LATER)])
def test_a_state_with_an_entry_missing_unknown_or_of_another_type_is_refused(name: str, change: Any) -> None:
    model = tiny_model(name)
    cache = SinkCache(model.config, W, S)
    read_random(model, cache, [20, 1])
    state = cache.state()
    for place in places(state):
        with pytest.raises(ValueError, match="must be a file that `save` wrote|of the .*model whose stream was saved"):
            SinkCache.from_state(changed(state, place, change), model.config)


@pytest.mark.parametrize("change", [removed, renamed, mistyped])
@pytest.mark.parametrize("name", ["llama", *sorted(LATER)])
def test_an_entry_of_format_1_that_is_missing_or_wrong_raises_no_other_error(name: str, change: Any) -> None:
    state = FILES.read(DATA / f"format-1 {name}.safetensors", "cache")
    config = build_config(name, **({"num_hidden_layers": 2} if name == "llama" else {}))
    refused = 0
    for place in places(state):
        try:
            SinkCache.from_state(changed(state, place, change), config)
        except ValueError:
            refused += 1
    assert refused > 0
