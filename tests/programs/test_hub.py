"""The repository for the Hub works from its local folder, and imports of older versions get an answer."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from attention_sinks import SinkCache, sink_generate

from ..support.models import CACHE, random_ids, tiny_model

FOLDER = Path(__file__).parents[2] / "hub"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A copy of the folder without its requirements, which name a version that may not be installed yet."""
    shutil.copytree(FOLDER, tmp_path / "sinks")
    (tmp_path / "sinks/custom_generate/requirements.txt").unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return str(tmp_path / "sinks")


def test_the_hub_repository_generates_the_same_text_as_the_package(hub: str) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    ids = random_ids(10)
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True}
    output = model.generate(ids, custom_generate=hub, trust_remote_code=True, window_length=20, **options)
    expected: Any = sink_generate(model, ids, window_length=20, **options)
    assert torch.equal(output.sequences, expected.sequences)
    cache = output[CACHE]
    assert isinstance(cache, SinkCache)
    assert (cache.window_length, cache.num_sink_tokens, cache.kept_length) == (20, 4, 20)
    output = model.generate(input_ids=ids, custom_generate=hub, trust_remote_code=True, **options)
    assert (output[CACHE].window_length, output[CACHE].num_sink_tokens) == (256, 4)


def test_an_import_from_older_versions_gets_the_new_form_as_answer() -> None:
    with pytest.raises(ImportError, match=r"from transformers import AutoModelForCausalLM.*sink_generate\(model"):
        from attention_sinks import AutoModelForCausalLM  # noqa: F401
    with pytest.raises(ImportError, match="other"):
        from attention_sinks import other  # noqa: F401
