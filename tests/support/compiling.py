"""A compiler that counts, and the setting by which `generate` uses it on every device."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import CompileConfig


class Compiler:
    """A backend that counts the graphs that it compiles."""

    def __init__(self) -> None:
        self.compiled = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.compiled += 1
        return graph.forward

    def __deepcopy__(self, memo: Any) -> "Compiler":  # `generate` copies its config
        return self


def compile_everywhere(compiler: Compiler, fullgraph: bool = True) -> CompileConfig:
    config = CompileConfig(backend=compiler, fullgraph=fullgraph, mode=None)  # type: ignore[arg-type]
    config._compile_all_devices = True  # type: ignore[assignment]
    return config
