"""A stream gives the same logits and costs the same after a billion tokens as after a hundred."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attention_sinks import SinkCache, SinkSession, sink_generate, sink_prefill

from ..support.counting import Widest
from ..support.inside import age, age_session, position_offset_of
from ..support.models import CACHE, random_ids, relative_error, tiny_model
from ..support.streams import OPTIONS, S, W, by_token
from ..support.tokenizer import byte_tokenizer, chat_model

RING = W - S
OFFSETS = [
    pytest.param(2**24 - 100, marks=pytest.mark.exhaustive),
    pytest.param(2**25, marks=pytest.mark.exhaustive),
    10**9,
]
# Interleaved and partial rotation, rotating values, and layers without position.
NAMES = ["llama", "cohere", "phi", "deepseek_v3", "smollm3"]

pytestmark = pytest.mark.usefixtures("no_grad")


def stream(model: Any, rows: int = 1) -> tuple[SinkCache, Tensor]:
    """Random tokens, and a cache that has seen all of them but the last one."""
    ids = random_ids(60, batch_size=rows).clamp(min=1)
    cache = SinkCache(model.config, W, S)
    for _ in sink_prefill(model, ids[:, :-1], cache, 1):
        pass
    return cache, ids


HOW: dict[str, dict[str, Any]] = {"": {}, "chunks": {"prefill_chunk_size": 5}, "beams": {"num_beams": 2}}


@pytest.mark.parametrize("rebased", [False, True], ids=["never rebased", "rebased before"])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize(("name", "how"), [*(("llama", how) for how in HOW), *((name, "") for name in NAMES[1:])])
def test_generation_after_any_number_of_tokens_equals_generation_after_a_few(
    name: str, how: str, offset: int, rebased: bool
) -> None:
    model = tiny_model(name, num_hidden_layers=4 if name == "smollm3" else 2)
    outputs: list[Any] = []
    sizes = []
    for older in (0, offset):
        cache, ids = stream(model)
        by = age(cache, older, rebased)
        new = torch.cat([ids[:, -1:], random_ids(9, seed=1)], dim=1)
        with Widest() as widest:
            outputs.append(sink_generate(model, new, past_key_values=cache, max_new_tokens=50, **OPTIONS, **HOW[how]))
        assert cache.get_seq_length() == 59 + by + 10 + 49
        sizes.append(widest.numel)
    young, old = outputs
    assert torch.equal(old.sequences, young.sequences)
    assert relative_error(torch.stack(old.logits), torch.stack(young.logits)) < 1e-3
    assert sizes[1] == sizes[0], "no mask, ids or positions for the whole stream"


@pytest.mark.parametrize("offset", OFFSETS)
def test_padded_rows_continue_after_any_number_of_tokens(offset: int) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :13] = 0
    ids = random_ids(20, batch_size=2).clamp(min=1) * mask
    outputs: list[Any] = []
    for older in (0, offset):
        first: Any = sink_generate(
            model, ids, attention_mask=mask, window_length=W, num_sink_tokens=S, max_new_tokens=40, **OPTIONS
        )
        cache = first[CACHE]
        age(cache, older, rebased=True)
        outputs.append(
            sink_generate(model, first.sequences[:, -1:], past_key_values=cache, max_new_tokens=100, **OPTIONS)
        )
    assert relative_error(torch.stack(outputs[1].logits), torch.stack(outputs[0].logits)) < 1e-3


def test_keys_at_inexact_positions_are_gone_after_one_window() -> None:
    """Near position 2^24 a custom loop stores inexact keys; `sink_generate` continues it and evicts them."""
    model = tiny_model("llama", num_hidden_layers=1)
    offset, text = 2**24 - 100, random_ids(40)
    cache, _ = stream(model)
    offset = age(cache, offset, rebased=False)
    with pytest.warns(UserWarning, match="`sink_generate`, which rebases positions"):
        by_token(model, text, cache)
    output: Any = sink_generate(model, random_ids(1), past_key_values=cache, max_new_tokens=60, **OPTIONS)
    seen = torch.cat([random_ids(60).clamp(min=1)[:, :59], text, output.sequences], dim=1)
    for step, logits in enumerate(output.logits):
        held = seen[:, : 59 + 40 + step + 1]
        held = torch.cat([held[:, :S], held[:, -RING:]], dim=1)
        error = relative_error(logits, model(held, use_cache=False).logits[:, -1])
        assert error < (1e-3 if step >= RING else 0.2)


def test_the_error_of_a_generated_stream_does_not_grow() -> None:
    """Positions are rebased before rounding of float32 angles changes logits, not only before they end."""
    model = tiny_model("llama", num_hidden_layers=1)
    cache, ids = stream(model)
    age(cache, 2**15 - 600, rebased=False)
    bases, worst = set(), 0.0
    for _ in range(3):
        output: Any = sink_generate(model, ids[:, -1:], past_key_values=cache, max_new_tokens=400, **OPTIONS)
        bases.add(position_offset_of(cache))
        ids = torch.cat([ids, output.sequences[:, 1:]], dim=1)
        held = torch.cat([ids[:, :S], ids[:, -1 - RING : -1]], dim=1)
        worst = max(worst, relative_error(output.logits[-1], model(held, use_cache=False).logits[:, -1]))
    assert bases == {0, 2**15 - W}
    assert worst < 2e-4


def generated(model: Any, ids: Tensor, cache: SinkCache) -> None:
    mask = torch.ones(1, cache.get_seq_length() + 1, dtype=torch.long)
    model.generate(ids[:, :1], attention_mask=mask, **{CACHE: cache}, max_new_tokens=200, eos_token_id=None)


@pytest.mark.parametrize("run", [pytest.param(generated, marks=pytest.mark.exhaustive), by_token])
def test_plain_generation_warns_and_stops_before_positions_end(run: Any) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    cache, _ = stream(model)
    age(cache, 2**24 - 100, rebased=False)
    with (
        pytest.warns(UserWarning, match="roundings begin to show") as warned,
        pytest.raises(ValueError, match=f"`query_length` must be at most 0 after {2**24} tokens.*`sink_generate`"),
    ):
        run(model, random_ids(200), cache)
    assert len(warned) == 1
    assert cache.get_seq_length() == 2**24


def test_compact_lets_a_custom_decoding_loop_run_without_end() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    cache, other = stream(model)[0], stream(model)[0]
    age(cache, 2**24 - 100, rebased=False)
    for t, token in enumerate(random_ids(200, seed=1).split(1, dim=1)):
        if t % 50 == 0:
            cache.compact()
        logits, expected = (model(token, **{CACHE: each}).logits for each in (cache, other))
        assert relative_error(logits, expected) < 1e-3


@pytest.mark.parametrize("offset", OFFSETS)
def test_a_session_continues_after_any_number_of_tokens(offset: int) -> None:
    model = chat_model()
    answers, sizes = [], []
    for older in (0, offset):
        session = SinkSession(model, byte_tokenizer(), 48)
        "".join(session.chat("Hello. " * 9, max_new_tokens=60))
        before = session.tokens_seen
        age_session(session, older)
        with Widest() as widest:
            answers.append("".join(session.chat("And then?", max_new_tokens=120)))
        assert session.tokens_seen > before + older
        sizes.append(widest.numel)
    assert answers[0] == answers[1]
    assert sizes[0] == sizes[1]
