"""A fact somewhere in a long text, and a question about it at the end: what a model's state keeps, and for how long."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from kabrn_dist.evaluation.requests import Answer, ContinuationRequest, GenerateRequest, Request
from kabrn_dist.evaluation.task import Example, Task
from kabrn_dist.evaluation.tasks.generation import first_text, one_continuation
from kabrn_dist.evaluation.tasks.multiple_choice import choice_logprobs, prefer
from kabrn_dist.evaluation.texts import TEXT_LAYOUT, TEXT_SPLITS, describe_left_out, read_texts
from kabrn_dist.utils.errors import UserError

_LENGTHS = tuple(1 << power for power in range(10, 17))
_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_PER_PLACE = 4
_CHOICES = 5
_LEAST_CHARACTERS = 256
_KEYS = ("anchor", "basket", "candle", "dolphin", "engine", "feather", "garden", "hammer", "island", "jacket", "kettle")


class Recall(Task):
    """Texts of 1,024 to 65,536 characters with a planted number, which is to be told from four other numbers.

    The number is planted at depths from 0 (the beginning) to 1 (just before the question), 4 times for each length and
    depth, in stretches of the given texts, which are repeated if they are too short. Everything is a function of the
    texts, so all models read the same.
    """

    name = "recall"
    description = "a number planted in a long text, told from four others by likelihood; by length and depth"
    published = "your own texts, as filler"
    layout = TEXT_LAYOUT
    splits = TEXT_SPLITS
    main_metric = "acc"
    accuracies: ClassVar[tuple[str, ...]] = ("acc",)

    def load(self, path: Path, split: str) -> list[Example]:
        """Plant numbers in the texts of a split.

        Raises:
            UserError: if there are no texts, or a file is damaged.
        """
        filler = "\n\n".join(each.text for each in read_texts(path, split))
        if len(filler) < _LEAST_CHARACTERS:
            raise UserError(
                f"{path}: {len(filler)} characters of text in split {split} are no text to plant numbers in; give "
                f"--data at least {_LEAST_CHARACTERS}"
            )
        return list(_plant_all(filler))

    def describe_left_out(self, path: Path) -> str:
        """Return how many .jsonl files in a folder hold no texts."""
        return describe_left_out(path)

    def requests(self, example: Example, shots: Sequence[Example]) -> list[Request]:
        """Return one request for each number."""
        record = example.record
        return [ContinuationRequest(record["context"], f" {number}") for number in record["choices"]]

    def score(self, example: Example, answers: Sequence[Answer]) -> dict[str, float]:
        """Return whether the planted number is the likeliest; at a tie it is not."""
        logprobs = choice_logprobs(answers)
        gold = example.record["choices"].index(example.record["answer"])
        others = [value for index, value in enumerate(logprobs) if index != gold]
        return {"acc": float(logprobs[gold] > max(others))}

    def gold_answers(self, example: Example) -> list[Answer]:
        """Return scores of which the planted number has the best."""
        choices = example.record["choices"]
        return prefer(choices, lambda index: choices[index] == example.record["answer"])

    def empty_answers(self, example: Example) -> list[Answer]:
        """Return scores of which the planted number has the worst."""
        choices = example.record["choices"]
        return prefer(choices, lambda index: choices[index] != example.record["answer"])


class GeneratedRecall(Recall):
    """The same texts; the model writes the number."""

    name = "recall_generated"
    description = "a number planted in a long text, to be written word for word; by length and depth"
    main_metric = "exact_match"
    accuracies = ("exact_match",)

    def requests(self, example: Example, shots: Sequence[Example]) -> list[Request]:
        """Return the text with the beginning of the answer."""
        return [GenerateRequest(example.record["context"], 16, ("\n",))]

    def score(self, example: Example, answers: Sequence[Answer]) -> dict[str, float]:
        """Return whether the first number of the answer is the planted one."""
        found = re.search(r"\d+", first_text(answers))
        return {"exact_match": float(found is not None and found[0] == example.record["answer"])}

    def gold_answers(self, example: Example) -> list[Answer]:
        """Return the number."""
        return one_continuation(f" {example.record['answer']}.")

    def empty_answers(self, example: Example) -> list[Answer]:
        """Return an empty text."""
        return one_continuation("")


def _plant_all(filler: str) -> Iterator[Example]:
    for length in _LENGTHS:
        for depth in _DEPTHS:
            for number in range(_PER_PLACE):
                id = f"{length}/{depth:.2f}/{number}"
                groups = {"length": f"{length:05d} characters", "depth": f"{depth:.2f}"}
                yield Example(id, _plant(filler, length, depth, random.Random(id)), groups)


def _plant(filler: str, length: int, depth: float, draws: random.Random) -> Mapping[str, Any]:
    key = draws.choice(_KEYS)
    choices = [str(value) for value in draws.sample(range(10_000, 100_000), _CHOICES)]
    answer = choices[0]
    draws.shuffle(choices)
    fact, question = f"The number of the {key} is {answer}.", f"The number of the {key} is"
    text = _stretch(filler, length - len(fact) - len(question) - 4, draws).strip()
    place = _find_blank(text, round(depth * len(text)))
    before, after = text[:place].rstrip(), text[place:].lstrip()
    context = "\n".join(filter(None, (before, fact, after, question)))
    return {"context": context, "answer": answer, "choices": choices}


def _stretch(filler: str, length: int, draws: random.Random) -> str:
    """Return so many characters from a drawn place on, going on at the beginning after the end."""
    start = _find_blank(filler, draws.randrange(len(filler)))
    pieces, missing = [filler[start : start + length]], length - len(filler[start : start + length])
    while missing > 0:
        pieces.append(filler[:missing])
        missing -= len(pieces[-1])
    return "".join(pieces)


def _find_blank(text: str, place: int) -> int:
    """Return the place of the next blank, so that no word is divided; the end if there is none."""
    found = re.compile(r"\s").search(text, place)
    return found.start() if found and place else place if place in (0, len(text)) else len(text)
