"""The questions of a stream ask what they say, and a window finds the facts that it holds."""

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from attention_sinks.evaluate import logits_along
from attention_sinks.load import load_model
from attention_sinks.recall import Recall, answers, make_stream, plot_recall, recall_by_distance, write_recall

from ..support.tokenizer import WORDS, byte_tokenizer, chat_model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer(words=WORDS)


def test_questions_ask_once_for_lines_at_their_distance(tokenizer: Any) -> None:
    ids, questions = make_stream(tokenizer, 90, [5, 20, 30], seed=1)
    found: list[tuple[int, str, str]] = []
    facts: list[str] = []
    pattern = r"(Question: which word ends line (\d+)\?\n)?(Line (\d+): (?:[a-z]+, ){2}[a-z]+ and ([a-z]+)\.)\n"
    text = tokenizer.decode(ids[0])
    assert re.fullmatch(f"Remember these lines\\.\n(?:{pattern})*", text)
    for is_question, asked, line, number, answer in re.findall(pattern, text):
        if is_question:
            assert asked == number
            assert line in facts
            found.append((len(facts) - facts.index(line), number, answer))
        else:
            facts.append(line)
    assert len(facts) == 90
    scored = [(question.distance, tokenizer.decode(question.answer).strip()) for question in questions]
    assert [(distance, answer) for distance, number, answer in found if number != "100"] == scored
    numbers = [number for _, number, _ in found if number != "100"]
    assert len(set(numbers)) == len(numbers)
    assert {distance for distance, _ in scored} == {5, 20, 30}
    assert len({(question.distance, question.token_distance) for question in questions}) == 3
    for question in questions:
        assert ids[0, question.position + 1] == question.answer == ids[0, question.position - question.token_distance]
        assert question.answer in question.choices
        assert len(set(question.choices)) == 10
    again, _ = make_stream(tokenizer, 90, [5, 20, 30], seed=2)
    assert not torch.equal(ids, again)


@pytest.mark.usefixtures("no_grad")
def test_a_fact_is_seen_exactly_while_it_is_in_the_window(tokenizer: Any) -> None:
    # With one layer, nothing of a token outlives its key and value.
    model = chat_model(num_hidden_layers=1, vocab_size=len(tokenizer))
    ids, questions = make_stream(tokenizer, 40, [10])
    question = questions[-1]
    changed = ids.clone()
    changed[0, question.position - question.token_distance] = 5

    def logits(ids: Tensor, window_length: int) -> Tensor:
        return torch.cat([*logits_along(model, ids, window_length, 4)], dim=1)[0, question.position]

    for num_unseen, is_seen in ((0, False), (1, True)):
        window_length = question.token_distance + 4 + num_unseen
        assert torch.equal(logits(ids, window_length), logits(changed, window_length)) != is_seen


def test_the_answer_is_the_choice_with_the_largest_logit(tokenizer: Any, tmp_path: Path) -> None:
    ids, questions = make_stream(tokenizer, 60, [5, 20])
    next_token = one_hot(ids.roll(-1), len(tokenizer)).float()
    for logits, is_correct in ((next_token, True), (-next_token, False)):
        answered = list(answers(logits.split(7, dim=1), questions))
        assert answered == [(question, is_correct) for question in questions]
    half = [(question, i % 2 == 0) for i, question in enumerate(questions)]
    rows = recall_by_distance(half)
    assert [row.distance for row in rows] == [5, 20]
    assert sum(row.num_questions for row in rows) == len(questions)
    assert sum(row.num_correct for row in rows) == (len(questions) + 1) // 2
    write_recall({"dense": rows}, tmp_path / "r.csv")
    with (tmp_path / "r.csv").open(newline="") as file:
        read = [Recall(*map(int, list(row.values())[1:])) for row in csv.DictReader(file)]
    assert read == rows
    plot_recall({"dense": rows}, tmp_path / "r.png", "title", 100)
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_streams_that_cannot_be_made_are_refused(tokenizer: Any) -> None:
    for num_lines, distances, message in (
        (901, [10], "`num_lines` must be at most 900, got 901"),
        (50, [10, 50], "`distances` must be from 1 to 49"),
        (50, [0], "`distances` must be from 1 to 49"),
        (9, [3], "must leave room for a question"),
        (50, [], "must leave room for a question"),
    ):
        with pytest.raises(ValueError, match=message):
            make_stream(tokenizer, num_lines, distances)
    with pytest.raises(ValueError, match="at least 800 words of one token, got 0"):
        make_stream(byte_tokenizer(), 50, [10])


@pytest.mark.slow
def test_a_real_model_recalls_what_is_in_the_window_and_nothing_else() -> None:
    model, tokenizer = load_model()
    ids, questions = make_stream(tokenizer, 51, [8, 12])
    assert {question.token_distance > 252 for question in questions if question.distance == 12} == {True}
    accuracy = {}
    for name, number in (("dense", None), ("sinks", 4)):
        rows = recall_by_distance(answers(logits_along(model, ids, 256, number), questions))
        accuracy[name] = [row.accuracy for row in rows]
    near, far = accuracy["sinks"]
    print(f"recall at 8 and 12 lines: dense {accuracy['dense']}, 4 sinks {accuracy['sinks']}")
    assert min(accuracy["dense"]) > 0.9
    assert near > 0.8
    assert far < 0.3
