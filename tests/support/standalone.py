"""A program without the package: calls what `make hub` built, and prints what came out.

Arguments: the repository that was built, and the folder of a model that holds it, with windows of 16 and 2 sinks.
"""

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, pipeline

OPTIONS: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True}


def prompt(length: int, num_rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 90, (num_rows, length), generator=torch.Generator().manual_seed(seed))


def padded() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    return {"input_ids": prompt(10, 2) * mask, "attention_mask": mask}


def calls(generate: Any, **options: Any) -> dict[str, Any]:
    """Generate below and past the window, for padded rows, and in a second turn."""
    short = generate(prompt(5), **{**OPTIONS, "max_new_tokens": 8, **options})
    past = generate(prompt(10), **OPTIONS, **options)
    rows = generate(**padded(), **OPTIONS, **options)
    turn = torch.cat([past.sequences, prompt(4, seed=1)], dim=1)
    second = generate(turn, past_key_values=past.past_key_values, **OPTIONS, **options)
    return {"below": short, "past": past, "padded": rows, "second turn": second}


def main(repository: str, model_folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    remote = {"custom_generate": repository, "trust_remote_code": True}
    outputs = calls(model.generate, window_length=16, num_sink_tokens=2, **remote)
    sequences = {name: output.sequences.tolist() for name, output in outputs.items()}
    caches = {"second turn": outputs["second turn"].past_key_values, "padded": outputs["padded"].past_key_values}
    model.generation_config = GenerationConfig()
    caches["default"] = model.generate(prompt(5), **OPTIONS, **remote).past_key_values

    own = AutoModelForCausalLM.from_pretrained(model_folder, trust_remote_code=True)
    own_sequences = {name: output.sequences.tolist() for name, output in calls(own.generate).items()}
    caches["own"] = own.generate(prompt(5), **OPTIONS).past_key_values
    caches["argument"] = own.generate(input_ids=prompt(5), window_length=20, **OPTIONS).past_key_values
    config = GenerationConfig(window_length=24, **OPTIONS)
    caches["config"] = own.generate(prompt(5), config).past_key_values
    text = pipeline("text-generation", model_folder, trust_remote_code=True, max_new_tokens=30)("Hello", **OPTIONS)

    print(
        json.dumps(
            {
                "sequences": sequences,
                "own sequences": own_sequences,
                "pipeline": text[0]["generated_text"],
                "caches": {
                    name: [type(cache).__name__, cache.window_length, cache.num_sink_tokens, cache.kept_length]
                    for name, cache in caches.items()
                },
            }
        )
    )


if __name__ == "__main__":
    sys.modules["attention_sinks"] = None  # type: ignore[assignment]  # an import of it fails
    main(*sys.argv[1:])
