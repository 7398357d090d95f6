"""The inputs of each forward pass of `generate` go through a function, thread by thread.

A hook on the model would be compiled with it; `generate` calls `prepare_inputs_for_generation` outside of what is
compiled.
"""

import contextlib
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from transformers import PreTrainedModel

# A function that is called in the place of the method, with the method as its first argument.
Prepare = Callable[..., dict[str, Any]]

_NAME = "prepare_inputs_for_generation"
# Under this lock nothing is called: there Python looks neither for Ctrl-C, nor for garbage, whose collection may wait
# for other threads.
_lock = threading.Lock()


class _PreparePatch:
    """What stands in the place of a model's `prepare_inputs_for_generation` while some thread needs it.

    A model that is copied or pickled meanwhile gets its own method in that place.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.attributes = vars(model)
        self.own: Any = self.attributes.get(_NAME)
        self.prepare: Prepare = getattr(model, _NAME)
        if isinstance(self.own, _PreparePatch):
            self.own, self.prepare = self.own.own, self.own.prepare
        # With their threads, so that streams through one model do not meet.
        self.functions: dict[Prepare, int] = {}
        functools.update_wrapper(self, self.prepare)  # `generate` reads the signature

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        prepare: Prepare = self.prepare
        for function, thread in self.functions.copy().items():
            if thread == threading.get_ident():
                prepare = functools.partial(function, prepare)
        return prepare(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (self.prepare,)

    def forget(self, function: Prepare) -> None:
        """Call a function no more; the last one takes the patch with it."""
        with _lock:
            if function in self.functions:
                del self.functions[function]
            if not self.functions and _NAME in self.attributes and self.attributes[_NAME] is self:
                if self.own is None:
                    del self.attributes[_NAME]
                else:
                    self.attributes[_NAME] = self.own


@contextlib.contextmanager
def inputs_prepared_by(model: PreTrainedModel, function: Prepare) -> Iterator[None]:
    """Let calls of this thread to the model's `prepare_inputs_for_generation` go to `function(prepare, ...)`."""
    thread, attributes, patch = threading.get_ident(), vars(model), _PreparePatch(model)
    try:
        with _lock:
            if _NAME in attributes and attributes[_NAME].__class__ is _PreparePatch:
                patch = attributes[_NAME]
            patch.functions[function] = thread
            attributes[_NAME] = patch
        _patches.add(patch)
        yield
    finally:
        patch.forget(function)


# All that stand on a model.
_patches: weakref.WeakSet[_PreparePatch] = weakref.WeakSet()


def _keep_own_thread() -> None:
    """In a forked process only the thread that forked it goes on."""
    for patch in list(_patches):
        for function, thread in list(patch.functions.items()):
            if thread != threading.get_ident():
                patch.forget(function)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_own_thread)
