"""The threads of PyTorch on the CPU, by the OpenMP library that it computes with.

`torch.set_num_threads` is for the whole process. OpenMP has settings for the calling thread alone.
"""

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")


def on_one_cpu(function: Callable[[], T]) -> T:
    """Call `function` in a thread of its own that computes alone, and return what it returns.

    Otherwise PyTorch wakes several threads even for tiny operations, and waits for all of them: where other processes
    keep the CPUs busy, a time slice for each operation. The settings of other threads stay as they are. Without GNU
    OpenMP, `function` computes with as many threads as in the calling thread.
    """

    def call() -> T:
        torch.get_num_threads()  # PyTorch gives a new thread its number of threads once
        if (openmp := gnu_openmp()) is not None:
            openmp.omp_set_num_threads(1)
        if (mkl := _mkl()) is not None:
            mkl.MKL_Set_Num_Threads_Local(1)
        return function()

    with ThreadPoolExecutor(max_workers=1) as executor:
        try:
            future = executor.submit(call)
        except RuntimeError:  # the program ends, and no thread can start
            return function()
        return future.result()


@functools.cache
def gnu_openmp() -> ctypes.CDLL | None:
    """Return the GNU OpenMP library that comes with PyTorch, None if it uses another one."""
    return _loaded("libgomp*.so*", "omp_pause_resource_all")


@functools.cache
def _mkl() -> ctypes.CDLL | None:
    """Return the library of PyTorch that contains MKL, None without MKL."""
    return _loaded("libtorch_cpu.so", "MKL_Set_Num_Threads_Local")


def _loaded(pattern: str, function: str) -> ctypes.CDLL | None:
    """Return the loaded library of PyTorch whose file name matches `pattern` and that has `function`."""
    for path in Path(torch.__file__).parent.glob(f"lib/{pattern}"):
        with contextlib.suppress(OSError):  # it was not loaded
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD)
            if hasattr(library, function):
                return library
    return None
