"""The layout of slots, exhaustively for small windows, against plain lists of what each row holds."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ..support.inside import Layout, compute, layout_of, num_recent_in_window, token_positions, write_slots

NUM_TOKENS = 40
WINDOWS = [(w, s) for w in range(1, 9) for s in range(w)]


class Row:
    """The slots of a row: None is empty. It knows the rule, and no arithmetic of slots."""

    def __init__(self, window_length: int, num_sink_tokens: int, padding: int) -> None:
        self.window_length, self.num_sink_tokens, self.padding = window_length, num_sink_tokens, padding
        self.slots: list[int | None] = [None] * window_length
        self.seen = 0

    @property
    def num_tokens(self) -> int:
        return max(self.seen - self.padding, 0)

    def feed(self) -> None:
        """A column below the window takes its own slot; later a token the last empty slot, or that of the oldest."""
        token = self.seen - self.padding
        self.seen += 1
        if token < 0:
            return
        if self.seen <= self.window_length:
            slot = self.seen - 1
        elif None in self.slots:
            slot = max(i for i, held in enumerate(self.slots) if held is None)
        else:
            recent = [held for held in self.slots if held is not None and held >= self.num_sink_tokens]
            slot = self.slots.index(min(recent))
        self.slots[slot] = token

    def kept(self) -> list[int]:
        return sorted(token for token in self.slots if token is not None)


def buffers_of(rows: list[Row]) -> Tensor:
    """What the rows hold, `[rows, 1, W, 1]`; -1 is an empty slot."""
    held = [[-1 if token is None else token for token in row.slots] for row in rows]
    return torch.tensor(held)[:, None, :, None]


def paddings_of(window_length: int) -> list[list[int]]:
    return [[0], [*range(window_length + 4)]]


def tokens_of(rows: list[Row], length: int) -> Tensor:
    """The next `length` columns as states, `[rows, 1, length, 1]`; negative for pads."""
    columns = torch.arange(rows[0].seen, rows[0].seen + length)
    return (columns - torch.tensor([[row.padding] for row in rows]))[:, None, :, None]


def streams() -> Iterator[tuple[int, int, list[int]]]:
    for window_length, num_sink_tokens in WINDOWS:
        for paddings in paddings_of(window_length):
            yield window_length, num_sink_tokens, paddings


def made(window_length: int, num_sink_tokens: int, paddings: list[int]) -> tuple[Layout, list[Row]]:
    padding = torch.tensor(paddings) if any(paddings) else None
    layout = layout_of(window_length, num_sink_tokens, token_positions(padding))
    return layout, [Row(window_length, num_sink_tokens, each) for each in paddings]


def shown(slots: Tensor) -> Tensor:
    """Slots in which pads, whose contents nobody may see, are empty."""
    return slots.clamp(min=-1)


@pytest.mark.parametrize(("window_length", "num_sink_tokens"), WINDOWS)
def test_single_tokens_go_where_the_rule_puts_them(window_length: int, num_sink_tokens: int) -> None:
    for paddings in paddings_of(window_length):
        layout, rows = made(window_length, num_sink_tokens, paddings)
        written, by_step = (torch.full((len(rows), 1, window_length, 1), -1) for _ in range(2))
        for seen in range(NUM_TOKENS):
            tokens = tokens_of(rows, 1)
            layout.write(written, tokens, seen, compute)
            write_slots(by_step, layout.token_slot(seen, torch.device("cpu")), tokens)
            in_tensors = layout.next_slots(torch.tensor([seen]))
            assert torch.equal(in_tensors, layout.token_slot(seen, torch.device("cpu")))
            for row in rows:
                row.feed()
            assert torch.equal(shown(written), buffers_of(rows))
            assert torch.equal(shown(by_step), buffers_of(rows))


@pytest.mark.parametrize(("window_length", "num_sink_tokens"), WINDOWS)
def test_kept_and_recent_tokens_are_read_in_order(window_length: int, num_sink_tokens: int) -> None:
    for paddings in paddings_of(window_length):
        layout, rows = made(window_length, num_sink_tokens, paddings)
        slots = torch.full((len(rows), 1, window_length, 1), -1)
        for seen in range(NUM_TOKENS):
            for evicted in {max(seen - window_length, 0), max(seen + 1 - window_length, 0)}:
                parts = layout.kept_in_order(slots, seen, evicted, None, compute)
                kept = torch.cat(parts, dim=2)[:, 0, :, 0]
                assert kept.shape[1] == seen - evicted
                for row, found in zip(rows, kept.tolist(), strict=True):
                    sinks = [token for token in row.kept() if token < num_sink_tokens]
                    recent = [token for token in row.kept() if token >= num_sink_tokens]
                    length = min(seen - evicted, row.num_tokens)
                    expected = [*sinks, *recent[len(recent) - max(length - len(sinks), 0) :]] if length else []
                    assert found[len(found) - length :] == expected
            length = num_recent_in_window(layout, seen)
            parts = layout.recent_in_order(slots, seen, length, compute)
            for row, found in zip(rows, torch.cat(parts, dim=2)[:, 0, :, 0].tolist(), strict=True):
                real = min(length, row.num_tokens)
                assert found[length - real :] == [*range(row.num_tokens - real, row.num_tokens)]
            layout.write(slots, tokens_of(rows, 1), seen, compute)
            for row in rows:
                row.feed()


@pytest.mark.parametrize(("window_length", "num_sink_tokens"), WINDOWS)
def test_a_chunk_is_written_as_its_tokens_one_by_one(window_length: int, num_sink_tokens: int) -> None:
    for paddings in paddings_of(window_length):
        for length in range(1, window_length + 4):
            layout, rows = made(window_length, num_sink_tokens, paddings)
            slots = torch.full((len(rows), 1, window_length, 1), -1)
            sinks = torch.full((len(rows), 1, num_sink_tokens, 1), -1)
            for seen in range(0, NUM_TOKENS, length):
                tokens = tokens_of(rows, length)
                layout.write(slots, tokens, seen, compute)
                layout.write_sinks(sinks, tokens, seen, compute)
                for _ in range(length):
                    for row in rows:
                        row.feed()
                assert torch.equal(shown(slots), buffers_of(rows))
                for row, stored in zip(rows, sinks[:, 0, :, 0].tolist(), strict=True):
                    born = min(row.num_tokens, num_sink_tokens)
                    assert stored[:born] == [*range(born)]


@pytest.mark.parametrize(("window_length", "num_sink_tokens"), WINDOWS)
def test_sinks_are_where_a_step_writes_them(window_length: int, num_sink_tokens: int) -> None:
    device = torch.device("cpu")
    for paddings in paddings_of(window_length):
        layout, rows = made(window_length, num_sink_tokens, paddings)
        for seen in range(NUM_TOKENS):
            slots = layout.sink_and_token_slots(seen, device).expand(len(rows), -1)
            token_slots = layout.token_slot(seen, device).expand(len(rows), -1)
            assert torch.equal(slots[:, -1:], token_slots)
            for row, found in zip(rows, slots.tolist(), strict=True):
                for token in range(min(row.num_tokens, num_sink_tokens)):
                    assert row.slots[found[token]] == token
            for row in rows:
                row.feed()


def test_the_rows_of_a_mask_know_their_padding() -> None:
    positions = token_positions(torch.tensor([0, 2, 5]), offset=3)
    like = torch.empty(3, 4, dtype=torch.long)
    assert positions.mask(1, like).tolist() == [[1] * 4, [0, 1, 1, 1], [0] * 4]
    assert positions.true_positions(4, like).tolist() == [[4, 5, 6, 7], [2, 3, 4, 5], [0, 0, 1, 2]]
    lowered = positions.position_ids(positions.true_positions(4, like))
    assert lowered.tolist() == [[1, 2, 3, 4], [1, 2, 3, 4], [0, 0, 1, 2]]
    shifts = positions.shift(6, positions.offset, torch.device("cpu"))
    assert shifts.flatten().tolist() == [6 - 3, 4 - 1, 1 - 0]
