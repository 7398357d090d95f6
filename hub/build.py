"""`make hub`: a `custom_generate` repository that needs nothing but `transformers` and what it depends on.

`transformers` copies `custom_generate/generate.py` and the modules beside it that its lines `from .name import ...`
name, but no folders, and in early versions not what those modules import. So each module of the package that `generate`
needs becomes one file with a flat name, and `generate.py` names them all.
"""

import argparse
import ast
import re
import shutil
import tomllib
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

HUB = Path(__file__).resolve().parent
ROOT = HUB.parent
PACKAGE = "attention_sinks"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what to build; an earlier one is replaced")
    build(parser.parse_args().folder)


def build(folder: Path) -> None:
    """Write the repository into `folder`."""
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    header = f"# Built from {project['name']} {project['version']} by `make hub`. Change the package instead.\n\n"
    code = folder / "custom_generate"
    shutil.rmtree(code, ignore_errors=True)
    code.mkdir(parents=True)
    needed = ["generate"]
    texts = {}
    for module in needed:  # grows
        texts[module], imported = flattened(module)
        needed += sorted(imported - {*needed})
    names = "".join(f"from .{flat(module)} import __name__ as _\n" for module in sorted(texts.keys() - {"generate"}))
    texts["generate"] += f"\n\n# `transformers` copies what lines like these name.\n{names}"
    for module, text in texts.items():
        (code / f"{flat(module)}.py").write_text(header + text)
    (code / "requirements.txt").write_text("".join(f"{line}\n" for line in project["dependencies"]))
    shutil.copyfile(HUB / "README.md", folder / "README.md")
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")


def path_of(module: str) -> Path:
    """Return the file of a module of the package, or of what `custom_generate` calls."""
    return HUB / "generate.py" if module == "generate" else ROOT.joinpath("src", *module.split(".")).with_suffix(".py")


def flat(module: str) -> str:
    """Return the name of a module in the repository."""
    return module.replace(".", "_")


def flattened(module: str) -> tuple[str, set[str]]:
    """Return the text of a module that imports from modules beside it, and the names of these in the package."""
    lines = path_of(module).read_text().splitlines(keepends=True)
    imported = set()
    for node in ast.walk(ast.parse("".join(lines))):
        if not isinstance(node, ast.ImportFrom):
            continue
        source = resolve_name("." * node.level + (node.module or ""), module.rpartition(".")[0])
        if source.split(".")[0] != PACKAGE:
            continue
        if path_of(source).is_file():
            imported.add(source)
            start, new = r"from\s+\S+\s+import", f"from .{flat(source)} import"
        else:  # a package: what is imported are modules
            imported |= {f"{source}.{alias.name}" for alias in node.names}
            start = r"from\s.*"
            new = "from . import " + ", ".join(
                f"{flat(f'{source}.{alias.name}')} as {alias.asname or alias.name}" for alias in node.names
            )
            assert node.lineno == node.end_lineno, f"{module}, line {node.lineno}: import modules in one line"
        lines[node.lineno - 1] = re.sub(start, new, lines[node.lineno - 1], count=1)
    return "".join(lines), imported


if __name__ == "__main__":
    main()
