"""A fork of a stream goes on bitwise as the stream would, and the two share nothing that changes."""

import copy
import gc
import threading
import time
import weakref
from typing import Any

import pytest
import torch

from attention_sinks import SinkCache, sink_generate, sink_prefill

from ..support.inside import left_padding
from ..support.models import CACHE, LATER, MIXED, random_ids, tiny_model
from ..support.streams import NEW_STREAM, OPTIONS, S, W, padded, read_random

LATER_TOKENS = [1, 1, 3, 1, 20, *[1] * 15]


@pytest.mark.parametrize("name", ["llama", "gptj", *MIXED, *sorted(LATER)])
@pytest.mark.parametrize("lengths", [[3, 1], [W - 1, 1], [20, *[1] * 9]], ids=["below", "edge", "past"])
@torch.no_grad()
def test_a_fork_goes_on_bitwise_whatever_the_stream_does(name: str, lengths: list[int]) -> None:
    """`tests/laws/test_resuming.py` forks streams in all other states."""
    model = tiny_model(name)
    cache, untouched = SinkCache(model.config, W, S), SinkCache(model.config, W, S)
    read_random(model, cache, lengths)
    read_random(model, untouched, lengths)
    fork = cache.fork()
    second = fork.fork()
    read_random(model, cache, [1, 5, 30, 1], seed=2)
    cache.reset()
    expected = read_random(model, untouched, LATER_TOKENS, seed=1)
    for each in (second, fork):
        for mine, others in zip(read_random(model, each, LATER_TOKENS, seed=1), expected, strict=True):
            assert torch.equal(mine, others)


@pytest.mark.parametrize("steps", [1, 10, 40])
def test_a_fork_of_padded_rows_goes_on_bitwise(steps: int) -> None:
    model = tiny_model("llama")
    _, ids, mask = padded([5, 13, 14])
    output: Any = sink_generate(model, ids, attention_mask=mask, max_new_tokens=steps, **NEW_STREAM)
    cache, last = output[CACHE], output.sequences[:, -1:]
    forks = [cache.fork() for _ in range(2)]
    assert torch.equal(left_padding(forks[0]), left_padding(cache))  # type: ignore[arg-type]
    more: list[Any] = [sink_generate(model, last, cache=each, max_new_tokens=30, **OPTIONS) for each in (cache, *forks)]
    for each in more[1:]:
        assert torch.equal(torch.stack(each.logits), torch.stack(more[0].logits))


@pytest.mark.parametrize("lengths", [[3, 1], [20, 1]])
def test_a_fork_is_made_and_goes_on_in_any_mode_of_autograd(lengths: list[int]) -> None:
    """Also of layers with a sliding window of their own, whose states autograd made."""
    model = tiny_model("sliding beside full")
    with torch.enable_grad():
        cache = SinkCache(model.config, W, S)
        read_random(model, cache, lengths)
        in_grad = cache.fork()
    with torch.inference_mode():
        in_inference = cache.fork()
    with torch.no_grad():
        expected = read_random(model, cache, LATER_TOKENS, seed=1)
        for each in (in_grad, in_inference):
            for mine, others in zip(read_random(model, each, LATER_TOKENS, seed=1), expected, strict=True):
                assert torch.equal(mine, others)


@torch.no_grad()
def test_a_fork_takes_the_memory_of_the_window() -> None:
    """Layers of transformers hold views of a whole prompt; a fork holds what they show, and not the first stream."""
    model = tiny_model("sliding beside full")
    cache = SinkCache(model.config, W, S)
    read_random(model, cache, [400])
    fork = cache.fork()
    for layer in fork.layers:
        for states in (layer.keys, layer.values):
            assert states.untyped_storage().nbytes() == states.nbytes
    assert fork.config is cache.config
    forgotten = [weakref.ref(layer) for layer in cache.layers]
    del cache
    gc.collect()
    assert [layer() for layer in forgotten] == [None] * 3


@torch.no_grad()
def test_a_fork_made_while_a_call_runs_is_no_part_of_the_call() -> None:
    """Between two tokens of `sink_generate`, and between two chunks of `sink_prefill`."""
    model, ids, forks = tiny_model("llama"), random_ids(30), []
    cache = SinkCache(model.config, W, S)

    class Streamer:
        def put(self, value: Any) -> None:
            if cache.get_seq_length() > 30:
                forks.append(cache.fork())

        def end(self) -> None: ...

    output: Any = sink_generate(model, ids, cache=cache, max_new_tokens=8, streamer=Streamer(), **OPTIONS)
    assert len(forks) == 7
    for fork in forks:
        seen = fork.get_seq_length()
        logits = model(output.sequences[:, seen : seen + 1], **{CACHE: fork}).logits[:, -1]
        if seen < 37:
            assert torch.equal(logits, output.logits[seen - 29])
    cache = SinkCache(model.config, W, S)
    chunks = [(cache.fork(), cache.get_seq_length()) for _ in sink_prefill(model, ids, cache, 7)]
    for fork, seen in chunks[:-1]:
        for _ in sink_prefill(model, ids[:, seen:], fork, 7):
            pass
        for mine, others in zip(read_random(model, fork, [1]), read_random(model, cache.fork(), [1]), strict=True):
            assert torch.equal(mine, others)


def test_a_fork_of_an_interrupted_pass_is_refused() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    cache = SinkCache(model.config, W, S)
    with torch.no_grad():
        read_random(model, cache, [20])
    cache.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), 0)
    with pytest.raises(RuntimeError, match="interrupted"):
        cache.fork()


@torch.no_grad()
def test_a_fork_during_a_forward_pass_is_whole_or_refused() -> None:
    model = tiny_model("llama")
    cache, ended = SinkCache(model.config, W, S), threading.Event()
    read_random(model, cache, [20])

    @torch.no_grad()
    def run() -> None:
        while not ended.wait(0.001):
            read_random(model, cache, [1, 1, 5])

    thread = threading.Thread(target=run)
    thread.start()
    made, end = 0, time.monotonic() + 60
    try:
        while made < 20 and time.monotonic() < end:
            try:
                fork = cache.fork()
            except RuntimeError:
                continue
            made += 1
            read_random(model, fork, [1])
    finally:
        ended.set()
        thread.join()
    assert made == 20


def test_a_deep_copy_shares_the_config_too() -> None:
    model = tiny_model("llama")
    cache = SinkCache(model.config, W, S)
    assert copy.deepcopy(cache).config is model.config
