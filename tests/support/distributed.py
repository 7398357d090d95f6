"""Streams through a model in one process, or in several that share its heads:

python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.support.distributed TARGET FOLDER...
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from attention_sinks import SinkCache, sink_generate, sink_prefill

from . import inside
from .models import CACHE, random_ids
from .streams import S, W

PLAIN: dict[str, Any] = {
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
    "output_logits": True,
    "return_dict_in_generate": True,
}
# Early transformers 5 takes `tp_plan` as an argument of its own.
SHARED: dict[str, Any] = (
    {"distributed_config": DistributedConfig(tp_plan="auto")}
    if hasattr(DistributedConfig, "tp_plan")
    else {"tp_plan": "auto"}
)


def prompt(model: Any, length: int) -> Tensor:
    """Random tokens `[1, length]` without the pad token, on the first device of the model."""
    return random_ids(length, seed=length).clamp(min=1).to(model.device)


def padded(model: Any, *lengths: int) -> tuple[Tensor, Tensor]:
    """Rows of these lengths with left padding, and their mask."""
    rows = [torch.nn.functional.pad(prompt(model, length), (max(lengths) - length, 0)) for length in lengths]
    ids = torch.cat(rows)
    return ids, (ids != 0).long()


def generated(output: Any) -> dict[str, Tensor]:
    return {"ids": output.sequences, "logits": torch.stack(output.logits, dim=1), **held(output[CACHE])}


def held(cache: Any) -> dict[str, Tensor]:
    """The states that all layers hold, `[layers, batch_size, heads, W, head_dim]`."""
    return {
        "keys": torch.stack([layer.keys.cpu() for layer in cache.layers]),
        "values": torch.stack([layer.values.cpu() for layer in cache.layers]),
    }


def by_hand(model: Any) -> dict[str, Tensor]:
    """A prompt, single tokens across the edge of the window, a chunk, and single tokens again."""
    cache = SinkCache(model.config, W, S)
    chunks = prompt(model, 60).split([7, *[1] * 20, 9, *[1] * 24], dim=1)
    logits = torch.cat([model(chunk, **{CACHE: cache}).logits for chunk in chunks], dim=1)
    return {"logits": logits, **held(cache)}


def by_generate(model: Any) -> dict[str, Tensor]:
    return generated(
        model.generate(prompt(model, 20), **{CACHE: SinkCache(model.config, W, S)}, max_new_tokens=30, **PLAIN)
    )


def by_sink_generate(model: Any) -> dict[str, Tensor]:
    return generated(
        sink_generate(model, prompt(model, 20), window_length=W, num_sink_tokens=S, max_new_tokens=30, **PLAIN)
    )


def by_beams(model: Any) -> dict[str, Tensor]:
    output: Any = sink_generate(
        model, prompt(model, 10), window_length=W, num_sink_tokens=S, num_beams=3, max_new_tokens=20, **PLAIN
    )
    return {"ids": output.sequences}


def by_padded_rows(model: Any) -> dict[str, Tensor]:
    ids, mask = padded(model, 5, 14, 30)
    return generated(
        sink_generate(model, ids, attention_mask=mask, window_length=W, num_sink_tokens=S, max_new_tokens=30, **PLAIN)
    )


def by_windowed_chunks(model: Any) -> dict[str, Tensor]:
    ids, mask = padded(model, 9, 50)
    cache = SinkCache(model.config, W, S, attention_mask=mask)
    outputs: list[Any] = list(sink_prefill(model, ids, cache, 11))
    logits = torch.cat([output.logits for output in outputs], dim=1)
    # Nothing is promised for pads.
    return {"logits": torch.where(mask[..., None] == 1, logits, 0), **held(cache)}


def by_a_file(model: Any) -> dict[str, Tensor]:
    """Half of a stream, then the rest of it from a file; each process has a file of its own."""
    cache = SinkCache(model.config, W, S)
    chunks = prompt(model, 60).split([20, *[1] * 40], dim=1)
    logits = [model(chunk, **{CACHE: cache}).logits for chunk in chunks[:20]]
    with tempfile.TemporaryDirectory() as folder:
        cache.save(Path(folder) / "stream")
        cache = SinkCache.load(Path(folder) / "stream", model.config)
    logits += [model(chunk, **{CACHE: cache}).logits for chunk in chunks[20:]]
    return {"logits": torch.cat(logits, dim=1), **held(cache)}


def refusal_of_a_common_file(folder: str, path: Path) -> str:
    """The error of a process that loads a file which the last process has overwritten."""
    cache = SinkCache(AutoModelForCausalLM.from_pretrained(folder).config, W, S)
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    states = torch.zeros(1, 1, 3, 16)
    for layer_idx in range(len(cache)):
        cache.update(states + torch.arange(3.0)[:, None], states, layer_idx)
    for turn in range(count):
        if turn == rank:
            cache.save(path)
        torch.distributed.barrier()
    try:
        SinkCache.load(path, inside.config_of(cache))
    except ValueError as error:
        return str(error)
    return ""


STREAMS = {
    stream.__name__: stream
    for stream in (by_hand, by_generate, by_sink_generate, by_beams, by_padded_rows, by_windowed_chunks, by_a_file)
}


@torch.no_grad()
def streams(folder: str, **options: Any) -> dict[str, dict[str, Tensor]]:
    """The results of all streams with the model in a folder, by the name of the stream."""
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    return {name: stream(model) for name, stream in STREAMS.items()}


if __name__ == "__main__":
    target, *folders = sys.argv[1:]
    results: dict[str, Any] = {folder: streams(folder, **SHARED) for folder in folders}
    results["refusal"] = refusal_of_a_common_file(folders[0], Path(target) / "common")
    torch.save(results, Path(target) / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
