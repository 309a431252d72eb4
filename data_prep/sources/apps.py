"""APPS: problems that consist of several files in a folder (Hendrycks et al. 2021, arXiv:2105.09938; MIT).

The question is `question.txt`, then `starter_code.py` if there is one, then the line that the authors of APPS append:
"Use Call-Based format" with starter code, else "Use Standard Input format". The answers are the first entries of the
list `solutions.json`; problems without solutions are documents without text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby

from data_prep.documents import Document
from data_prep.sources.archive import Member, read_text
from data_prep.sources.compression import describe_error
from data_prep.sources.layout import LayoutMismatch
from data_prep.sources.template import LossTarget, render_question


def parse_problems(members: Iterator[Member], solutions: int, loss: LossTarget) -> Iterator[Document | LayoutMismatch]:
    """Yield up to `solutions` documents per folder. The files of a folder must be adjacent, as in archives."""
    for folder, group in groupby(members, key=lambda member: member.name.rpartition("/")[0]):
        files = {member.name.rpartition("/")[2]: read_text(member) for member in group}
        bad = next((file for file in files.values() if file.text is None), None)
        if bad is not None:
            yield bad._replace(raw=None)
        elif "question.txt" not in files:
            yield LayoutMismatch(folder, f"{', '.join(sorted(files))} without question.txt")
        elif "solutions.json" not in files:
            yield Document(folder, None, problem="no solutions.json")
        else:
            yield from _problem(folder, {name: file.text or "" for name, file in files.items()}, solutions, loss)


def _problem(
    folder: str, files: dict[str, str], solutions: int, loss: LossTarget
) -> Iterator[Document | LayoutMismatch]:
    try:
        answers = json.loads(files["solutions.json"] or "[]")
    except (ValueError, RecursionError) as error:
        yield LayoutMismatch(f"{folder}/solutions.json", f"no JSON ({describe_error(error)})")
        return
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        yield LayoutMismatch(f"{folder}/solutions.json", "JSON, but not a list of strings")
    elif not answers:
        yield Document(folder, None, problem="no solutions")
    else:
        question = _question(files)
        for answer in answers[:solutions]:
            yield render_question(folder, question, answer, loss, gap="\n")


def _question(files: dict[str, str]) -> str:
    starter = files.get("starter_code.py", "").strip()
    answer_format = "Use Call-Based format" if starter else "Use Standard Input format"
    return "\n".join(part for part in (files["question.txt"].strip(), starter, answer_format) if part)
