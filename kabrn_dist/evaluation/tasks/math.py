r"""MATH: competition problems with worked solutions (Hendrycks et al. 2021, arXiv:2103.03874; MIT license)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kabrn_dist.evaluation.files import find_files, require_one, unique_ids
from kabrn_dist.evaluation.math_answer import find_final_answer
from kabrn_dist.evaluation.math_equivalence import MathComparer, UnfinishedComparison
from kabrn_dist.evaluation.math_normalization import is_same_answer
from kabrn_dist.evaluation.records import DataFile, FileLayout, find_blank, has_texts
from kabrn_dist.evaluation.requests import Answer, GenerateRequest, Request
from kabrn_dist.evaluation.task import Example, Task
from kabrn_dist.evaluation.tasks.generation import first_text, join_shots, one_continuation

_TREE = re.compile(r"(train|test)/([^/]+)/(\d+)\.json", re.IGNORECASE)


class MathProblems(Task):
    r"""Problems of MATH: 4-shot in the format of Minerva (Lewkowycz et al. 2022, arXiv:2206.14858).

    The few-shot examples are drawn from the training split, instead of Minerva's own four. `exact_match` compares
    answers as normalized texts; `math_verify` as mathematical objects. `math_verify_unfinished` is 1 where a comparison
    exceeded its limits of time or memory, which counts as a wrong answer.

    Args:
        seconds: Limit of a comparison by `math_verify`, in processor time.
    """

    name = "math"
    description = r"competition problems; the last \boxed{} is right as normalized text, and as a mathematical object"
    published = "https://github.com/hendrycks/math (MATH.tar)"
    layout = (
        "{train,test}/<subject>/<n>.json with 'problem' and 'solution', as a folder or an archive; or .jsonl with the "
        "same fields, and the split in its name"
    )
    splits = ("test", "train")
    shots_split = "train"
    default_shots = 4
    main_metric = "math_verify"
    accuracies = ("exact_match", "math_verify")

    def __init__(self, seconds: int = 5) -> None:
        self._comparer = MathComparer(seconds)

    def load(self, path: Path, split: str) -> list[Example]:
        """Read the problems of a split: by subject and number, or in the order of the .jsonl.

        Raises:
            UserError: if they are not there, or damaged.
        """
        pattern = rf"\.jsonl|{_TREE.pattern}"
        layout = FileLayout(_is_problem, _find_problem, pattern, r"(^|/)math[^/]*$", (".json", ".jsonl"))
        files = find_files(self, path, split, layout)
        lines = [file for file in files if not _TREE.search(file.name)]
        if lines:
            records = require_one(self, path, split, files).records
            ids = [str(record.get("unique_id") or f"{split}/{number}") for number, record in enumerate(records, 1)]
        else:
            ordered = sorted(map(_with_place, files), key=lambda placed: placed[0])
            records = [file.records[0] for _, file in ordered]
            ids = [f"{split}/{subject}/{number}" for (subject, number, _), _ in ordered]
        return [Example(id, record, _groups(record)) for id, record in zip(unique_ids(ids), records, strict=True)]

    def requests(self, example: Example, shots: Sequence[Example]) -> list[Request]:
        """Return the problem after solved ones."""
        rendered = (f"{_ask(shot)}{_solve(shot)}" for shot in shots)
        return [GenerateRequest(join_shots(rendered, _ask(example)), 1024, ("Problem:",))]

    def score(self, example: Example, answers: Sequence[Answer]) -> dict[str, float]:
        """Return whether the answer is right by both comparisons."""
        text = first_text(answers)
        gold, given = find_final_answer(example.record["solution"]), find_final_answer(text)
        assert gold is not None  # `load` has looked
        exact = given is not None and is_same_answer(given, gold)
        equal, unfinished = False, False
        if not gold.strip():
            equal = exact  # two of the published solutions box nothing, which math-verify cannot compare
        elif text.strip():
            try:
                equal = self._comparer.equal(_box(gold), _comparable(text))
            except UnfinishedComparison:
                unfinished = True
        return {
            "exact_match": float(exact),
            "math_verify": float(equal),
            "math_verify_unfinished": float(unfinished),
        }

    def explain(self, example: Example, answers: Sequence[Answer]) -> str:
        """Return what was taken for the answer, and why it was not compared, if it was not."""
        text = first_text(answers)
        given, gold = find_final_answer(text), find_final_answer(example.record["solution"]) or ""
        failure = self._comparer.failure(_box(gold), _comparable(text))
        taken = "no final answer found" if given is None else f"answer {given[:200]!r}"
        return f"{taken}; math_verify: {failure}" if failure else taken

    def gold_answers(self, example: Example) -> list[Answer]:
        """Return the published solution."""
        return one_continuation(f"\n{example.record['solution']}")

    def empty_answers(self, example: Example) -> list[Answer]:
        """Return an empty text."""
        return one_continuation("")


def _ask(example: Example) -> str:
    return f"Problem:\n{example.record['problem']}\n\nSolution:"


def _solve(example: Example) -> str:
    solution = example.record["solution"]
    return f"\n{solution}\nFinal Answer: The final answer is ${find_final_answer(solution)}$. I hope it is correct."


def _comparable(text: str) -> str:
    """Return the final answer, or a text without one as it is, in which math-verify may find an answer."""
    given = find_final_answer(text)
    return text if given is None else _box(given)


def _box(answer: str) -> str:
    # math-verify does not read "10." as a number; an ellipsis stays.
    answer = answer.strip()
    if answer.endswith(".") and not answer.endswith(".."):
        answer = answer[:-1]
    return rf"$\boxed{{{answer}}}$"


def _is_problem(record: Mapping[str, Any]) -> bool:
    return has_texts(record, "problem", "solution")


def _find_problem(record: Mapping[str, Any]) -> str:
    if find_final_answer(record["solution"]) is None:
        return r"'solution' has no \boxed{} and no final answer"
    return find_blank(record, "problem")


def _groups(record: Mapping[str, Any]) -> dict[str, str]:
    level, subject = str(record.get("level", "")), record.get("type", record.get("subject"))
    groups = {"level": f"Level {level}" if level.isdigit() else level, "subject": str(subject or "")}
    return {kind: group for kind, group in groups.items() if group}


def _with_place(file: DataFile) -> tuple[tuple[str, int, str], DataFile]:
    found = _TREE.search(file.name)
    assert found is not None  # the others are .jsonl
    return (found[2], int(found[3]), file.name), file
