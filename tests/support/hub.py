"""A model's own folder that holds what `make hub` builds, as `hub/README.md` describes it."""

import json
import shutil
from pathlib import Path
from typing import Any

from hub.build import build

from .tokenizer import byte_tokenizer


def save_with_hub(model: Any, folder: Path, **settings: Any) -> None:
    """Save a model of `chat_model`, its tokenizer and `custom_generate` into `folder`, with generation settings."""
    build(folder.with_name("built"))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    shutil.copytree(folder.with_name("built") / "custom_generate", folder / "custom_generate")
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_from_model_config": False, **settings}))
