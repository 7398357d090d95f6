"""Modules of the library import each other in one direction, and tests reach into it in one place."""

import ast
import functools
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from ..support import inside
from ..support.programs import ROOT

LIBRARY = sorted(Path(path) for path in inside.library_files())
TESTS = sorted((ROOT / "tests").rglob("*.py"))
INSIDE = Path(inside.__file__)
# What tests may import from the library besides `inside`: the programs and what is theirs alone.
OPEN = {
    "attention_sinks",
    *(f"attention_sinks.{name}" for name in ("__main__", "compat", "evaluate", "lm_eval", "load", "recall")),
}


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, root: Path) -> Iterator[tuple[str, str]]:
    """All imports of a file, those inside functions too: the module, and the imported name."""
    package = module_name(path, root).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


def test_modules_of_the_library_do_not_import_each_other_in_a_circle() -> None:
    root = LIBRARY[0].parent.parent
    modules = {module_name(path, root): path for path in LIBRARY}
    graph = {
        name: {f"{module}.{imported}" if f"{module}.{imported}" in modules else module for module, imported in found}
        & modules.keys()
        for name, found in ((name, list(imports(path, root))) for name, path in modules.items())
    }
    assert len(graph) > 10
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT / "tests")))
def test_only_inside_py_knows_the_inside_of_the_library(path: Path) -> None:
    found = {module for module, _ in imports(path, ROOT) if module.split(".")[0] == "attention_sinks"}
    assert path == INSIDE or found <= OPEN
    assert not any(name.split(".")[-1].startswith("test_") for pair in imports(path, ROOT) for name in pair)
    private = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self")
    }
    assert path == INSIDE or not private & private_names()


@functools.cache
def private_names() -> set[str]:
    """The private functions, methods and attributes that the library defines."""
    names = set()
    for path in LIBRARY:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.name))
def test_modules_have_at_most_450_lines_and_classes_350(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 350, node.name
