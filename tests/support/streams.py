"""Ways to read and to continue a stream, and the sizes and options that most tests use."""

import contextlib
from typing import Any

import torch
from torch import Tensor

from attention_sinks import SinkCache, sink_prefill

from . import inside
from .models import CACHE, random_ids

W, S = 16, 4
# Greedy decoding that never ends by itself and returns all that it computes.
OPTIONS: dict[str, Any] = {
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
    "output_logits": True,
    "output_scores": True,
    "return_dict_in_generate": True,
}
NEW_STREAM: dict[str, Any] = {"window_length": W, "num_sink_tokens": S, **OPTIONS}


def read(model: Any, cache: Any, ids: Tensor) -> Tensor:
    """Logits of one forward pass, with the mask and the positions that a padded or a rebased stream needs."""
    more: dict[str, Any] = {}
    rebased: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if isinstance(cache, SinkCache):
        padding, offset, seen = inside.left_padding(cache), inside.position_offset_of(cache), cache.get_seq_length()
        columns = torch.arange(seen + ids.shape[1])
        rebased = inside.announced(cache, ids.shape[1])
        if padding is not None:
            more["attention_mask"] = (columns >= padding[:, None]).long()
            more["position_ids"] = (columns - padding[:, None]).clamp(min=0)[:, seen:]
        if offset > 0:
            more["position_ids"] = columns[None, seen:] - offset
    with rebased:
        logits: Tensor = model(ids, **{CACHE: cache}, **more).logits
    return logits


def read_chunks(model: Any, cache: Any, ids: Tensor, lengths: list[int]) -> list[Tensor]:
    """Logits of a text that is read in chunks of these lengths."""
    return [read(model, cache, chunk) for chunk in ids.split(lengths, dim=1)]


def read_random(model: Any, cache: SinkCache, lengths: list[int], seed: int = 0) -> list[Tensor]:
    """Logits of random chunks of these lengths."""
    ids = random_ids(sum(lengths), batch_size=max(inside.num_rows(cache), 1), seed=seed)
    return read_chunks(model, cache, ids, lengths)


def by_token(model: Any, ids: Tensor, cache: SinkCache | None = None) -> Tensor:
    """Logits `[batch_size, length, vocab_size]` of a text that is read token by token."""
    cache = SinkCache(model.config, W, S) if cache is None else cache
    return torch.cat([model(token, **{CACHE: cache}).logits for token in ids.split(1, dim=1)], dim=1)


def prefilled(model: Any, ids: Tensor, cache: SinkCache, chunk_size: int) -> Tensor:
    """Logits `[batch_size, length, vocab_size]` of a text that `sink_prefill` reads."""
    outputs: list[Any] = list(sink_prefill(model, ids, cache, chunk_size))
    return torch.cat([output.logits for output in outputs], dim=1)


def scored(model: Any, ids: Tensor, prompt_length: int) -> Tensor:
    """Logits `[1, new, vocab_size]` that predict a text after its prompt was read at once, then single tokens."""
    cache = SinkCache(model.config, W, S)
    logits = [model(ids[:, :prompt_length], **{CACHE: cache}).logits[:, -1:]]
    for t in range(prompt_length, ids.shape[1] - 1):
        positions = {} if model.config.model_type == "mpt" else {"position_ids": torch.tensor([[t]])}
        logits.append(model(ids[:, t : t + 1], **{CACHE: cache}, **positions).logits)
    return torch.cat(logits, dim=1)


def padded(lengths: list[int]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Random rows `[1, length]` without the pad token, the batch of them with padding on the left, and its mask."""
    rows = [random_ids(length, seed=length).clamp(min=1) for length in lengths]
    longest = max(lengths)
    ids = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (longest - row.shape[1], 0)) for row in rows])
    return rows, ids, mask
