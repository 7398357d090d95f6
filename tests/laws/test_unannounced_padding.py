"""Padding that nobody announced is inferred, refused, or not to be seen; text is never refused.

What a row must give is what the row alone gives, and a refusal leaves the cache as it was.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Qwen3MoeConfig

from attention_sinks import SinkCache, sink_generate, sink_prefill

from ..support.models import CACHE, LATER, build_config, build_model, random_ids, relative_error, tiny_model
from ..support.streams import OPTIONS, S, W, prefilled

pytestmark = pytest.mark.usefixtures("no_grad")

PAD = 96  # no row has it
# As in the settings of many models: what ends a text also pads it.
PAD_IS_EOS: dict[str, Any] = {
    "pad_token_id": PAD, "eos_token_id": PAD, "do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20,
}  # fmt: skip
REFUSED = "as only padding does"


def rows_of(*lengths: int) -> list[Tensor]:
    return [random_ids(length, seed=10 + length).clamp(1, PAD - 1) for length in lengths]


def batch_of(rows: list[Tensor], side: str = "left", pad: int = PAD) -> tuple[Tensor, Tensor]:
    """Rows with padding, and their mask."""
    longest = max(row.shape[1] for row in rows)
    sizes = [(longest - row.shape[1], 0) if side == "left" else (0, longest - row.shape[1]) for row in rows]
    ids = [torch.nn.functional.pad(row, size, value=pad) for row, size in zip(rows, sizes, strict=True)]
    mask = [torch.nn.functional.pad(torch.ones_like(row), size) for row, size in zip(rows, sizes, strict=True)]
    return torch.cat(ids), torch.cat(mask)


def llama(pad_is_zero: bool = False) -> Any:
    """A model whose pads have an embedding like other tokens, or one of zeros, as `padding_idx` makes it."""
    if not pad_is_zero:
        return tiny_model("llama", num_hidden_layers=2)
    model = build_model(build_config("llama"))
    with torch.no_grad():
        model.get_input_embeddings().weight[PAD] = 0
    return model


def new_tokens(model: Any, ids: Tensor, mask: Tensor | None, cache: SinkCache, count: int = 20) -> Tensor:
    options = {**OPTIONS, "pad_token_id": PAD, "return_dict_in_generate": False, "max_new_tokens": count}
    output: Tensor = model.generate(ids, attention_mask=mask, **{CACHE: cache}, **options)
    return output[:, ids.shape[1] :]


def generated(model: Any, ids: Tensor | None = None, **options: Any) -> Any:
    return sink_generate(model, ids, **options)


def check_unchanged(model: Any, cache: SinkCache, before: SinkCache) -> None:
    """Check that a cache goes on like its copy from before."""
    assert cache.get_seq_length() == before.get_seq_length()
    ids = random_ids(7, batch_size=max(cache.num_rows, 1), seed=3).clamp(1, PAD - 1)
    for tokens in (ids, ids[:, :1]):
        assert torch.equal(model(tokens, **{CACHE: cache}).logits, model(tokens, **{CACHE: before}).logits)


# --- what the states tell, under plain `generate`


@pytest.mark.parametrize("pad_is_zero", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lengths", [(4, 10), (8, 10, 3), (12, 40)], ids=str)
def test_pads_of_a_first_prompt_are_refused_on_both_sides(
    lengths: tuple[int, ...], side: str, pad_is_zero: bool
) -> None:
    model = llama(pad_is_zero)
    ids, mask = batch_of(rows_of(*lengths), side)
    cache = SinkCache(model.config, W, S)
    with pytest.raises(ValueError, match=REFUSED) as refusal:
        new_tokens(model, ids, mask, cache)
    assert "attention_mask=attention_mask" in str(refusal.value)
    assert ("padding_side" in str(refusal.value)) == (side == "right")
    check_unchanged(model, cache, SinkCache(model.config, W, S))


def test_pads_in_the_middle_of_a_first_prompt_are_refused() -> None:
    model, system, users = llama(), random_ids(8).clamp(1, PAD - 1), rows_of(3, 7)
    ids, mask = batch_of(users)
    ids, mask = torch.cat([system.repeat(2, 1), ids], 1), torch.nn.functional.pad(mask, (8, 0), value=1)
    with pytest.raises(ValueError, match="`key_states` are equal for the tokens 8 and 9, as only padding does"):
        new_tokens(model, ids, mask, SinkCache(model.config, W, S))


@pytest.mark.parametrize("seen", [8, 14, 40])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("first_is_padded", [False, True])
def test_pads_of_a_later_prompt_are_refused_and_change_nothing(seen: int, side: str, first_is_padded: bool) -> None:
    """Below, across and past the window. The error names the way: a copy of the cache for each row."""
    model, users = llama(), rows_of(3, 7)
    first, first_mask = batch_of(rows_of(seen - 5 * first_is_padded, seen))
    cache = SinkCache(model.config, W, S, attention_mask=first_mask)
    positions = (first_mask.cumsum(1) - 1).clamp(min=0)
    model(first, attention_mask=first_mask, position_ids=positions, **{CACHE: cache})
    ids, mask = batch_of(users, side)
    whole, whole_mask = torch.cat([first, ids], 1), torch.cat([first_mask, mask], 1)
    before = copy.deepcopy(cache)
    with pytest.raises(ValueError, match=f"{REFUSED}.*copy of the cache"):
        new_tokens(model, whole, whole_mask, cache)
    with pytest.raises(ValueError, match=r"`attention_mask` must say of the text so far .* copy of the cache"):
        generated(model, whole, attention_mask=whole_mask, cache=cache, max_new_tokens=2)
    if not first_is_padded:
        check_unchanged(model, cache, copy.deepcopy(before))
    for i, user in enumerate(users):  # the way
        alone = copy.deepcopy(before)
        alone.batch_select_indices(torch.tensor([i]))
        given = generated(model, user, cache=alone, **{**PAD_IS_EOS, "eos_token_id": None})
        assert alone.get_seq_length() == seen + given.shape[1] - 1


@pytest.mark.parametrize("seen", [0, 5, 40])
@pytest.mark.parametrize("name", ["sliding beside full", *sorted(LATER.keys() - {"deepseek_v32"})])
def test_layers_of_other_kinds_take_no_pads_either(name: str, seen: int) -> None:
    """Where a layer before the first with attention has taken them, a first prompt is dropped; a later one says so."""
    model = tiny_model(name)
    cache, before = (SinkCache(model.config, W, S) for _ in range(2))
    first = random_ids(seen, batch_size=2).clamp(1, PAD - 1)
    if seen > 0:
        for each in (cache, before):
            model(first, **{CACHE: each})
    ids, mask = batch_of(rows_of(3, 7))
    whole, whole_mask = torch.cat([first, ids], 1), torch.nn.functional.pad(mask, (seen, 0), value=1)
    with pytest.raises(ValueError, match=REFUSED) as refusal:
        new_tokens(model, whole, whole_mask, cache)
    if "Start a new stream with `reset()`" in str(refusal.value):
        assert seen > 0
        assert name != "sliding beside full"
        with pytest.raises(RuntimeError, match="interrupted"):
            model(first, **{CACHE: cache})
    else:
        check_unchanged(model, cache, before)


def test_a_refused_prompt_leaves_what_was_announced() -> None:
    model = llama()
    ids, mask = batch_of(rows_of(4, 10))
    longer = torch.cat([ids, torch.full((2, 3), PAD)], 1)  # pads on the right that the announced mask does not reach
    cache = SinkCache(model.config, W, S, attention_mask=mask)
    with pytest.raises(ValueError, match=REFUSED):
        new_tokens(model, longer, torch.nn.functional.pad(mask, (0, 3)), cache)
    expected = new_tokens(model, ids, mask, SinkCache(model.config, W, S, attention_mask=mask))
    assert torch.equal(new_tokens(model, ids, mask, cache), expected)


@pytest.mark.parametrize("repeats", [1, 2, 3])
@pytest.mark.parametrize("lengths", [(6, 10), (10, 6), (4, 8, 8, 4)], ids=str)
def test_a_mask_with_too_few_rows_is_refused(lengths: tuple[int, ...], repeats: int) -> None:
    """A row of a mask stands for several rows of a batch only if these have the same padding."""
    model = llama()
    ids, mask = batch_of(rows_of(*lengths))
    cache = SinkCache(model.config, W, S, attention_mask=mask[: len(mask) // 2])
    ids, mask = ids.repeat(repeats, 1), mask.repeat(repeats, 1)
    with pytest.raises(ValueError, match=f"must have a row for each of the {len(ids)} sequences|{REFUSED}"):
        new_tokens(model, ids, mask, cache)
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match=r"`input_ids` must have a row for each of the|`attention_mask`"):
        generated(model, ids, cache=cache, **PAD_IS_EOS)


def test_a_row_of_a_mask_stands_for_beams_answers_and_rows_of_equal_padding() -> None:
    model = llama()
    rows = rows_of(6, 10)
    ids, mask = batch_of(rows)
    for options in ({"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}):
        told = SinkCache(model.config, W, S, attention_mask=mask)
        more: Any = {**options, "pad_token_id": PAD, "max_new_tokens": 20}
        torch.manual_seed(0)
        output = model.generate(ids, attention_mask=mask, **{CACHE: told}, eos_token_id=None, **more)
        torch.manual_seed(0)
        expected = generated(model, ids, attention_mask=mask, window_length=W, eos_token_id=None, **more)
        assert torch.equal(output, expected)
    both = torch.cat([ids[:1], torch.cat([ids[:1, :4], rows[1][:, 4:]], 1)])
    told = SinkCache(model.config, W, S, attention_mask=mask[:1])
    expected = new_tokens(model, both, mask[[0, 0]], SinkCache(model.config, W, S, attention_mask=mask[[0, 0]]))
    assert torch.equal(new_tokens(model, both, mask[[0, 0]], told), expected)


# --- text is not refused


@pytest.mark.parametrize("architecture", ["llama", "mpt", "smollm3", "phi"])
def test_repeated_words_are_text(architecture: str) -> None:
    """Without position rotation they have equal states, with it the same state at different positions."""
    model = tiny_model(architecture)
    ids = torch.tensor([[7] * 12, [5, 5, 5, 8, 8, 8, 9, 9, 9, 3, 3, 3]])
    cache, dynamic = SinkCache(model.config, W, S), DynamicCache(config=model.config)
    for chunk in ids.split([6, 4, 2], dim=1):
        assert torch.equal(model(chunk, **{CACHE: cache}).logits, model(chunk, **{CACHE: dynamic}).logits)
    for _ in range(3):
        model(ids, **{CACHE: cache})
    generated(model, ids, window_length=W, max_new_tokens=2, pad_token_id=PAD)


def test_who_says_that_there_is_no_padding_is_believed() -> None:
    """Two tokens whose embedding is zero, at the start of a prompt, at its end, and at the start of the next one."""
    model = llama(pad_is_zero=True)
    text = torch.tensor([[PAD, PAD, 7, 8, 9, PAD, PAD]])
    ones = torch.ones_like(text)
    cache, dynamic = SinkCache(model.config, 64, S, attention_mask=ones), DynamicCache(config=model.config)
    for part in text.split([2, 5], dim=1):  # what was said holds for all parts
        assert torch.equal(model(part, **{CACHE: cache}).logits, model(part, **{CACHE: dynamic}).logits)
    told, expected = SinkCache(model.config, W, S, attention_mask=ones), SinkCache(model.config, W, S)
    for token in text.split(1, dim=1):
        model(token, **{CACHE: expected})
    list(sink_prefill(model, text, told))
    first = generated(model, text, attention_mask=ones, window_length=64, **PAD_IS_EOS)
    same = new_tokens(model, text, ones, SinkCache(model.config, 64, S, attention_mask=ones))
    assert torch.equal(first[:, 7:], same)
    for seen in (told, expected):
        seen.crop(-1)
    again = torch.cat([text, text], 1)
    outputs = [
        generated(model, again, attention_mask=torch.ones_like(again), cache=each, **PAD_IS_EOS)
        for each in (told, expected)
    ]
    assert torch.equal(*outputs)


def test_a_single_token_and_the_inside_of_a_chunk_are_not_checked_for_zero_states() -> None:
    model = llama(pad_is_zero=True)
    ids = torch.tensor([[7, PAD, PAD, PAD, 8], [5, 6, 7, 8, 9]])
    cache, dynamic = SinkCache(model.config, 64, S), DynamicCache(config=model.config)
    for chunk in (ids, ids[:, 1:2], ids[:, 1:2], ids):
        assert torch.equal(model(chunk, **{CACHE: cache}).logits, model(chunk, **{CACHE: dynamic}).logits)


# --- what the token ids tell, where no mask is given


def check_refused(
    model: Any,
    ids: Tensor,
    cache: SinkCache | None = None,
    match: str = "`attention_mask` must be given",
    **options: Any,
) -> None:
    before = None if cache is None else copy.deepcopy(cache)
    with pytest.raises(ValueError, match=match):
        generated(model, ids, cache=cache, **{**PAD_IS_EOS, **options})
    if cache is not None and before is not None:
        check_unchanged(model, cache, before)


@pytest.mark.parametrize(("lengths", "side"), [((4, 10), "left"), ((4, 10), "right"), ((9, 10), "left")])
def test_pads_that_may_be_text_are_refused(lengths: tuple[int, int], side: str) -> None:
    ids, mask = batch_of(rows_of(*lengths), side)
    for chunk_size in (None, 3):
        check_refused(llama(), ids, prefill_chunk_size=chunk_size)
        check_refused(llama(), ids, SinkCache(llama().config, W, S), prefill_chunk_size=chunk_size)
    if side == "left":
        generated(llama(), ids, attention_mask=mask, **PAD_IS_EOS)
    generated(llama(), ids, attention_mask=torch.ones_like(mask), **PAD_IS_EOS)


def test_pads_that_the_settings_of_the_model_do_not_name_are_refused() -> None:
    """The tokenizer pads with what ends a text, and the model names another id; or the config alone names it."""
    ids, _ = batch_of(rows_of(4, 10))
    for eos in (PAD, [0, PAD], torch.tensor([PAD])):
        check_refused(llama(), ids, pad_token_id=0, eos_token_id=eos)
    model = copy.deepcopy(llama())
    model.config.pad_token_id = PAD
    check_refused(model, ids, pad_token_id=None, eos_token_id=None, min_new_tokens=None)


def test_what_all_rows_begin_with_is_text() -> None:
    """A token that begins every text, even if it also ends one; rows of a batch, and a row alone."""
    model = llama()
    for times in (1, 2):
        text = torch.cat([torch.full((2, times), PAD), torch.cat(rows_of(5, 5))], dim=1)
        for ids in (text, text[:1]):
            output = generated(model, ids, **PAD_IS_EOS)
            assert torch.equal(output, generated(model, ids, attention_mask=torch.ones_like(ids), **PAD_IS_EOS))


def test_a_warning_names_a_single_token_that_may_be_text_or_padding() -> None:
    model, ids = llama(), torch.cat([random_ids(5, batch_size=2)]).clamp(1, PAD - 1)
    ids[0, 0] = PAD
    with pytest.warns(UserWarning, match=f"begin with the token {PAD} more often than others"):
        generated(model, ids, bos_token_id=PAD, **PAD_IS_EOS)
    check_refused(model, ids, bos_token_id=PAD - 1)
    with pytest.warns(UserWarning, match=f"end with the token {PAD} more often than others"):
        generated(model, ids.flip(1), **PAD_IS_EOS)


def prompts_after(unread: list[int], texts: list[list[int]]) -> Tensor:
    return torch.tensor([[token, *text] for token, text in zip(unread, texts, strict=True)])


@pytest.mark.parametrize("seen", [6, 12, 40])
@pytest.mark.parametrize("whole", [False, True])
def test_pads_of_later_prompts_are_refused(seen: int, whole: bool) -> None:
    """From the first new token on, or after one that `generate` has made; by what pads and ends, or only pads."""
    model = llama()
    first = random_ids(seen, batch_size=2).clamp(1, PAD - 1)
    cache = SinkCache(model.config, W, S)
    model(first, **{CACHE: cache})
    refused = [
        [[PAD, PAD, 1, 2], [1, 2, 3, 4]],
        [[1, PAD, PAD, 2], [1, 2, 3, 4]],
        [[PAD, PAD, PAD, 1], [PAD, PAD, 1, 2]],
        [[1, 2, PAD, PAD], [1, 2, 3, 4]],
    ]
    for tokens in refused:
        ids = torch.tensor(tokens)
        for eos in (PAD, None):
            prompt = torch.cat([first, ids], 1) if whole else ids
            options: dict[str, Any] = {"eos_token_id": eos, "min_new_tokens": 20 if eos else None}
            check_refused(
                model, prompt, copy.deepcopy(cache), "must not be padded after the first .* copy of", **options
            )
    check_refused(
        model, torch.tensor([[1, PAD, 2], [1, 2, 3]]), copy.deepcopy(cache), "must not be padded", eos_token_id=None,
        min_new_tokens=None,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for tokens in (
            [[PAD], [1]],  # a row that has ended, one that goes on
            [[PAD, 1, 2], [5, PAD, 1]],  # one ended its turn by itself, the other was cut off
            [[PAD, PAD, 1], [5, PAD, 1]],  # ... and the template ends it again
        ):
            ids = torch.tensor(tokens)
            prompt = torch.cat([first, ids], 1) if whole else ids
            ones = torch.ones(2, seen + ids.shape[1], dtype=torch.long)
            outputs = [
                generated(model, prompt, attention_mask=mask, cache=copy.deepcopy(cache), **PAD_IS_EOS)
                for mask in (None, ones)
            ]
            assert torch.equal(*outputs)


def test_a_refused_call_leaves_what_the_cache_was_told() -> None:
    model = llama()
    ids, mask = batch_of(rows_of(4, 10))
    told, untold = SinkCache(model.config, W, S, attention_mask=mask), SinkCache(model.config, W, S)
    other = torch.ones_like(mask)
    for cache in (told, untold):
        with pytest.raises((TypeError, ValueError)):
            generated(model, ids, attention_mask=other, cache=cache, **PAD_IS_EOS, no_such_argument=1)
    expected = generated(model, ids, attention_mask=mask, window_length=W, **PAD_IS_EOS)
    assert torch.equal(generated(model, ids, cache=told, **PAD_IS_EOS), expected)
    check_refused(model, ids, untold)


def test_a_prompt_shorter_than_the_mask_that_was_told_is_refused() -> None:
    model = llama()
    ids, mask = batch_of(rows_of(4, 10))
    for told in (mask, torch.ones_like(mask)):
        cache = SinkCache(model.config, W, S, attention_mask=told)
        with pytest.raises(ValueError, match="of 10 tokens or more, got 9"):
            generated(model, ids[:, 1:], cache=cache, **PAD_IS_EOS)
        generated(model, torch.cat([ids, ids[1:].repeat(2, 1)], 1), cache=cache, **PAD_IS_EOS)


def test_prefill_refuses_pads_of_which_the_cache_was_not_told() -> None:
    model = llama()
    ids, mask = batch_of(rows_of(14, 20))
    for unknown in (ids, ids[:, 4:], ids[:, 5:]):  # six pads, two, and one
        with pytest.raises(ValueError, match=r"`cache` must be told of padding.*begin with the token"):
            next(sink_prefill(_with_pad_is_eos(), unknown, SinkCache(model.config, W, S)))
    list(sink_prefill(_with_pad_is_eos(), ids, SinkCache(model.config, W, S, attention_mask=mask)))
    list(sink_prefill(_with_pad_is_eos(), ids, SinkCache(model.config, W, S, attention_mask=torch.ones_like(mask))))


def test_prefill_reads_texts_of_different_length_with_pads_at_their_end() -> None:
    model, rows = _with_pad_is_eos(), rows_of(14, 40)
    ids, _ = batch_of(rows, "right")
    cache = SinkCache(model.config, W, S)
    logits = torch.cat([prefilled(model, part, cache, 8) for part in ids.split(16, 1)], dim=1)
    for i, row in enumerate(rows):
        alone = prefilled(model, row, SinkCache(model.config, W, S), 8)
        assert relative_error(logits[i, : row.shape[1]], alone[0]) < 1e-4


def _with_pad_is_eos() -> Any:
    model = copy.deepcopy(llama())
    model.generation_config.update(pad_token_id=PAD, eos_token_id=PAD)
    return model


# --- below the window a padded batch is that of a `DynamicCache`


def moe_config() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=97, hidden_size=32, moe_intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("lengths", [[12], [3, 4, 5], [2, 1, 1, 6, 1, 1]], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_announced_padding_is_bitwise_that_of_a_dynamic_cache_below_the_window(
    attention: str, lengths: list[int], grad: bool
) -> None:
    """At the pads too: what they give reaches other tokens by the rounding of the experts."""
    for config in (build_config("llama"), moe_config()):
        model = build_model(config)
        model.set_attn_implementation(attention)
        ids, mask = batch_of(rows_of(5, 12, 9))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        caches = SinkCache(config, W, S, attention_mask=mask), DynamicCache(config=config)
        end = 0
        with torch.set_grad_enabled(grad):
            for length in lengths:
                start, end = end, end + length
                more = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
                mine, expected = (model(ids[:, start:end], **{CACHE: cache}, **more).logits for cache in caches)
                assert torch.equal(mine, expected)


# --- text that was seen is not read twice


@pytest.mark.parametrize("seen", [8, 16, 40])
def test_a_prompt_as_long_as_what_was_seen_says_which_it_is(seen: int) -> None:
    model, text = llama(), random_ids(2 * seen).clamp(1, PAD - 1)
    cache = SinkCache(model.config, W, S)
    model(text[:, :seen], **{CACHE: cache})
    for mask in (None, torch.ones(1, seen, dtype=torch.long)):
        check_refused(model, text[:, :seen], copy.deepcopy(cache), "may be the text so far", attention_mask=mask)
    # It is new: a mask for all of it. It is what was seen: one token is taken back.
    as_new = generated(
        model, text[:, seen:], attention_mask=torch.ones_like(text), cache=copy.deepcopy(cache), **PAD_IS_EOS
    )
    in_whole = generated(model, text, cache=copy.deepcopy(cache), **PAD_IS_EOS)
    assert torch.equal(as_new[:, seen:], in_whole[:, 2 * seen :])
    cache.crop(-1)
    generated(model, text[:, :seen], cache=cache, **PAD_IS_EOS)
    assert cache.get_seq_length() == seen + 19


def test_a_text_that_was_cut_to_the_window_is_refused() -> None:
    """As the documentation of the old cache did it: each turn gives the last `get_max_length()` tokens."""
    model, cache = llama(), SinkCache(llama().config, W, S)
    for generate in (model.generate, lambda ids, **options: generated(model, ids, **options)):
        cache.reset()
        text = random_ids(20, seed=1).clamp(1, PAD - 1)
        options: dict[str, Any] = {**PAD_IS_EOS, CACHE: cache}
        text = generate(text, attention_mask=torch.ones_like(text), **options)
        cut = text[:, -cache.get_max_length() :]
        with pytest.raises(ValueError, match=r"do not cut it|uncut"):
            generate(cut, attention_mask=torch.ones_like(cut), **options)
        assert cache.get_seq_length() == 39


@pytest.mark.parametrize("length", [3, 15, 17, 30])
def test_new_tokens_alone_are_read_as_such(length: int) -> None:
    model, text = llama(), random_ids(70).clamp(1, PAD - 1)
    cache = SinkCache(model.config, W, S)
    model(text[:, :40], **{CACHE: cache})
    new, whole = text[:, 40 : 40 + length], text[:, : 40 + length]
    outputs: list[Callable[[], Tensor]] = [
        lambda: generated(model, new, cache=copy.deepcopy(cache), **PAD_IS_EOS)[:, length:],
        lambda: generated(model, whole, cache=copy.deepcopy(cache), **PAD_IS_EOS)[:, 40 + length :],
    ]
    assert torch.equal(outputs[0](), outputs[1]())


def test_embeddings_are_those_of_the_whole_text() -> None:
    model = llama()
    ids, mask = batch_of(rows_of(18, 20))
    embeds = model.get_input_embeddings()(ids)
    first, first_mask = ids[:, :12], mask[:, :12]
    cache = SinkCache(model.config, W, S, attention_mask=first_mask)
    list(sink_prefill(model, first, cache))
    before = copy.deepcopy(cache)
    refused: list[tuple[Tensor, Tensor | None, str]] = [
        (embeds[:, 12:], None, "`inputs_embeds` must be those of the whole text, longer than the 12"),
        (embeds[:, :12], None, "`inputs_embeds` must be those of the whole text, longer than the 12"),
        (embeds, mask[:, 12:], "`attention_mask` must have the shape of the text"),
        (embeds, torch.ones_like(mask), "`attention_mask` must have the shape of the text"),
        (embeds[:1], None, "`inputs_embeds` must have a row for each of the 2 rows"),
    ]
    for given, its_mask, match in refused:
        with pytest.raises(ValueError, match=match):
            generated(model, inputs_embeds=given, attention_mask=its_mask, cache=cache, **PAD_IS_EOS)
    expected = generated(model, ids, cache=before, **PAD_IS_EOS)[:, 20:]
    for its_mask in (None, mask):
        copied = copy.deepcopy(cache)
        output = generated(model, inputs_embeds=embeds, attention_mask=its_mask, cache=copied, **PAD_IS_EOS)
        assert torch.equal(output, expected)
