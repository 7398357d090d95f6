"""The inputs of each forward pass of `generate` go through a function, thread by thread.

A hook on the model would be compiled with it; `generate` calls `prepare_inputs_for_generation` outside of what is
compiled.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

# A function that is called in the place of the method, with the method as its first argument.
Prepare = Callable[..., dict[str, Any]]


class _PreparePatch:
    """What stands in the place of a model's `prepare_inputs_for_generation` while some thread needs it."""

    name = "prepare_inputs_for_generation"
    lock = threading.Lock()

    def __init__(self, model: Any) -> None:
        self.own = vars(model).get(self.name)
        self.prepare = getattr(model, self.name)
        # By thread, so that streams through one model do not meet.
        self.functions: dict[int, list[Prepare]] = {}

        @functools.wraps(self.prepare)  # `generate` reads the signature
        def prepared(*args: Any, **kwargs: Any) -> dict[str, Any]:
            prepare = self.prepare
            for function in self.functions.get(threading.get_ident(), ()):
                prepare = functools.partial(function, prepare)
            inputs: dict[str, Any] = prepare(*args, **kwargs)
            return inputs

        self.prepared = prepared
        vars(prepared)["patch"] = self


@contextlib.contextmanager
def inputs_prepared_by(model: Any, function: Prepare) -> Iterator[None]:
    """Let calls of this thread to the model's `prepare_inputs_for_generation` go to `function(prepare, ...)`."""
    thread = threading.get_ident()
    with _PreparePatch.lock:
        patch = getattr(vars(model).get(_PreparePatch.name), "patch", None) or _PreparePatch(model)
        setattr(model, _PreparePatch.name, patch.prepared)
        patch.functions.setdefault(thread, []).append(function)
    try:
        yield
    finally:
        with _PreparePatch.lock:
            patch.functions[thread].pop()
            if not patch.functions[thread]:
                del patch.functions[thread]
            if not patch.functions:
                vars(model).pop(_PreparePatch.name)
                vars(patch.prepared).clear()  # the patch and what it holds of the model would keep each other alive
                if patch.own is not None:
                    setattr(model, _PreparePatch.name, patch.own)
