"""AMPS: about 100k Khan Academy and 5M Mathematica problems (Hendrycks et al., NeurIPS 2021, arXiv:2103.03874; MIT).

Layout: `amps/khan/<exercise>/<id>.json`, objects with `problem` (or `question`) and `hints`, a list whose last is the
answer (or else `solution`); `amps/mathematica/<subject>/<module>/<n>.txt` with a line "Problem:", the problem, and
once or more a line "Answer:" and an answer. As a folder or an archive.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

from data_prep.documents import Document
from data_prep.sources.archive import Member, read_text
from data_prep.sources.base import FileSource, SourceOptions, parse_json_file
from data_prep.sources.layout import LayoutMismatch, describe_record
from data_prep.sources.template import LossTarget, render_question

_HEADING = re.compile(r"^(Problem|Answer):[ \t]*\r?$", re.MULTILINE)


class AmpsOptions(SourceOptions):
    """Options of AMPS.

    Attributes:
        part: which collection.
        answer: all hints of a Khan problem, or only the last one.
        answers: the first answer of a Mathematica problem, or one document for each.
        loss: what carries loss.
    """

    part: Literal["khan", "mathematica", "all"] = "all"
    answer: Literal["full", "final"] = "full"
    answers: Literal["first", "each"] = "first"
    loss: LossTarget = "all"


class Amps(FileSource):
    """Problems of AMPS."""

    kind = "amps"
    expected = "khan/<exercise>/<id>.json ('problem' or 'question', 'hints') and mathematica/<subject>/<module>/<n>.txt"
    endings = (".json", ".txt")
    license = "MIT"
    options_class = AmpsOptions

    def accepts(self, name: str) -> bool:
        """Accept the .json files of Khan and the .txt files of Mathematica, also if only a folder below is given."""
        part = "khan" if name.removesuffix(".gz").endswith(".json") else "mathematica"
        return self.options.part in (part, "all") and "data_file_lists" not in name.split("/")

    def parse_member(self, member: Member) -> Iterator[Document | LayoutMismatch]:
        """Yield the documents of one file."""
        return self._khan(member) if ".json" in member.name.rpartition("/")[2] else self._mathematica(member)

    def _khan(self, member: Member) -> Iterator[Document | LayoutMismatch]:
        record = parse_json_file(member)
        if isinstance(record, Document | LayoutMismatch):
            yield record
            return
        question, steps = _question_and_steps(record) if isinstance(record, dict) else (None, None)
        if question is None or steps is None:
            yield LayoutMismatch(member.name, describe_record(record))
        elif not steps:
            yield Document(member.name, None, problem="no hints, so no answer")
        else:
            answer = steps[-1] if self.options.answer == "final" else "\n".join(steps)
            yield render_question(member.name, question, answer, self.options.loss)

    def _mathematica(self, member: Member) -> Iterator[Document | LayoutMismatch]:
        whole = read_text(member)
        if whole.text is None:
            yield whole._replace(raw=None)
            return
        # The text before the first heading, then headings and texts alternate.
        parts = _HEADING.split(whole.text)[1:]
        blocks = list(zip(parts[::2], (text.strip() for text in parts[1::2]), strict=True))
        problems = [text for heading, text in blocks if heading == "Problem" and text]
        answers = [text for heading, text in blocks if heading == "Answer" and text]
        if len(problems) != 1 or not answers:
            yield LayoutMismatch(member.name, f"{len(problems)} 'Problem:' and {len(answers)} 'Answer:' blocks")
            return
        for answer in answers if self.options.answers == "each" else answers[:1]:
            yield render_question(member.name, problems[0], answer, self.options.loss)


def _question_and_steps(record: dict[str, Any]) -> tuple[str | None, list[str] | None]:
    question = record.get("question") or record.get("problem")
    steps = record.get("hints", record.get("solution"))
    steps = [steps] if isinstance(steps, str) else steps
    valid = isinstance(steps, list) and all(isinstance(step, str) for step in steps)
    return question if isinstance(question, str) else None, steps if valid else None
