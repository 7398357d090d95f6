"""Recall along a stream: how far back a model finds a fact, as in StreamEval (arXiv 2309.17453, section 4.4).

A stream consists of numbered lines of four words. After every third line a question repeats the number and the first
three words of an earlier line; the answer is its fourth word. The model chooses between the answers of ten lines. All
lines have the same number of tokens, and all questions, so that a distance in lines is a distance in tokens.
"""

import csv
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

LINES_PER_QUESTION = 3
NUM_CHOICES = 10
# Line numbers have three digits, so that all of them have the same number of tokens.
FIRST_NUMBER, MAX_LINES = 100, 900
# Size of the vocabulary. Each word occurs once in 200 lines.
NUM_WORDS = 800


class Question(NamedTuple):
    """A question of a stream."""

    distance: int  # from the question back to the line it asks for, in lines
    token_distance: int  # from the token that predicts the answer back to the answer in that line
    position: int  # position of the token that predicts the answer
    answer: int  # token id
    choices: list[int]  # token ids, the answer among them


class Recall(NamedTuple):
    """How many of the questions about one distance were answered correctly."""

    distance: int  # in lines
    token_distance: int
    num_questions: int
    num_correct: int

    @property
    def accuracy(self) -> float:
        return self.num_correct / self.num_questions


def make_stream(
    tokenizer: Any, num_lines: int, distances: Sequence[int], seed: int = 0
) -> tuple[Tensor, list[Question]]:
    """Return the token ids `[1, length]` of a stream, and its questions.

    Args:
        tokenizer: tokenizer with at least 800 words of one token.
        num_lines: number of lines, without the questions.
        distances: distances of the questions, in lines. No line is asked for twice.
        seed: seed of the random words.

    Raises:
        ValueError: naming the argument and its value.
    """
    if num_lines > MAX_LINES:
        raise ValueError(f"`num_lines` must be at most {MAX_LINES}, got {num_lines}.")
    for distance in distances:
        if not 1 <= distance < num_lines:
            raise ValueError(f"`distances` must be from 1 to {num_lines - 1} (below `num_lines`), got {distance}.")
    generator = random.Random(seed)
    vocabulary = _one_token_words(tokenizer)
    deck: list[int] = []

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    comma, last, end = map(encode, (",", " and", ".\n"))
    input_ids = encode("Remember these lines.\n")
    lines: list[list[int]] = []  # token ids of each line, up to the answer
    positions: list[int] = []  # position of the answer in each line
    unasked: set[int] = set()
    questions: list[Question] = []
    for number in range(num_lines):
        if len(deck) < 4:
            deck = generator.sample(vocabulary, len(vocabulary))
        first, second, third, answer = (deck.pop() for _ in range(4))
        name = encode(f"Line {FIRST_NUMBER + number}:")
        lines.append([*name, first, *comma, second, *comma, third, *last, answer])
        input_ids += lines[number]
        positions.append(len(input_ids) - 1)
        input_ids += end
        if number > 0:
            unasked.add(number)
        if (number + 1) % LINES_PER_QUESTION > 0:
            continue
        possible = [distance for distance in distances if number + 1 - distance in unasked]
        if number + 1 < NUM_CHOICES:
            possible = []
        counts = Counter(question.distance for question in questions)
        # Where no distance is possible, a question about the first line keeps the distances in tokens equal.
        distance = min(possible, key=lambda distance: counts[distance], default=number + 1)
        asked = number + 1 - distance
        input_ids += encode(f"Question: which word ends line {FIRST_NUMBER + asked}?\n") + lines[asked]
        position = len(input_ids) - 2
        input_ids += end
        if possible:
            unasked.remove(asked)
            choices = _nearest_answers(lines, asked)
            questions.append(Question(distance, position - positions[asked], position, lines[asked][-1], choices))
    if not questions:
        raise ValueError(f"`num_lines` and `distances` must leave room for a question, got {num_lines}, {distances}.")
    return torch.tensor([input_ids]), questions


def _nearest_answers(lines: list[list[int]], asked: int) -> list[int]:
    """Return the answers of the lines that are nearest to a line, its own included, ordered by token id."""
    nearest = sorted(range(len(lines)), key=lambda number: abs(number - asked))
    answers = dict.fromkeys(lines[number][-1] for number in nearest)
    return sorted(list(answers)[:NUM_CHOICES])


def _one_token_words(tokenizer: Any) -> list[int]:
    """Return the ids of tokens that are a space and a word, those with the lowest ids."""
    (*_, comma) = tokenizer.encode(",", add_special_tokens=False)
    words: list[int] = []
    for token in range(len(tokenizer)):
        if re.fullmatch(", [a-z]{5,}", tokenizer.decode([comma, token])):
            words.append(token)
            if len(words) == NUM_WORDS:
                return words
    raise ValueError(f"`tokenizer` must have at least {NUM_WORDS} words of one token, got {len(words)}.")


def answers(logits: Iterable[Tensor], questions: Sequence[Question]) -> Iterator[tuple[Question, bool]]:
    """Yield each question of a stream, and True if the answer is the choice with the largest logit.

    Args:
        logits: logits `[1, chunk_length, vocab_size]` of the chunks of the stream.
        questions: questions of the stream.
    """
    start = 0
    for chunk in logits:
        for question in questions:
            if start <= question.position < start + chunk.shape[1]:
                scores = chunk[0, question.position - start, question.choices]
                yield question, question.choices[int(scores.argmax())] == question.answer
        start += chunk.shape[1]


def recall_by_distance(answered: Iterable[tuple[Question, bool]]) -> list[Recall]:
    """Return the recall for each distance, in increasing order."""
    found: dict[tuple[int, int], list[bool]] = {}
    for question, is_correct in answered:
        found.setdefault((question.distance, question.token_distance), []).append(is_correct)
    return [Recall(*distances, len(correct), sum(correct)) for distances, correct in sorted(found.items())]


def write_recall(rows: dict[str, list[Recall]], path: Path) -> None:
    """Write the recall with each cache to a CSV file; the first column is the name of the cache."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["cache", *Recall._fields])
        for name, recalls in rows.items():
            writer.writerows([name, *recall] for recall in recalls)


def plot_recall(rows: dict[str, list[Recall]], path: Path, title: str, num_recent: int) -> None:
    """Plot accuracy over distance as a PNG file, one line for each cache.

    Args:
        rows: recall with each cache, by name.
        path: file to write.
        title: title of the plot.
        num_recent: number of recent tokens in the window; a vertical line marks where facts leave it.
    """
    from matplotlib.figure import Figure  # an optional dependency, in the extra `cli`

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.axvline(num_recent, color="grey", linestyle="--", linewidth=1, label="the fact leaves the window")
    axes.axhline(1 / NUM_CHOICES, color="grey", linestyle=":", linewidth=1, label="chance")
    for name, recalls in rows.items():
        distances = [recall.token_distance for recall in recalls]
        axes.plot(distances, [recall.accuracy for recall in recalls], marker=".", linewidth=1.5, label=name)
        axes.set_xticks(distances, [str(recall.distance) for recall in recalls])
    axes.set(xlabel="distance from the question back to the fact (lines)", ylabel="accuracy", title=title)
    axes.set(ylim=(-0.02, 1.02))
    axes.grid(visible=True, alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
