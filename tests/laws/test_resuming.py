"""A stream that is resumed from a file, or forked, is bitwise equal to one that never stopped."""

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from attention_sinks import Rotation, SinkCache, sink_generate, sink_prefill

from ..support.inside import SinkLayer, rotation_of, seen_of
from ..support.models import CACHE, LATER, MIXED, build_config, random_ids, tiny_model
from ..support.streams import S, W, read_random
from ..support.versions import RECORDS_PAST

NAMES = ["llama", "cohere", "gptj", "deepseek_v3", "smollm3", "mistral-sliding", "mpt", *MIXED, *sorted(LATER)]

pytestmark = pytest.mark.usefixtures("no_grad")


def recorded(model: Any, cache: SinkCache) -> None:
    read_random(model, cache, [20, 1])
    cache.activate_past_recording()  # type: ignore[no-untyped-call]
    read_random(model, cache, [4])


def continued(model: Any, cache: SinkCache) -> list[Tensor]:
    if RECORDS_PAST and cache.is_recording_past(0):  # early transformers 5 does not record
        cache.crop(-2)
        cache.deactivate_past_recording()
    return read_random(model, cache, [1, 1, 3, 1, 20, *[1] * 15], seed=1)


def cropped(model: Any, cache: SinkCache) -> None:
    read_random(model, cache, [W + 5, 1, 1])
    cache.crop(-4)


def rebased(model: Any, cache: SinkCache) -> None:
    read_random(model, cache, [20, 1, 1])
    cache.rebase()


def compacted(model: Any, cache: SinkCache) -> None:
    read_random(model, cache, [20, 1, 1])
    cache.compact()
    read_random(model, cache, [1])


def repeated(model: Any, cache: SinkCache) -> None:
    read_random(model, cache, [20, 1])
    cache.batch_repeat_interleave(3)


