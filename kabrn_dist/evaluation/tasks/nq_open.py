"""NQ-open: questions to a search engine, with all short answers that count (Lee et al. 2019; CC BY-SA 3.0).

The questions are from Natural Questions (Kwiatkowski et al. 2019); EfficientQA is the same task with other questions.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kabrn_dist.evaluation.files import find_records
from kabrn_dist.evaluation.records import FileLayout, find_blank
from kabrn_dist.evaluation.requests import Answer, GenerateRequest, Request
from kabrn_dist.evaluation.task import Example, Task
from kabrn_dist.evaluation.tasks.generation import first_text, join_shots, one_continuation

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class NqOpen(Task):
    """Questions of NQ-open: 5-shot, closed book; the first line of the answer must be one of the right answers.

    Both are compared in lower case, without articles, punctuation and repeated blanks, as in SQuAD. An answer may
    contain "." and ",", at which other harnesses end it.
    """

    name = "nq_open"
    description = "short answers to questions without any text to read; one of the right ones, word for word"
    published = "https://github.com/google-research-datasets/natural-questions (nq_open), and /efficientqa"
    layout = (
        "NQ-open.train.jsonl, NQ-open.dev.jsonl with 'question' and 'answer', a list; or the files of EfficientQA with "
        "'answer_and_def_correct_predictions'"
    )
    splits = ("validation", "train", "test")
    shots_split = "train"
    default_shots = 5
    main_metric = "exact_match"
    accuracies = ("exact_match",)

    def load(self, path: Path, split: str) -> list[Example]:
        """Read the questions of a split, in the order of the file.

        Raises:
            UserError: if they are not there, or damaged.
        """
        records = find_records(self, path, split, FileLayout(_is_question, _find_problem))
        return [Example(f"{split}/{number}", record) for number, record in enumerate(records, 1)]

    def requests(self, example: Example, shots: Sequence[Example]) -> list[Request]:
        """Return the question after answered ones."""
        rendered = (f"{_ask(shot)} {_right_answers(shot.record)[0]}" for shot in shots)
        return [GenerateRequest(join_shots(rendered, _ask(example)), 48, ("\n",))]

    def score(self, example: Example, answers: Sequence[Answer]) -> dict[str, float]:
        """Return whether the answer is one of the right ones."""
        given = normalize_answer(first_text(answers).strip().partition("\n")[0])
        right = map(normalize_answer, _right_answers(example.record))
        return {"exact_match": float(bool(given) and given in right)}

    def gold_answers(self, example: Example) -> list[Answer]:
        """Return the first right answer."""
        return one_continuation(f" {_right_answers(example.record)[0]}")

    def empty_answers(self, example: Example) -> list[Answer]:
        """Return an empty text."""
        return one_continuation("")


def normalize_answer(text: str) -> str:
    """Return a text in lower case, without punctuation, articles and repeated blanks; itself if nothing remains.

    Example:
        >>> normalize_answer("The  Isle of Wight!"), normalize_answer(" --- ")
        ('isle of wight', '---')
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()) or text.strip()


def _ask(example: Example) -> str:
    return f"Q: {example.record['question'].strip().rstrip('?').rstrip()}?\nA:"


def _right_answers(record: Mapping[str, Any]) -> list[str]:
    answers: list[str] = record.get("answer", record.get("answer_and_def_correct_predictions"))
    return answers


def _is_question(record: Mapping[str, Any]) -> bool:
    answers = _right_answers(record)
    return (
        isinstance(record.get("question"), str)
        and isinstance(answers, list)
        and all(isinstance(answer, str) for answer in answers)
    )


def _find_problem(record: Mapping[str, Any]) -> str:
    if not any(answer.strip() for answer in _right_answers(record)):
        return "it has no answer that is not blank"
    return find_blank(record, "question")
