"""MBPP: mostly basic programming problems, with their tests in the prompt (Austin et al. 2021, arXiv 2108.07732)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from kabrn_dist.evaluation.code_task import CodeTask
from kabrn_dist.evaluation.files import find_records
from kabrn_dist.evaluation.missing import MissingData
from kabrn_dist.evaluation.records import FileLayout, has_texts
from kabrn_dist.evaluation.requests import Answer, Continuation, Request
from kabrn_dist.evaluation.task import Example
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safe_open import read_plain

_SANITIZED = "sanitized-mbpp.json"
_SANITIZED_BYTES_LIMIT = 1 << 28
# Numbers of the problems of each split, as the paper divides them.
_SPLITS = {
    "test": range(11, 511),
    "validation": range(511, 601),
    "train": range(601, 975),
    "prompt": range(1, 11),
}
_STOP = ("[DONE]",)


def _is_problem(record: Mapping[str, Any]) -> bool:
    tests = record.get("test_list")
    has_tests = isinstance(tests, list) and all(isinstance(test, str) for test in tests) and len(tests) > 0
    return has_tests and isinstance(record.get("task_id"), int) and has_texts(record, "code", _question_field(record))


def _question_field(record: Mapping[str, Any]) -> str:
    return "prompt" if "prompt" in record else "text"


_LAYOUT = FileLayout(_is_problem, pattern="mbpp[^/]*$")


class Mbpp(CodeTask):
    """MBPP, whole or the part that was sanitized: a description and tests, few-shot."""

    name: ClassVar[str] = "mbpp"
    description: ClassVar[str] = "500 short Python programs by description and tests; scored by the tests, pass@k"
    published: ClassVar[str] = "https://github.com/google-research/google-research/tree/master/mbpp"
    layout: ClassVar[str] = f"mbpp.jsonl or {_SANITIZED}"
    splits: ClassVar[tuple[str, ...]] = tuple(_SPLITS)
    shots_split: ClassVar[str] = "prompt"
    default_shots: ClassVar[int] = 3

    def load(self, path: Path, split: str) -> list[Example]:
        """Read the problems of a split from mbpp.jsonl, or from the sanitized file where that one is not.

        Raises:
            UserError: as `Task.load`.
        """
        if split not in _SPLITS:
            raise UserError(f"--split {split}: task {self.name} has no such split; use one of {', '.join(_SPLITS)}")
        if path.is_file() and path.suffix == ".json":
            records = _read_sanitized(path)
        else:
            try:
                # One file has all splits.
                records = find_records(self, path, self.splits[0], _LAYOUT)
            except MissingData as error:
                sanitized = min(path.rglob(_SANITIZED), default=None) if path.is_dir() else None
                if error.damaged or sanitized is None:
                    raise
                records = _read_sanitized(sanitized)
        return [
            Example(f"MBPP/{record['task_id']}", record) for record in records if record["task_id"] in _SPLITS[split]
        ]

    def requests(self, example: Example, shots: Sequence[Example]) -> list[Request]:
        """Return the description and its tests, after as many that are solved."""
        solved = (f"{_describe(shot)}{shot.record['code']}\n[DONE]\n\n" for shot in shots)
        return self._ask("".join(solved) + _describe(example), _STOP)

    def write_program(self, example: Example, text: str) -> str:
        """Return the program, then what its tests need and the tests."""
        record = example.record
        # What tests need may be made of classes of the program, so it comes after it.
        setup = [record.get("test_setup_code") or "", *(record.get("test_imports") or ())]
        return "\n".join([text, *setup, *record["test_list"], ""])

    def gold_answers(self, example: Example) -> list[Answer]:
        """Return the published solution."""
        return [[Continuation(example.record["code"], 1, "stop")]]


def _describe(example: Example) -> str:
    record = example.record
    tests = "\n".join(record["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {record[_question_field(record)]} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def _read_sanitized(file: Path) -> list[dict[str, Any]]:
    remedy = f"get it again: {Mbpp.published}"
    content = read_plain(file, _SANITIZED_BYTES_LIMIT, follow_links=True, remedy=remedy)
    try:
        records = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: no JSON ({error}); {remedy}") from error
    if not isinstance(records, list) or not records:
        raise UserError(f"{file}: no list of problems; expected {Mbpp.layout}; {remedy}")
    for number, record in enumerate(records):
        if not isinstance(record, dict) or not _is_problem(record):
            raise UserError(f"{file}: problem {number} has no task_id, prompt, code and test_list; {remedy}")
    return records
