"""Images and videos at positions of several axes: each step is the model without a cache on the kept tokens."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from attention_sinks import Rotation, SinkCache, sink_prefill
from attention_sinks import sink_generate as generate

from ..support.grids import (
    GRID_MODELS,
    STARTS_AT_TEXT,
    Recorder,
    coordinates,
    grid_model,
    logits_of_window,
    padded,
    picture,
    prompt,
)
from ..support.inside import announced
from ..support.models import CACHE, build_config
from ..support.versions import RECORDS_PAST

W, S = 16, 4
sink_generate: Any = generate  # typed loosely, as `model.generate`
SETTINGS: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
PROMPTS: dict[str, tuple[Any, ...]] = {
    "text": (20,),
    "an image in the middle": (6, picture(3, 4), 5),
    "an image that is evicted at once": (6, picture(2, 2), 30),
    "an image among the sinks": (1, picture(2, 3), 9),
    "an image larger than the window": (5, picture(5, 5), 3),
    "several images": (5, picture(2, 2), 3, picture(1, 3), picture(2, 1), 4),
    "a video": (5, picture(2, 2, frames=3), 4),
    "a video and an image": (3, picture(1, 2, frames=2), 2, picture(2, 2), 2),
}
TOLERANCE = 1e-5


def answer(model: Any, cache: SinkCache, inputs: dict[str, Any], length: int = 24, **options: Any) -> Any:
    return sink_generate(model, **inputs, **{CACHE: cache}, max_new_tokens=length, **SETTINGS, **options)


def logits_of(output: Any) -> Tensor:
    logits: Tensor = output.logits
    return logits


def check_answer(
    model: Any, output: Any, embeddings: Tensor, positions: Tensor, num_read: int, window_length: int = W
) -> None:
    """Check the logits of an answer; the first of them may come from a prompt that was read at once."""
    for i, logits in enumerate(output.logits[1:], num_read + 1):
        truth = logits_of_window(model, embeddings[:, :i], positions[:, :, :i], window_length, S)
        assert (logits[0] - truth).abs().max() <= TOLERANCE * truth.abs().max()


@pytest.mark.parametrize("parts", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("name", GRID_MODELS)
def test_each_step_is_the_model_without_a_cache_on_the_kept_tokens(name: str, parts: tuple[Any, ...]) -> None:
    model, inputs = grid_model(name), prompt(*parts, split=name.startswith("qwen3"))
    with Recorder(model) as recorder:
        output = answer(model, SinkCache(model.config.text_config, W, S), inputs)
    positions = coordinates(model, output.sequences, inputs)
    check_answer(model, output, torch.cat(recorder.embeddings, dim=1), positions, inputs["input_ids"].shape[1])


@pytest.mark.parametrize("parts", [(6, picture(3, 4), 5), (4, picture(2, 2, frames=3), 5)], ids=["image", "video"])
@pytest.mark.parametrize("name", GRID_MODELS)
def test_below_the_window_images_are_bitwise_a_dynamic_cache(name: str, parts: tuple[Any, ...]) -> None:
    model, inputs = grid_model(name), prompt(*parts, split=name.startswith("qwen3"))
    plain = model.generate(**inputs, **{CACHE: DynamicCache(config=model.config)}, max_new_tokens=20, **SETTINGS)
    ours = sink_generate(model, **inputs, window_length=64, max_new_tokens=20, **SETTINGS)
    assert torch.equal(torch.stack(plain.logits), torch.stack(ours.logits))


@pytest.mark.parametrize("whole", [False, True], ids=["only what is new", "the whole text"])
@pytest.mark.parametrize("name", STARTS_AT_TEXT)
def test_a_later_turn_may_bring_images(name: str, whole: bool) -> None:
    model, cache = grid_model(name), SinkCache(grid_model(name).config.text_config, W, S)
    first, second = prompt(5, picture(2, 2), 4), prompt(3, picture(2, 3), 6, seed=1)
    with Recorder(model) as recorder:
        output = answer(model, cache, first, 10)
        # The model keeps `rope_deltas` of its last call: another stream comes in between.
        with torch.no_grad():
            model.generate(**prompt(2, picture(4, 4), 2), max_new_tokens=2)
            del recorder.embeddings[-2:]
        ids = torch.cat([output.sequences, second["input_ids"]], dim=1)
        # The last token of the answer has not been read.
        last = output.sequences[:, -1:]
        given = {**second, "input_ids": ids if whole else torch.cat([last, second["input_ids"]], dim=1)}
        extra = given["input_ids"].shape[1] - second["input_ids"].shape[1]
        given["mm_token_type_ids"] = torch.nn.functional.pad(second["mm_token_type_ids"], (extra, 0))
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        output = answer(model, cache, given)
    ids = ids if whole else torch.cat([ids, output.sequences[:, given["input_ids"].shape[1] :]], dim=1)
    ids = output.sequences if whole else ids
    positions = coordinates(model, ids, first, second)
    embeddings = torch.cat(recorder.embeddings, dim=1)
    check_answer(model, output, embeddings, positions, embeddings.shape[1] - len(output.logits) + 1)


@pytest.mark.parametrize("name", GRID_MODELS)
def test_a_padded_row_is_the_row_alone(name: str) -> None:
    model = grid_model(name)
    rows = [prompt(6, picture(3, 4), 5), prompt(2, picture(1, 3), 4, seed=1)]
    longest = max(row["input_ids"].shape[1] for row in rows)
    sides = [padded(row, longest - row["input_ids"].shape[1]) for row in rows]
    batch = {key: torch.cat([row[key] for row in sides]) for key in rows[0]}
    model.generation_config.pad_token_id = 0
    together = sink_generate(model, **batch, window_length=W, num_sink_tokens=S, max_new_tokens=24, **SETTINGS)
    for i, row in enumerate(rows):
        alone = sink_generate(model, **row, window_length=W, num_sink_tokens=S, max_new_tokens=24, **SETTINGS)
        for a, b in zip(together.logits, alone.logits, strict=True):
            assert (a[i] - b[0]).abs().max() <= TOLERANCE * b.abs().max()


def test_beams_and_several_answers_repeat_the_positions() -> None:
    model, inputs = grid_model("qwen2_vl"), prompt(6, picture(2, 3), 5)
    beams = sink_generate(model, **inputs, window_length=W, num_sink_tokens=S, max_new_tokens=12, num_beams=3)
    sequence = beams[:1]
    with Recorder(model) as recorder, torch.no_grad():
        model.generate(**inputs, max_new_tokens=1)
    n = inputs["input_ids"].shape[1]
    tail = model.get_input_embeddings()(sequence[:, n:])
    embeddings = torch.cat([recorder.embeddings[0], tail], dim=1)
    positions = coordinates(model, sequence, inputs)
    wide = sink_generate(
        model,
        **inputs,
        window_length=W,
        num_sink_tokens=S,
        max_new_tokens=12,
        num_beams=3,
        **SETTINGS,
        output_scores=True,
    )
    scores = [
        logits_of_window(model, embeddings[:, :i], positions[:, :, :i], W, S).log_softmax(-1)[sequence[0, i]]
        for i in range(n + 1, n + 12)
    ]
    first = wide.logits[0][0].log_softmax(-1)[sequence[0, n]]
    assert torch.allclose((sum(scores) + first) / 12, wide.sequences_scores[0], atol=1e-4)


@pytest.mark.parametrize("name", GRID_MODELS)
def test_text_after_images_may_be_read_in_chunks(name: str) -> None:
    model, inputs, more = grid_model(name), prompt(5, picture(2, 3), 4), prompt(21, seed=3)["input_ids"]
    caches = [SinkCache(model.config.text_config, W, S) for _ in range(2)]
    for cache in caches:
        answer(model, cache, inputs, 3)
    one_by_one = torch.cat([logits_of(each) for each in sink_prefill(model, more, caches[0], 1)], dim=1)
    in_chunks = torch.cat([logits_of(each) for each in sink_prefill(model, more, caches[1], 7)], dim=1)
    assert (one_by_one - in_chunks).abs().max() <= TOLERANCE * one_by_one.abs().max()


@pytest.mark.parametrize("taken_back", [0, 3, W - S], ids=["full", "with a gap", "sinks alone"])
@pytest.mark.parametrize("change", ["rebase", "compact", "save", "deepcopy", "rows"])
def test_what_changes_a_stream_between_passes_keeps_its_positions(change: str, taken_back: int, tmp_path: Any) -> None:
    model, inputs, more = grid_model("qwen2_vl"), prompt(5, picture(2, 3), 4), prompt(15, seed=3)["input_ids"]
    caches = [SinkCache(model.config.text_config, W, S) for _ in range(2)]
    for cache in caches:
        answer(model, cache, inputs, 6)
        cache.crop(-taken_back)
    other = caches[1]
    if change == "save":
        other.save(tmp_path / "stream")
        other = SinkCache.load(tmp_path / "stream", model.config)
    elif change == "deepcopy":
        other = copy.deepcopy(other)
    elif change == "rows":
        other.batch_repeat_interleave(2)
        other.batch_select_indices(torch.tensor([1]))
    else:
        getattr(other, change)()
    plain, changed = (
        torch.cat([logits_of(each) for n in (1, 3) for each in sink_prefill(model, more, cache, n)], dim=1)
        for cache in (caches[0], other)
    )
    assert (plain - changed).abs().max() <= TOLERANCE * plain.abs().max()
    assert (change in ("rebase", "compact")) != torch.equal(plain, changed)


def stream_with_an_image(*parts: Any) -> tuple[Any, SinkCache]:
    model = grid_model("qwen2_vl")
    cache = SinkCache(model.config.text_config, W, S)
    answer(model, cache, prompt(*parts), 2)
    return model, cache


@pytest.mark.parametrize("length", range(S + 1))
def test_a_compacted_stream_may_be_cropped_to_its_sinks(length: int) -> None:
    model, cache = stream_with_an_image(5, picture(2, 3), 6)
    cache.compact()
    cache.crop(length - W)
    first, more = prompt(5)["input_ids"][:, :length], prompt(9, seed=3)["input_ids"]
    new = SinkCache(model.config.text_config, W, S)
    for _ in sink_prefill(model, first, new):
        pass
    (cropped,), (short,) = (sink_prefill(model, more, each, 9) for each in (cache, new))
    assert (logits_of(cropped) - logits_of(short)).abs().max() <= TOLERANCE * logits_of(short).abs().max()


def test_images_may_follow_text_that_was_rebased_soon_after_the_window() -> None:
    model, text, inputs = grid_model("qwen2_vl"), prompt(W + 1)["input_ids"], prompt(3, picture(2, 3), 5, seed=1)
    inputs["attention_mask"] = torch.ones(1, W + 1 + inputs["input_ids"].shape[1], dtype=torch.long)
    caches = [SinkCache(model.config.text_config, W, S) for _ in range(2)]
    for cache in caches:
        for _ in sink_prefill(model, text, cache):
            pass
    caches[1].rebase()
    plain, rebased = (torch.stack(answer(model, cache, inputs).logits) for cache in caches)
    assert (plain - rebased).abs().max() <= TOLERANCE * plain.abs().max()


def test_rebased_sinks_alone_are_followed_at_once() -> None:
    _, cache = stream_with_an_image(5, picture(2, 3), 8)
    cache.crop(S - W)
    cache.rebase()
    assert cache.text_positions(torch.empty(1, 2)).tolist() == [[S, S + 1]]


def test_a_stream_that_was_taken_back_may_be_rebased() -> None:
    _, cache = stream_with_an_image(2, picture(2, 3), 2)
    left = cache.positions_left()
    cache.crop(-1)
    assert cache.positions_left() == left + 1
    cache.crop(-cache.get_seq_length())
    for _ in range(2):
        cache.rebase()
    assert cache.text_positions(torch.empty(1, 2)).tolist() == [[0, 1]]


@pytest.mark.skipif(not RECORDS_PAST, reason="early transformers 5 does not record the past")
def test_all_that_a_window_without_sinks_holds_may_be_taken_back() -> None:
    model = grid_model("qwen2_vl")
    cache = SinkCache(model.config.text_config, W, 0)
    answer(model, cache, prompt(5, picture(2, 3), W), 2)
    before = cache.text_positions(torch.empty(1, 1))
    cache.activate_past_recording()  # type: ignore[no-untyped-call]
    with announced(cache, 3), torch.no_grad():
        positions = cache.text_positions(torch.empty(1, 3)).expand(3, -1, -1)
        model(prompt(3)["input_ids"], **{CACHE: cache}, position_ids=positions)
    cache.crop(-3 - W)
    assert torch.equal(cache.text_positions(torch.empty(1, 1)), before - W)


def test_text_begins_behind_the_pads_that_a_crop_leaves_to_come() -> None:
    model, row = grid_model("qwen2_vl"), padded(prompt(2, picture(2, 3), 2), 6)
    cache = SinkCache(model.config.text_config, 32, S)
    answer(model, cache, row, 2)
    cache.crop(4 - cache.get_seq_length())
    assert cache.text_positions(torch.empty(1, 5)).tolist() == [[0, 0, 0, 1, 2]]


def test_text_goes_on_where_it_did_after_a_long_video() -> None:
    cache = SinkCache(grid_model("qwen2_vl").config.text_config, 32, S)
    answer(grid_model("qwen2_vl"), cache, prompt(4, picture(1, 1, frames=8), 6), 2)
    cache.crop(13 - cache.get_seq_length())  # four words, the start of the video and its frames are left
    assert cache.text_positions(torch.empty(1, 2)).tolist() == [[6, 7]]


@pytest.mark.parametrize("image", [True, False], ids=["images", "text"])
def test_beams_of_padded_rows_are_those_of_the_row_alone(image: bool) -> None:
    model, inner = grid_model("qwen2_vl"), [picture(2, 3)] * image
    rows = [prompt(3, *inner, 2), prompt(6, *inner, 2, seed=1)]
    batch = {key: torch.cat([padded(rows[0], 3)[key], rows[1][key]]) for key in rows[0]}
    beams: dict[str, Any] = {"window_length": W, "num_sink_tokens": S, "max_new_tokens": 12, "num_beams": 3}
    together = sink_generate(model, **batch, **beams)
    for each, row in zip(together, rows, strict=True):
        assert torch.equal(each[-12:], sink_generate(model, **row, **beams)[0, -12:])


@pytest.mark.skipif(not RECORDS_PAST, reason="prompt lookup of early transformers 5 needs an end-of-sequence token")
def test_candidates_of_prompt_lookup_are_taken_back() -> None:
    model, inputs = grid_model("qwen2_vl"), prompt(6, picture(2, 3), 5)
    window: dict[str, Any] = {"window_length": 34, "num_sink_tokens": S, "max_new_tokens": 16, "do_sample": False}
    plain = sink_generate(model, **inputs, **window)
    looked_up = sink_generate(model, **inputs, **window, prompt_lookup_num_tokens=3)
    assert torch.equal(plain, looked_up)


@pytest.mark.skipif(not RECORDS_PAST, reason="early transformers 5 finds images by their tokens")
def test_images_among_tokens_of_no_type_are_refused() -> None:
    model, inputs = grid_model("qwen2_vl"), prompt(6, picture(2, 3), 5)
    cache = SinkCache(model.config.text_config, W, S)
    with pytest.raises(ValueError, match="`mm_token_type_ids` must be given with `image_grid_thw`"):
        answer(model, cache, {**inputs, "mm_token_type_ids": None}, 3)
    assert cache.get_seq_length() == 0


def test_plain_generate_does_not_continue_a_stream_with_images() -> None:
    model, inputs = grid_model("qwen2_vl"), prompt(6, picture(2, 3), 5)
    cache = SinkCache(model.config.text_config, W, S)
    output = answer(model, cache, inputs, 3)
    seen = cache.get_seq_length()
    with pytest.raises(ValueError, match="sink_generate"):
        model.generate(output.sequences, **{CACHE: cache}, max_new_tokens=3)
    assert cache.get_seq_length() == seen


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("name", GRID_MODELS)
def test_a_cache_for_plain_generate_warns_of_images(name: str, by_hand: bool) -> None:
    """The model is told by what it does: `mrope_section` may be left to its default."""
    config = copy.deepcopy(grid_model(name).config)
    rotation = Rotation(torch.ones(8)) if by_hand else None
    with pytest.warns(UserWarning, match="call `sink_generate`"):
        SinkCache(config, W, S, rotation)
    SinkCache(config.text_config, W, S, rotation)
    SinkCache(build_config("llama"), W, S)
