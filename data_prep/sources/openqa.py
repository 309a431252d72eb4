"""Open questions and answers as .jsonl; each record is recognized by its fields.

- NQ-open (Lee et al. 2019; CC BY-SA 3.0): `question`, `answer` a list of right answers; the EfficientQA files name
  the list `answer_and_def_correct_predictions`.
- GSM8K (Cobbe et al. 2021; MIT): `question`, `answer` with calculator annotations `<<48/2=24>>` and a last line `####
  72`.
- ARC and OpenBookQA (Clark et al. 2018; Mihaylov et al. 2018): `question.stem`, `question.choices` of `text` and
  `label`, `answerKey`; rendered with one line per choice, and "label. text" of the correct choice as the answer.
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
    """Options of open questions.

    Attributes:
        split: selects files in folders and archives by name; a file that is given by name is always read.
        marks: keep or strip the calculator annotations of GSM8K.
        answer: the whole solution of GSM8K, or only the number after "####".
        answers: the first of several correct answers, or one document for each.
        loss: what carries loss.
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
        """Accept files whose name contains a word of the split; a name without one counts as train."""
        words = set(re.split(r"[^a-z]+", name.rpartition("/")[2].lower()))
        named = {split for split, known in _SPLIT_WORDS.items() if known & words} or {"train"}
        return self.options.split == "all" or self.options.split in named

    def parse_member(self, member: Member) -> Iterator[Document | LayoutMismatch]:
        """Yield one document per question, or per answer."""
        for item in read_json_lines(member):
            if isinstance(item, Document | LayoutMismatch):
                yield item
                continue
            name, record = item
            question = _question(record)
            answers = self._answers(record)
            if question is None or answers is None:
                yield LayoutMismatch(name, describe_record(record))
                continue
            if not answers:
                final = self.options.answer == "final" and isinstance(record.get("answer"), str)
                yield Document(name, None, problem=f"no {_FINAL} before an answer" if final else "no answer")
            for answer in answers:
                yield render_question(name, question, answer, self.options.loss)

    def _answers(self, record: dict[str, Any]) -> list[str] | None:
        if isinstance(record.get("question"), dict):
            answers = _correct_choice(record)
        else:
            answers = record.get("answer", record.get("answer_and_def_correct_predictions"))
        if isinstance(answers, str):
            return self._strip_solution(answers)
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            return None
        return answers if self.options.answers == "each" else answers[:1]

    def _strip_solution(self, answer: str) -> list[str]:
        if self.options.answer == "final":
            return [answer.rpartition(_FINAL)[2]] if _FINAL in answer else []
        return [_MARK.sub("", answer) if self.options.marks == "strip" else answer]


def _question(record: dict[str, Any]) -> str | None:
    question = record.get("question")
    if not isinstance(question, dict):
        return question if isinstance(question, str) else None
    stem, choices = question.get("stem"), _choices(question)
    return None if not isinstance(stem, str) or choices is None else "\n".join([stem, *choices.values()])


def _correct_choice(record: dict[str, Any]) -> list[str] | None:
    choices = _choices(record["question"])
    label = record.get("answerKey")
    if choices is None or not isinstance(label, str | int):
        return None
    # Some files have numbers where others have texts.
    return [choices[str(label)]] if str(label) in choices else []


def _choices(question: dict[str, Any]) -> dict[str, str] | None:
    try:
        return {str(choice["label"]): f"{choice['label']}. {choice['text']}" for choice in question["choices"]}
    except (KeyError, TypeError):
        return None
