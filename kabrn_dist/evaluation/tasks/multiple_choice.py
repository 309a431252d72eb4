"""Choices by their log-likelihood: the model takes the one that it finds likeliest after the question.

`acc` compares log p(choice | question); `acc_norm` divides it by the choice's UTF-8 bytes first, as long choices are
less likely. Ties go to the first choice. Prompts are those of lm-eval, of which `acc_norm` divides by characters.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from kabrn_dist.evaluation.files import find_records, unique_ids
from kabrn_dist.evaluation.records import FileLayout
from kabrn_dist.evaluation.requests import Answer, ContinuationRequest, ContinuationScore, Request
from kabrn_dist.evaluation.task import Example, Task
from kabrn_dist.evaluation.tasks.generation import join_shots

_LIKELY, _UNLIKELY = -1.0, -1e6


class Question(NamedTuple):
    """A question with choices.

    Attributes:
        context: Text before the choices, each of which follows after a blank.
        choices: In their order, at least two.
        gold: Index of the right one.
    """

    context: str
    choices: tuple[str, ...]
    gold: int


class MultipleChoice(Task):
    """A task whose answers are choices. Subclasses say how a record is read.

    Attributes:
        file_layout: Which files belong to the task.
    """

    shots_split = "train"
    main_metric = "acc_norm"
    accuracies = ("acc", "acc_norm")
    file_layout: ClassVar[FileLayout]

    @abstractmethod
    def question(self, record: Mapping[str, Any]) -> Question:
        """Return the question of a record."""

    def published_id(self, record: Mapping[str, Any]) -> str:
        """Return the id that a record was published with; "" if there is none."""
        return ""

    def load(self, path: Path, split: str) -> list[Example]:
        """Read the examples of a split, in the order of the file.

        Raises:
            UserError: if they are not there, or damaged.
        """
        return self.make_examples(find_records(self, path, split, self.file_layout), split)

    def make_examples(self, records: Sequence[Mapping[str, Any]], split: str, **groups: str) -> list[Example]:
        """Return the examples of records, named as they were published, or by their number in the split."""
        ids = [self.published_id(record) or f"{split}/{number}" for number, record in enumerate(records, 1)]
        return [Example(id, record, groups) for id, record in zip(unique_ids(ids), records, strict=True)]

    def requests(self, example: Example, shots: Sequence[Example]) -> list[Request]:
        """Return one request for each choice."""
        question = self.question(example.record)
        rendered = (f"{shot.context} {shot.choices[shot.gold]}" for shot in (self.question(s.record) for s in shots))
        context = join_shots(rendered, question.context)
        return [ContinuationRequest(context, f" {choice}") for choice in question.choices]

    def score(self, example: Example, answers: Sequence[Answer]) -> dict[str, float]:
        """Return whether the likeliest choice is the right one, as it is and per byte."""
        question = self.question(example.record)
        logprobs = choice_logprobs(answers)
        per_byte = [value / max(1, len(text.encode())) for value, text in zip(logprobs, question.choices, strict=True)]
        return {
            "acc": float(_argmax(logprobs) == question.gold),
            "acc_norm": float(_argmax(per_byte) == question.gold),
        }

    def gold_answers(self, example: Example) -> list[Answer]:
        """Return scores of which the right choice has the best."""
        question = self.question(example.record)
        return prefer(question.choices, lambda index: index == question.gold)

    def empty_answers(self, example: Example) -> list[Answer]:
        """Return scores of which the right choice has the worst."""
        question = self.question(example.record)
        return prefer(question.choices, lambda index: index != question.gold)


def find_blank_question(text: str, choices: Sequence[str]) -> str:
    """Return that a question, or each of its choices, is blank, so that nothing is asked; "" otherwise."""
    if not text.strip():
        return "its question is blank"
    return "" if any(choice.strip() for choice in choices) else "its choices are blank"


def choice_logprobs(answers: Sequence[Answer]) -> list[float]:
    """Return the log-likelihoods of choices, in nats.

    Raises:
        TypeError: if an answer is no score of a continuation.
    """
    logprobs = []
    for answer in answers:
        if not isinstance(answer, ContinuationScore):
            raise TypeError(f"the score of a continuation was asked for, not a {type(answer).__name__}")
        logprobs.append(answer.logprob)
    return logprobs


def prefer(choices: Sequence[str], is_likely: Callable[[int], bool]) -> list[Answer]:
    """Return scores of a model that finds some choices likely.

    Args:
        choices: The choices.
        is_likely: Whether the choice of an index is likely.
    """
    return [
        ContinuationScore(_LIKELY if is_likely(index) else _UNLIKELY, 1, len(f" {choice}".encode()), is_likely(index))
        for index, choice in enumerate(choices)
    ]


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