MOMENTS: dict[str, Callable[[Any, SinkCache], object]] = {
    "empty": lambda model, cache: None,
    "one token": lambda model, cache: read_random(model, cache, [1]),
    "below the window": lambda model, cache: read_random(model, cache, [3, 1, 4]),
    "at its edge": lambda model, cache: read_random(model, cache, [W - 1, 1]),
    "past it": lambda model, cache: read_random(model, cache, [W + 5, *[1] * 9, 4]),
    "after a crop": cropped,
    "while candidates may be taken back": recorded,
    "after a rebase": rebased,
    "after compaction": compacted,
    "with three rows": repeated,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_resumed_stream_is_bitwise_equal_to_one_that_never_stopped(name: str, moment: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    cache = SinkCache(model.config, W, S)
    if moment in ("after a rebase", "after compaction") and not cache.can_rebase:
        pytest.skip("its positions cannot be rebased")
    if moment in ("after a crop", "while candidates may be taken back"):
        if any(type(layer) is not SinkLayer for layer in cache.layers) and name != "deepseek_v32":
            pytest.skip("its other layers cannot take tokens back")
        if moment.startswith("while") and not RECORDS_PAST:
            pytest.skip("early transformers 5 does not record the past")
    MOMENTS[moment](model, cache)
    cache.save(tmp_path / "stream")
    resumed, fork = SinkCache.load(tmp_path / "stream", model.config), cache.fork()
    for each in (resumed, fork):
        assert (each.get_seq_length(), each.kept_length) == (cache.get_seq_length(), cache.kept_length)
    expected = continued(model, cache)
    for each in (resumed, fork):
        for mine, others in zip(continued(model, each), expected, strict=True):
            assert torch.equal(mine, others)
        assert each.get_seq_length() == cache.get_seq_length()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_resumed_bitwise(dtype: torch.dtype, tmp_path: Path) -> None:
    with torch.device("cpu"):
        model = transformers.LlamaForCausalLM._from_config(build_config("llama", num_hidden_layers=2), dtype=dtype)
    cache = SinkCache(model.config, W, S)
    read_random(model, cache, [20, 1, 1])
    cache.save(tmp_path / "stream")
    resumed = SinkCache.load(tmp_path / "stream", model.config)
    for mine, others in zip(continued(model, resumed), continued(model, cache), strict=True):
        assert torch.equal(mine, others)


@pytest.mark.parametrize("steps", [1, 10, 40])
def test_padded_rows_are_resumed_bitwise(steps: int, tmp_path: Path) -> None:
    model = tiny_model("llama")
    ids, mask = random_ids(14, batch_size=3).clamp(min=1), torch.ones(3, 14, dtype=torch.long)
    mask[0, :9] = mask[1, :1] = 0
    options: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    output: Any = sink_generate(
        model, ids * mask, attention_mask=mask, window_length=W, num_sink_tokens=S, max_new_tokens=steps,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    cache = output[CACHE]
    cache.save(tmp_path / "stream")
    resumed = SinkCache.load(tmp_path / "stream", model.config)
    pickled = pickle.loads(pickle.dumps(cache))
    more: list[Any] = [
        sink_generate(
            model, output.sequences[:, -1:], past_key_values=each, max_new_tokens=30, output_logits=True,
            return_dict_in_generate=True, **options,
        )
        for each in (resumed, pickled, cache)
    ]  # fmt: skip
    for each in more[:2]:
        assert torch.equal(each.sequences, more[2].sequences)
        assert torch.equal(torch.stack(each.logits), torch.stack(more[2].logits))


def test_a_save_changes_nothing_and_a_loaded_cache_shares_nothing(tmp_path: Path) -> None:
    model = tiny_model("llama")
    cache, untouched = SinkCache(model.config, W, S), SinkCache(model.config, W, S)
    for each in (cache, untouched):
        read_random(model, each, [20, 1, 1])
    cache.save(tmp_path / "stream")
    first = SinkCache.load(tmp_path / "stream", model.config)
    read_random(model, first, [7])
    cache.save(tmp_path / "stream")  # over the file that `first` was loaded from
    read_random(model, first, [7])
    for mine, others in zip(continued(model, cache), continued(model, untouched), strict=True):
        assert torch.equal(mine, others)


def test_caches_made_from_one_state_share_nothing() -> None:
    model = tiny_model("llama")
    cache = SinkCache(model.config, W, S)
    read_random(model, cache, [20, 1, 1])
    state = cache.state()
    first, second = (SinkCache.from_state(state, model.config) for _ in range(2))
    read_random(model, first, [30])
    for mine, others in zip(continued(model, second), continued(model, cache), strict=True):
        assert torch.equal(mine, others)


def test_a_rotation_given_as_argument_is_resumed(tmp_path: Path) -> None:
    model = tiny_model("llama")
    inv_freq = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    cache = SinkCache(model.config, W, S, rotation=Rotation(inv_freq))
    read_random(model, cache, [20, 1])
    cache.save(tmp_path / "stream")
    resumed = SinkCache.load(tmp_path / "stream", model.config)
    rotation = rotation_of(resumed.layers[0])
    assert rotation is not None
    assert torch.equal(rotation.inv_freq, Rotation(inv_freq).inv_freq)
    for mine, others in zip(continued(model, resumed), continued(model, cache), strict=True):
        assert torch.equal(mine, others)


def test_a_save_during_a_forward_pass_is_whole_or_refused(tmp_path: Path) -> None:
    """Another thread updates the cache without a pause; no file holds half of a forward pass."""
    model = tiny_model("llama")
    cache, ended, path = SinkCache(model.config, W, S), threading.Event(), tmp_path / "stream"
    read_random(model, cache, [20])

    def run() -> None:
        with torch.no_grad():
            while not ended.is_set():
                read_random(model, cache, [1, 1, 5])

    thread = threading.Thread(target=run)
    thread.start()
    saved = 0
    try:
        for _ in range(2000):
            try:
                cache.save(path)
            except RuntimeError as error:
                assert "forward pass" in str(error)  # noqa: PT017
                continue
            saved += 1
            loaded = SinkCache.load(path, model.config)
            assert {seen_of(layer) for layer in loaded.layers} == {loaded.get_seq_length()}
            if saved == 20:
                break
    finally:
        ended.set()
        thread.join()
    cache.save(path)
    for mine, others in zip(continued(model, SinkCache.load(path, model.config)), continued(model, cache), strict=True):
        assert torch.equal(mine, others)


def test_a_stream_loaded_in_inference_mode_continues_outside_of_it(tmp_path: Path) -> None:
    model = tiny_model("llama")
    cache = SinkCache(model.config, W, S)
    read_random(model, cache, [20, 1])
    cache.save(tmp_path / "stream")
    with torch.inference_mode():
        resumed = SinkCache.load(tmp_path / "stream", model.config)
    for mine, others in zip(continued(model, resumed), continued(model, cache), strict=True):
        assert torch.equal(mine, others)


def test_a_deep_copy_and_a_loaded_file_give_the_same_logits(tmp_path: Path) -> None:
    """A stream of windowed chunks is continued from a deep copy and from a file."""
    model = tiny_model("llama")
    cache = SinkCache(model.config, W, S)
    for _ in sink_prefill(model, random_ids(100), cache, 7):
        pass
    cache.save(tmp_path / "stream")
    outputs = [
        [output.logits for output in sink_prefill(model, random_ids(50, seed=1), each, 7)]
        for each in (copy.deepcopy(cache), SinkCache.load(tmp_path / "stream", model.config))
    ]
    for mine, others in zip(*outputs, strict=True):
        assert torch.equal(mine, others)
