"""What `make hub` builds needs no package, and generates what the package does."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.dynamic_module_utils import get_relative_import_files

from attention_sinks import SinkCache, sink_generate
from hub.build import build

from ..support import standalone
from ..support.hub import save_with_hub
from ..support.models import CACHE, random_ids, tiny_model
from ..support.programs import ENVIRONMENT
from ..support.tokenizer import byte_tokenizer, chat_model


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "sinks"
    build(folder)
    return folder


def test_the_folder_holds_all_of_its_code(hub: Path) -> None:
    code = hub / "custom_generate"
    assert {path.name for path in hub.iterdir()} == {"README.md", "LICENSE", "custom_generate"}
    found = {code / "generate.py", *map(Path, get_relative_import_files(code / "generate.py"))}
    assert found == set(code.glob("*.py")), "transformers copies what it finds so"
    allowed = {"torch", "transformers", "safetensors", *sys.stdlib_module_names}
    for path in found:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 or (node.level == 0 and str(node.module).split(".")[0] in allowed), path


def test_building_again_replaces_the_code_and_keeps_what_else_is_there(hub: Path, tmp_path: Path) -> None:
    shutil.copytree(hub, tmp_path / "again")
    (tmp_path / "again/custom_generate/other.py").touch()
    (tmp_path / "again/config.json").touch()
    build(tmp_path / "again")
    (tmp_path / "again/config.json").unlink()
    files = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (hub, tmp_path / "again")
    ]
    assert files[0] == files[1]


def test_the_repository_generates_what_the_package_does(hub: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    ids = random_ids(10)
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True}
    remote: dict[str, Any] = {"custom_generate": str(hub), "trust_remote_code": True}
    output = model.generate(ids, window_length=20, **remote, **options)
    expected: Any = sink_generate(model, ids, window_length=20, **options)
    assert torch.equal(output.sequences, expected.sequences)
    cache = output[CACHE]
    assert (cache.window_length, cache.num_sink_tokens, cache.kept_length) == (20, 4, 20)
    with pytest.raises(TypeError, match="`cache` must be a SinkCache, got that of attention_sinks.cache"):
        model.generate(ids, cache=SinkCache(model.config), **remote, **options)
    with pytest.raises(TypeError, match=r"`cache` must be a SinkCache, got that of transformers_modules\.sinks\."):
        sink_generate(model, ids, cache=cache, **options)


@pytest.mark.processes
def test_the_repository_and_a_model_that_holds_it_need_no_package(hub: Path, tmp_path: Path) -> None:
    model, tokenizer = chat_model(eos_token_id=None, pad_token_id=0), byte_tokenizer()
    save_with_hub(model, tmp_path / "model", window_length=16, num_sink_tokens=2)
    # As if downloaded from the Hub, whose files `transformers` copies one by one.
    stored, commit = tmp_path / "hub/models--someone--sinks", "0" * 40
    shutil.copytree(hub, stored / "snapshots" / commit)
    (stored / "refs").mkdir()
    (stored / "refs/main").write_text(commit)
    result = subprocess.run(
        [sys.executable, standalone.__file__, "someone/sinks", str(tmp_path / "model")],
        cwd=tmp_path,
        env={**ENVIRONMENT, "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout.splitlines()[-1])

    def generate(inputs: Any = None, **options: Any) -> Any:
        return sink_generate(model, inputs, window_length=16, num_sink_tokens=2, **options)

    expected = {name: output.sequences.tolist() for name, output in standalone.calls(generate).items()}
    assert printed["sequences"] == expected
    assert printed["own sequences"] == expected
    text = generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=30, do_sample=False)
    assert printed["pipeline"] == tokenizer.decode(text[0], skip_special_tokens=True)
    assert printed["caches"] == {
        "second turn": ["SinkCache", 16, 2, 16],
        "padded": ["SinkCache", 16, 2, 16],
        "default": ["SinkCache", 256, 4, 34],
        "own": ["SinkCache", 16, 2, 16],
        "argument": ["SinkCache", 20, 2, 20],
        "config": ["SinkCache", 24, 2, 24],
    }


def test_an_import_from_older_versions_gets_the_new_form_as_answer() -> None:
    with pytest.raises(ImportError, match=r"from transformers import AutoModelForCausalLM.*sink_generate\(model"):
        from attention_sinks import AutoModelForCausalLM  # noqa: F401
    with pytest.raises(ImportError, match="other"):
        from attention_sinks import other  # noqa: F401
