"""The sources build the same bytes each time, with all that belongs in the package and nothing else."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import readme_renderer.markdown
from packaging.requirements import Requirement

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT: dict[str, Any] = PYPROJECT["project"]
VERSION: str = PROJECT["version"]
WHEEL = f"attention_sinks-{VERSION}-py3-none-any.whl"
SDIST = f"attention_sinks-{VERSION}.tar.gz"


def copy_sources(source: Path, target: Path) -> None:
    """Copy the files that git would track."""
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(".git", *ignored))


def files_in(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}


def build(sources: Path, target: Path, umask: int) -> Path:
    """Build the sdist, and the wheel from it; return their folder."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target)]
    result = subprocess.run(command, cwd=sources, umask=umask, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return target


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = tmp_path_factory.mktemp("first") / "clone"
    copy_sources(ROOT, sources)
    return sources


@pytest.fixture(scope="module")
def dist(sources: Path) -> Path:
    return build(sources, sources.parent / "dist", umask=0o022)


@pytest.fixture(scope="module")
def metadata(dist: Path) -> Message:
    with zipfile.ZipFile(dist / WHEEL) as wheel:
        return message_from_bytes(wheel.read(f"attention_sinks-{VERSION}.dist-info/METADATA"))


def test_the_same_sources_give_the_same_bytes(sources: Path, dist: Path, tmp_path: Path) -> None:
    again = tmp_path / "another folder"
    again.mkdir(mode=0o700)
    # The files are written in another order, at another time, with other permissions.
    for i, (name, path) in enumerate(sorted(files_in(sources).items(), reverse=True)):
        (again / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.copyfile(path, again / name)
        (again / name).chmod(path.stat().st_mode & 0o700)
        os.utime(again / name, (1e9 + i, 1e9 + i))
    built = [
        {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files_in(folder).items()}
        for folder in (dist, build(again, tmp_path / "dist", umask=0o077))
    ]
    assert built[0].keys() == {WHEEL, SDIST}
    assert built[0] == built[1]


def test_the_wheel_holds_the_package_and_nothing_else(dist: Path) -> None:
    package = [name for name in files_in(ROOT / "src") if "__pycache__" not in name]
    assert "attention_sinks/py.typed" in package, "type checkers look into no package without it"
    assert all(name.endswith((".py", "/py.typed")) for name in package)
    info = [f"attention_sinks-{VERSION}.dist-info/{name}" for name in ("METADATA", "WHEEL", "RECORD")]
    info += [f"attention_sinks-{VERSION}.dist-info/{name}" for name in ("entry_points.txt", "licenses/LICENSE")]
    with zipfile.ZipFile(dist / WHEEL) as wheel:
        assert sorted(wheel.namelist()) == sorted([*package, *info])
        entry_points = wheel.read(info[3]).decode().split()
        assert wheel.read(info[4]) == (ROOT / "LICENSE").read_bytes()
    assert entry_points == ["[console_scripts]", "attention-sinks", "=", "attention_sinks.cli:main"]


def test_the_sdist_holds_all_of_the_sources(sources: Path, dist: Path) -> None:
    expected = files_in(sources).keys()
    assert {"CITATION.cff", "Makefile", "SECURITY.md", "constraints.txt", "tests/support/models.py"} <= expected
    with tarfile.open(dist / SDIST) as sdist:
        names = {name.removeprefix(f"attention_sinks-{VERSION}/") for name in sdist.getnames()}
    assert names == expected | {"PKG-INFO"}


def test_the_metadata_is_that_of_the_project(metadata: Message) -> None:
    assert metadata["Version"] == VERSION
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    base = PROJECT["urls"]["Source"]
    assert metadata.get_all("Project-URL") == [f"{name}, {url}" for name, url in PROJECT["urls"].items()]
    assert all(url.startswith(base) for name, url in PROJECT["urls"].items() if name != "Paper")
    description = str(metadata.get_payload())
    for folder in ("raw", "blob"):
        description = description.replace(f"]({base}/{folder}/v{VERSION}/", "](")
    assert description == (ROOT / "README.md").read_text()


def test_the_pictures_and_links_of_the_long_description_are_absolute(metadata: Message) -> None:
    page = readme_renderer.markdown.render(str(metadata.get_payload()))
    assert page is not None
    targets = re.findall(r"""<(?:a|img)\b[^>]*?\b(?:href|src)="([^"]*)""", page)
    ours = [target for target in targets if target.startswith(PROJECT["urls"]["Source"])]
    assert len(ours) == len(re.findall(r"\]\((?!https?:)", (ROOT / "README.md").read_text())) > 10
    for target in targets:
        assert re.match("https?://|#", target), target
    for target in ours:
        kind, version, path = target.removeprefix(PROJECT["urls"]["Source"] + "/").split("#")[0].split("/", 2)
        assert (ROOT / path).exists(), target
        assert (kind, version) == ("raw" if path.endswith((".svg", ".png")) else "blob", f"v{VERSION}")


def test_the_wheel_is_installed_as_the_readme_says(dist: Path, tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(tmp_path)]
    subprocess.run([*install, str(dist / WHEEL)], check=True, timeout=300)
    # Earlier versions of another project, 0.x, are not taken for ours.
    old = Requirement("attention-sinks>=1").specifier
    assert VERSION in old
    assert "0.4.0" not in old
    program = "import attention_sinks as a, importlib.metadata as m; print(m.version('attention-sinks'), a.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == [VERSION, str(tmp_path / "attention_sinks/__init__.py")]


def test_every_dependency_is_bounded_from_below(metadata: Message) -> None:
    for line in metadata.get_all("Requires-Dist", []):
        requirement = Requirement(line)
        if requirement.name != "attention-sinks":  # an extra that includes other extras
            assert [bound.operator for bound in requirement.specifier] == [">="], line


def test_the_oldest_versions_tested_are_the_lower_bounds() -> None:
    extras = PROJECT["optional-dependencies"]
    promised = [*PROJECT["dependencies"], *extras["cli"], *extras["demo"], *PYPROJECT["build-system"]["requires"]]
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints-oldest.txt").read_text(), flags=re.MULTILINE))
    for requirement in map(Requirement, promised):
        (bound,) = requirement.specifier
        if requirement.name != "torch":  # its bound was tested by hand
            assert pins[requirement.name].removesuffix(".0") == bound.version.removesuffix(".0"), requirement
        assert requirement.specifier.contains(pins[requirement.name])


def test_the_version_is_the_same_everywhere() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    citation = (ROOT / "CITATION.cff").read_text()
    newest = re.search(r"^## \[(.+)\] - (.+)$", changelog, flags=re.MULTILINE)
    assert newest is not None
    assert newest[1] == VERSION
    assert f"\nversion: {newest[1]}\ndate-released: {newest[2]}\n" in citation
