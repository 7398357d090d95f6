"""The plan of a pass is a pure function of the layout, the tokens seen and the number of new ones."""

import itertools

import pytest
import torch

from ..support.inside import StaticPlan, UpdatePlan, WindowedPlan, layout_of, token_positions

DEVICE = torch.device("cpu")


def plan(window_length: int, num_sinks: int, start: int, query_length: int, **options: object) -> UpdatePlan:
    layout = layout_of(window_length, num_sinks, token_positions(None))
    return UpdatePlan(layout, start, query_length, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("window_length", range(1, 7))
def test_a_pass_announces_the_sinks_the_window_of_its_first_query_and_itself(window_length: int) -> None:
    for num_sinks, start, length in itertools.product(range(window_length), range(20), range(1, 9)):
        made = plan(window_length, num_sinks, start, length)
        kept = min(start, window_length - 1)
        assert made.kv_length == kept + length
        assert made.kv_offset == start + length - made.kv_length == made.evicted
        assert made.overwrites == (length == 1 and start >= window_length - 1)
        assert made.rotates_sinks == (start + 1 > window_length)
        assert made.stores_sinks == (start < num_sinks)
        assert made.is_below_window == (start + length <= window_length)


def test_tokens_that_a_crop_lost_do_not_come_back() -> None:
    made = plan(8, 2, 10, 1, num_evicted=6)  # 14 tokens were seen, the last four are taken back
    assert (made.evicted, made.kv_length) == (6, 5)
    assert not made.overwrites


def test_a_static_step_announces_all_slots() -> None:
    for start in range(20):
        made = plan(8, 2, start, 1, all_slots=True)
        assert made.kv_length == 8
        assert made.overwrites
    static = StaticPlan(layout_of(8, 2, token_positions(None)), is_sliding=False)
    assert (static.kv_length, static.kv_offset, static.needs_count) == (8, 0, False)


def test_a_plan_fits_its_own_pass_alone() -> None:
    made = plan(8, 2, 5, 3)
    assert made.fits(5, 3)
    assert not made.fits(8, 3)
    assert not made.fits(5, 1)


def test_what_layers_have_in_common_is_computed_once() -> None:
    made, numbers = plan(8, 2, 9, 1), itertools.count()
    for _ in range(3):
        assert made.once("key", next, numbers) == 0
    assert made.slot_mapping(DEVICE) is made.slot_mapping(DEVICE)
    assert made.step_slots(DEVICE) is made.step_slots(DEVICE)


@pytest.mark.parametrize("window_length", range(1, 7))
def test_each_query_of_a_windowed_chunk_sees_exactly_its_window(window_length: int) -> None:
    for num_sinks, start, length in itertools.product(range(window_length), range(12), range(1, 6)):
        layout = layout_of(window_length, num_sinks, token_positions(None))
        made = WindowedPlan(layout, start, length)
        visible, columns = made.visible(DEVICE), torch.arange(made.kv_length)
        tokens = [*range(num_sinks)] * length + [*range(start - made.num_recent, start + length)]
        for query in range(length):
            seen = visible(0, 0, torch.tensor(query), columns)
            shown = sorted(token for token, is_shown in zip(tokens, seen.tolist(), strict=True) if is_shown)
            now = start + query
            recent = range(max(now + 1 - (window_length - num_sinks), num_sinks), now + 1)
            assert shown == sorted({*range(min(num_sinks, now + 1)), *recent})
