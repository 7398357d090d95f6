"""Streams in files: values and tensors in one safetensors file, written whole or not at all.

Nothing in such a file is ever executed, and nothing of it is used before all of it has been checked.
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

FORMAT = 1


def write(path: str | os.PathLike[str], kind: str, state: dict[str, Any]) -> None:
    """Write a state of dicts, lists, plain values, tensors, dtypes and devices; `kind` says what it is.

    Who reads `path` finds the old file or the new one, whenever this process, or the machine, stops: the new one is
    written beside it, flushed to the disk, and takes its name at the end.

    Raises:
        OSError: if the file cannot be written. The old one is as it was.
    """
    path = Path(os.path.realpath(path))  # what a link points to is replaced, not the link
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_to_json(state, "state", tensors))
    metadata = {"format": str(FORMAT), "kind": kind, "state": text, "sha256": _digest(kind, text, tensors)}
    with tempfile.TemporaryDirectory(prefix=f".{path.name[:100]}-", dir=path.parent) as folder:
        new, like = Path(folder, "new"), Path(folder, "like")
        like.touch()  # with the permissions of a new file
        try:
            save_file(tensors, new, {f"attention_sinks.{name}": value for name, value in metadata.items()})
        except SafetensorError as error:  # by which it reports that the disk is full, for instance
            raise OSError(f"{path} could not be written: {error}") from error
        new.chmod((path if path.exists() else like).stat().st_mode & 0o777)
        _flush(new)
        os.replace(new, path)
    _flush(path.parent)


def read(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """What `write` was given, with tensors on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, damaged, of another kind or program, or written by a newer version.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {os.fspath(path)!r}.")
    said = f"`path` must be a file that `save` of a {kind} wrote, got {os.fspath(path)!r}:"
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            fields = ("format", "kind", "state", "sha256")
            version, found, text, digest = (metadata.get(f"attention_sinks.{name}", "") for name in fields)
            if not version.isdecimal():
                raise ValueError(f"{said} it is of another program.")
            if int(version) > FORMAT:
                raise ValueError(
                    f"{said} it was written by a newer version (format {version}; this one reads {FORMAT}). Upgrade "
                    "attention-sinks."
                )
            with torch.inference_mode(False):
                # A copy, not a view of the file, which somebody may write to.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # it is no dict
    except SafetensorError as error:
        raise ValueError(f"{said} it is truncated, damaged or no safetensors file ({error}).") from error
    if digest != _digest(found, text, tensors):
        raise ValueError(f"{said} it is damaged, its contents do not have the checksum it names.")
    if found != kind:
        raise ValueError(f"{said} it holds a {found}.")
    state: dict[str, Any] = _from_json(json.loads(text), tensors)
    return state


def _to_json(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON has it: a list of its type and contents. Tensors go to `tensors`, by their names."""
    if isinstance(value, Tensor):
        # In memory of its own, for a view would be written with all that it is a view of.
        own = value.detach().to("cpu").contiguous()
        own = own.clone() if own.untyped_storage().nbytes() > own.nbytes else own
        # Layers may share one.
        name = next((known for known, tensor in tensors.items() if tensor.is_set_to(own)), name)
        tensors[name] = own
        return ["tensor", name]
    if isinstance(value, torch.dtype | torch.device):
        return [type(value).__name__, str(value).removeprefix("torch.")]
    if isinstance(value, dict):
        return ["dict", [[key, _to_json(each, f"{name}.{key}", tensors)] for key, each in value.items()]]
    if isinstance(value, list | tuple):
        return ["list", [_to_json(each, f"{name}.{i}", tensors) for i, each in enumerate(value)]]
    if not isinstance(value, bool | int | float | str | None):
        raise TypeError(f"{name} cannot be saved, it is a {type(value).__name__}.")
    return ["plain", value]


def _from_json(value: Any, tensors: dict[str, Tensor]) -> Any:
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
    """The checksum of all that a file holds; safetensors has none."""
    digest = hashlib.sha256(json.dumps([kind, text]).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), tensor.shape]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Have the disk store what was written to a file, or which files are in a folder."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot, and need not, flush a folder
    file = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(file)
    finally:
        os.close(file)
