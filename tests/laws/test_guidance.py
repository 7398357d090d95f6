"""With `guidance_scale` the stream without the prompt has a window of its own, and both are exact."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attention_sinks import SinkCache, sink_generate

from ..support.models import CACHE, build_config, build_model, random_ids, tiny_model
from ..support.streams import NEW_STREAM, OPTIONS, S, W, padded, read

SCALE = 1.5


@torch.no_grad()
def guided(model: Any, ids: Tensor, length: int, negative: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """The text that two streams give, one with and one without the prompt."""
    caches = SinkCache(model.config, W, S), SinkCache(model.config, W, S, attention_mask=mask)
    inputs = [ids, ids[:, -1:] if negative is None else negative]
    for _ in range(length):
        scores, others = (
            read(model, cache, new)[:, -1].log_softmax(-1) for cache, new in zip(caches, inputs, strict=True)
        )
        token = (SCALE * (scores - others) + others).argmax(-1, keepdim=True)
        inputs = [token, token]
        ids = torch.cat([ids, token], dim=1)
    return ids


@pytest.mark.parametrize("length", [5, 12, 60])
def test_both_streams_keep_to_the_window(length: int) -> None:
    model, ids = tiny_model("llama", num_hidden_layers=2), random_ids(10)
    output: Any = sink_generate(model, ids, guidance_scale=SCALE, max_new_tokens=length, **NEW_STREAM)
    assert torch.equal(output.sequences, guided(model, ids, length))


@pytest.mark.parametrize("lengths", [[7, 7], [4, 7], [30, 30], [20, 30]])
def test_a_negative_prompt_may_be_padded_and_longer_than_the_window(lengths: list[int]) -> None:
    model, ids = tiny_model("llama", num_hidden_layers=2), random_ids(10, 2)
    _, negative, mask = padded(lengths)
    output: Any = sink_generate(
        model,
        ids,
        guidance_scale=SCALE,
        negative_prompt_ids=negative,
        negative_prompt_attention_mask=mask,
        max_new_tokens=40,
        **NEW_STREAM,
    )
    assert torch.equal(output.sequences, guided(model, ids, 40, negative, mask))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=str)
def test_below_the_window_it_is_what_generate_does(options: dict[str, Any]) -> None:
    model, ids = tiny_model("llama", num_hidden_layers=2), random_ids(10)
    options = {**OPTIONS, "guidance_scale": SCALE, "max_new_tokens": 20, **options}
    torch.manual_seed(0)
    expected = model.generate(ids, **options)
    torch.manual_seed(0)
    output: Any = sink_generate(model, ids, window_length=64, **options)
    assert torch.equal(output.sequences, expected.sequences)
    assert all(torch.equal(*pair) for pair in zip(output.scores, expected.scores, strict=True))


def test_no_cache_of_a_call_outgrows_the_window() -> None:
    model, lengths = build_model(build_config("llama")), set()

    def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        lengths.add(kwargs[CACHE].layers[0].keys.shape[2])

    model.model.layers[0].self_attn.register_forward_hook(note, with_kwargs=True)
    sink_generate(model, random_ids(10), guidance_scale=SCALE, max_new_tokens=60, **NEW_STREAM)
    assert max(lengths) == W


def test_the_second_stream_is_rebased_too() -> None:
    ids, short, long = random_ids(10), build_config("phi3", max_position_embeddings=40), build_config("phi3")
    short.original_max_position_embeddings = long.original_max_position_embeddings = 40
    model = build_model(long)
    output: Any = sink_generate(model, ids, guidance_scale=SCALE, max_new_tokens=80, **NEW_STREAM)
    assert torch.equal(output.sequences, guided(model, ids, 80))
    gptj = build_model(build_config("gptj", max_position_embeddings=40))
    sink_generate(gptj, ids, guidance_scale=SCALE, max_new_tokens=80, **NEW_STREAM)


@pytest.mark.parametrize(
    ("negative", "mask", "error", "message"),
    [
        ([[1, 2]], None, TypeError, "`negative_prompt_ids` must be a tensor of token ids"),
        (random_ids(5), None, ValueError, "`negative_prompt_ids` must have 2 rows"),
        (random_ids(5, 2) + 1000, None, ValueError, "`negative_prompt_ids` must be from 0 to 96"),
        (random_ids(5, 2), torch.ones(1, 5), ValueError, "`negative_prompt_attention_mask` must have the shape"),
        (None, torch.ones(2, 5), ValueError, "`negative_prompt_attention_mask` must have the shape"),
        (random_ids(2, 2), torch.tensor([[1, 0], [1, 1]]), ValueError, "`negative_prompt_attention_mask`: .* left"),
    ],
)
def test_a_bad_negative_prompt_is_refused_before_anything_is_read(
    negative: Any, mask: Any, error: type[Exception], message: str
) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    cache = SinkCache(model.config, W, S)
    arguments = {"negative_prompt_ids": negative, "negative_prompt_attention_mask": mask}
    with pytest.raises(error, match=message):
        sink_generate(model, random_ids(10, 2), cache=cache, guidance_scale=SCALE, max_new_tokens=3, **arguments)
    assert cache.get_seq_length() == 0
