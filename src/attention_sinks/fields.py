"""The fields of a saved state: named, typed and checked before any of them is used."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Device = str | torch.device | None
NoneType = type(None)


def checked(state: Any, fields: Mapping[Any, tuple[type, ...]], what: str) -> dict[str, Any]:
    """Return a state with exactly these fields, each of one of its types.

    Args:
        state: what a file holds.
        fields: the types of each field.
        what: what the state is of, for messages.

    Raises:
        ValueError: naming the first field that is unknown, missing or of another type.
    """
    if not isinstance(state, dict):
        raise ValueError(f"`path` must be a file that `save` wrote: the state of {what} is {state!r:.80}.")
    for name in [*fields, *state]:
        if name not in fields:
            raise ValueError(f"`path` must be a file that `save` wrote: {what} has the unknown entry {name!r}.")
        if name not in state:
            raise ValueError(f"`path` must be a file that `save` wrote: {what} has no entry {name!r}.")
        value, types = state[name], fields[name]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            wanted = " or ".join(each.__name__ for each in types)
            raise ValueError(
                f"`path` must be a file that `save` wrote: the entry {name!r} of {what} must be of the type {wanted}, "
                f"got {value!r:.80}."
            )
    return state


def check_slots(state: dict[str, Any], lengths: Mapping[str, int]) -> None:
    """Check that the buffers of a layer have their numbers of slots, if the layer has states.

    Raises:
        ValueError: naming the first buffer that does not.
    """
    for name, length in lengths.items():
        states = state[name]
        has_slots = states is not None and states.ndim == 4 and states.shape[2] == length
        if state["is_initialized"] != has_slots:
            raise ValueError(f"`path` must be a file that `save` wrote: its {name} do not have {length} slots.")


def copied(value: Any) -> Any:
    """Return a value with copies of its tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, list | tuple):
        return [copied(each) for each in value]
    return {key: copied(each) for key, each in value.items()} if isinstance(value, dict) else value


def placed(value: Any, saved_on: torch.device | None, device: Device) -> Any:
    """Return a value with its tensors on `device`, or where they were saved from.

    Raises:
        ValueError: if that device is not at hand.
    """
    if isinstance(value, Tensor):
        target = saved_on if device is None else device
        try:
            with torch.inference_mode(False):  # a copy, which may be written to
                return value.to("cpu" if target is None else target, copy=True)
        except (RuntimeError, AssertionError) as error:  # by which torch says that there is no such device
            raise ValueError(
                f"`device` must be at hand, got {device!r} for states that were on {saved_on}: {error}"
            ) from error
    if isinstance(value, list | tuple):
        return type(value)(placed(each, saved_on, device) for each in value)
    return {key: placed(each, saved_on, device) for key, each in value.items()} if isinstance(value, dict) else value
