"""Save states of streams: values and tensors in one safetensors file, written atomically.

`read` checks the whole file before it returns anything, and executes nothing from it.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = 2


def write(path: str | os.PathLike[str], kind: str, state: dict[str, Any]) -> None:
    """Write a state to a file, atomically.

    The new file is written to the same folder, flushed to the disk and renamed. A reader therefore finds the old file
    or the new one, even if this process or the machine stops during the write.

    Args:
        path: file to write. A symbolic link is followed.
        kind: name of the class whose state this is; `read` checks it.
        state: nested dicts and lists of numbers, strings, None, tensors, dtypes and devices.

    Raises:
        OSError: if the file cannot be written. The old file is unchanged.
    """
    path = Path(os.path.realpath(path))  # replace the target of a link, not the link
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_to_json(state, "state", tensors))
    metadata = {"format": str(FORMAT), "kind": kind, "state": text, "sha256": _digest(kind, text, tensors)}
    with tempfile.TemporaryDirectory(prefix=f".{path.name[:100]}-", dir=path.parent) as folder:
        new, empty = Path(folder, "new"), Path(folder, "like")
        empty.touch()  # has the default permissions of a new file
        try:
            save_file(tensors, new, {f"attention_sinks.{name}": value for name, value in metadata.items()})
        except SafetensorError as error:  # a full disk, for example
            raise OSError(f"{path} could not be written: {error}") from error
        new.chmod((path if path.exists() else empty).stat().st_mode & 0o777)
        _flush(new)
        os.replace(new, path)
    _flush(path.parent)


def read(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """Return the state that `write` stored in a file, with all tensors on the CPU.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is truncated or damaged, or was written by another program, for another kind, or by a
            newer version.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {os.fspath(path)!r}.")
    problem = f"`path` must be a file that `save` of a {kind} wrote, got {os.fspath(path)!r}:"
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            fields = ("format", "kind", "state", "sha256")
            version, found, text, digest = (metadata.get(f"attention_sinks.{name}", "") for name in fields)
            if not version.isdecimal():
                raise ValueError(f"{problem} another program wrote it.")
            if int(version) > FORMAT:
                raise ValueError(
                    f"{problem} a newer version wrote it (format {version}; this one reads {FORMAT}). Upgrade "
                    "attention-sinks."
                )
            with torch.inference_mode(False):
                # `clone`: the tensors must not be views of the file, which may change later.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # not a dict
    except SafetensorError as error:
        raise ValueError(f"{problem} it is truncated, damaged or not a safetensors file ({error}).") from error
    if digest != _digest(found, text, tensors):
        raise ValueError(f"{problem} it is damaged (its checksum does not match its contents).")
    if found != kind:
        raise ValueError(f"{problem} it contains a {found}.")
    state: dict[str, Any] = _from_json(json.loads(text), tensors)
    return state


def _to_json(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return a value as JSON data, `[type, contents]`. Move tensors to `tensors`; their contents are names."""
    if isinstance(value, Tensor):
        saved = value.detach().to("cpu").contiguous()
        # `clone` a view of a larger tensor: the whole storage would be written.
        saved = saved.clone() if saved.untyped_storage().nbytes() > saved.nbytes else saved
        # Layers may share a tensor; it is written once.
        name = next((known for known, tensor in tensors.items() if tensor.is_set_to(saved)), name)
        tensors[name] = saved
        return ["tensor", name]
    if isinstance(value, torch.dtype | torch.device):
        return [type(value).__name__, str(value).removeprefix("torch.")]
    if isinstance(value, dict):
        return ["dict", [[key, _to_json(each, f"{name}.{key}", tensors)] for key, each in value.items()]]
    if isinstance(value, list | tuple):
        return ["list", [_to_json(each, f"{name}.{i}", tensors) for i, each in enumerate(value)]]
    if not isinstance(value, bool | int | float | str | None):
        raise TypeError(f"{name} cannot be saved: it is a {type(value).__name__}.")
    return ["plain", value]


def _from_json(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return the value that `_to_json` turned into `value` and `tensors`."""
    kind, content = value
    match kind:
        case "tensor":
            return tensors[content]
        case "dtype":
            return getattr(torch, content)
        case "device":
            return torch.device(content)
        case "dict":
            return {key: _from_json(each, tensors) for key, each in content}
        case "list":
            return [_from_json(each, tensors) for each in content]
    return content


def _digest(kind: str, text: str, tensors: dict[str, Tensor]) -> str:
    """Return a checksum of the contents of a file. The safetensors format has none."""
    digest = hashlib.sha256(json.dumps([kind, text]).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), tensor.shape]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Flush a file, or the list of files in a folder, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows neither supports nor needs this
    file = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(file)
    finally:
        os.close(file)
