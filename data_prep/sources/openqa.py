"""Open questions and answers as .jsonl, each record recognised by its fields.

- NQ-open (Lee et al. 2019; CC BY-SA 3.0): `question`, `answer` a list of right answers; the EfficientQA files name
  the list `answer_and_def_correct_predictions`.
- GSM8K (Cobbe et al. 2021; MIT): `question`, `answer` with calculator marks `<<48/2=24>>` and a last line `#### 72`.
- ARC and OpenBookQA (Clark et al. 2018; Mihaylov et al. 2018): `question.stem`, `question.choices` of `text` and
  `label`, `answerKey`; rendered with a line for each choice, and "label. text" of the right one as the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

from data_prep.documents import Document
from data_prep.sources.archive import Member
from data_prep.sources.base import FileSource, SourceOptions, read_json_lines
from data_prep.sources.layout import LayoutMismatch, describe_record
from data_prep.sources.template import LossTarget, render_question

_SPLIT_WORDS = {"train": {"train"}, "valid": {"dev", "val", "valid", "validation"}, "test": {"test"}}
_MARK = re.compile(r"<<[^<>]*>>")
_FINAL = "####"


class OpenQAOptions(SourceOptions):
    """`split` picks files in folders and archives by name (one given by name is read in any case).

    `marks`: GSM8K's calculator marks. `answer`: its whole solution, or the number after "####". `answers`: the first
    of several right ones, or a document for each.
    """

    split: Literal["train", "valid", "test", "all"] = "train"
    marks: Literal["keep", "strip"] = "keep"
    answer: Literal["full", "final"] = "full"
    answers: Literal["first", "each"] = "first"
    loss: LossTarget = "all"


class OpenQA(FileSource):
    """Questions with answers, from .jsonl files."""

    kind = "openqa"
    expected = (
        ".jsonl of NQ-open or GSM8K (question, answer) or ARC or OpenBookQA (question.stem, choices, answerKey), "
        "with the split in the file's name; set split, or give the file itself"
    )
    endings = (".jsonl",)
    license = "NQ-open CC-BY-SA-3.0, GSM8K MIT"
    options_class = OpenQAOptions

    def accepts(self, name: str) -> bool:
        """Take files whose name has a word of the split; one that names no split counts as train."""
        words = set(re.split(r"[^a-z]+", name.rpartition("/")[2].lower()))
        named = {split for split, known in _SPLIT_WORDS.items() if known & words} or {"train"}
        return self.options.split == "all" or self.options.split in named

    def parse_member(self, member: Member) -> Iterator[Document | LayoutMismatch]:
        """Yield a document for each question (and answer)."""
        for item in read_json_lines(member):
            if isinstance(item, Document | LayoutMismatch):
                yield item
                continue
            name, record = item
            asked = _question(record)
            answers = self._answers(record)
            if asked is None or answers is None:
                yield LayoutMismatch(name, describe_record(record))
                continue
            if not answers:
                yield Document(name, None, problem="no answer")
            for answer in answers:
                yield render_question(name, asked, answer, self.options.loss)

    def _answers(self, record: dict[str, Any]) -> list[str] | None:
        if isinstance(record.get("question"), dict):
            found = _chosen(record)
        else:
            found = record.get("answer", record.get("answer_and_def_correct_predictions"))
        if isinstance(found, str):
            return [self._worked(found)]
        if not isinstance(found, list) or not all(isinstance(answer, str) for answer in found):
            return None
        return found if self.options.answers == "each" else found[:1]

    def _worked(self, answer: str) -> str:
        if self.options.answer == "final" and _FINAL in answer:
            return answer.rpartition(_FINAL)[2]
        return _MARK.sub("", answer) if self.options.marks == "strip" else answer


def _question(record: dict[str, Any]) -> str | None:
    question = record.get("question")
    if not isinstance(question, dict):
        return question if isinstance(question, str) else None
    stem, choices = question.get("stem"), _choices(question)
    return None if not isinstance(stem, str) or choices is None else "\n".join([stem, *choices.values()])


def _chosen(record: dict[str, Any]) -> list[str] | None:
    choices = _choices(record["question"])
    right = record.get("answerKey")
    if choices is None or not isinstance(right, str | int):
        return None
    return [choices[right]] if right in choices else []


def _choices(question: dict[str, Any]) -> dict[str, str] | None:
    try:
        return {choice["label"]: f"{choice['label']}. {choice['text']}" for choice in question["choices"]}
    except (KeyError, TypeError):
        return None
