"""GSM8K: grade-school word problems whose answers are numbers (Cobbe et al. 2021, arXiv:2110.14168; MIT license)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from kabrn_dist.evaluation.files import find_records
from kabrn_dist.evaluation.records import FileLayout, find_blank, has_texts
from kabrn_dist.evaluation.requests import Answer, GenerateRequest, Request
from kabrn_dist.evaluation.task import Example, Task
from kabrn_dist.evaluation.tasks.generation import first_text, join_shots, one_continuation

_MARKED = re.compile(r"####\s*\$?\s*(-?[0-9.,]+)")
_ANY = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


class Gsm8k(Task):
    """Problems of GSM8K: 5-shot, chain of thought, a number at the end.

    `strict` reads the first number after "####", which the few-shot examples end in; `flexible` the last number of the
    answer, wherever it is. Numbers are compared by value, so 18.00 is 18, and without "$" and thousands separators.
    """

    name = "gsm8k"
    description = "grade-school word problems; the number after #### (strict), or the last number (flexible), is right"
    published = "https://github.com/openai/grade-school-math (grade_school_math/data)"
    layout = "train.jsonl and test.jsonl with 'question' and 'answer', whose last line is '#### <number>'"
    splits = ("test", "train")
    shots_split = "train"
    default_shots = 5
    main_metric = "strict"
    accuracies = ("strict", "flexible")

    def load(self, path: Path, split: str) -> list[Example]:
        """Read the problems of a split, in the order of the file.

        Raises:
            UserError: if they are not there, or damaged.
        """
        records = find_records(self, path, split, FileLayout(_is_problem, _find_problem))
        return [Example(f"{split}/{number}", record) for number, record in enumerate(records, 1)]

    def requests(self, example: Example, shots: Sequence[Example]) -> list[Request]:
        """Return the question after answered ones."""
        rendered = (f"{_ask(shot)} {shot.record['answer']}" for shot in shots)
        return [GenerateRequest(join_shots(rendered, _ask(example)), 512, ("Question:",))]

    def score(self, example: Example, answers: Sequence[Answer]) -> dict[str, float]:
        """Return whether the numbers are right."""
        gold, text = _find_marked(example.record["answer"]), first_text(answers)
        return {"strict": float(_find_marked(text) == gold), "flexible": float(_find_last(text) == gold)}

    def gold_answers(self, example: Example) -> list[Answer]:
        """Return the published solution."""
        return one_continuation(f" {example.record['answer']}")

    def empty_answers(self, example: Example) -> list[Answer]:
        """Return an empty text."""
        return one_continuation("")


def _ask(example: Example) -> str:
    return f"Question: {example.record['question']}\nAnswer:"


def _is_problem(record: Mapping[str, Any]) -> bool:
    return has_texts(record, "question", "answer")


def _find_problem(record: Mapping[str, Any]) -> str:
    if _find_marked(record["answer"]) is None:
        return "'answer' has no number after ####"
    return find_blank(record, "question")


def _find_marked(text: str) -> Decimal | None:
    found = _MARKED.search(text)
    return _parse_number(found[1]) if found else None


def _find_last(text: str) -> Decimal | None:
    found = _ANY.findall(text)
    return _parse_number(found[-1]) if found else None


def _parse_number(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", "").replace("$", "").rstrip("."))
    except InvalidOperation:
        return None
