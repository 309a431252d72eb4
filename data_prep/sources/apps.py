"""APPS problems: several files of one folder make a problem (Hendrycks et al. 2021, arXiv:2105.09938; MIT).

The question is `question.txt`, then `starter_code.py` where there is one, then the line that its authors give the
model: "Use Call-Based format" with starter code, else "Use Standard Input format". Answers are the first of
`solutions.json`, a list; problems without solutions are documents without text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby

from data_prep.documents import Document
from data_prep.sources.archive import Member, text_of
from data_prep.sources.layout import Mismatch
from data_prep.sources.packed import reason
from data_prep.sources.template import Loss, render


def problems(found: Iterator[Member], solutions: int, loss: Loss) -> Iterator[Document | Mismatch]:
    """Yield up to `solutions` documents for each folder; its files must follow one another, as folders are packed."""
    for folder, members in groupby(found, key=lambda member: member.name.rpartition("/")[0]):
        files = {member.name.rpartition("/")[2]: text_of(member) for member in members}
        bad = next((file for file in files.values() if file.text is None), None)
        if bad is not None:
            yield bad._replace(raw=None)
        elif "question.txt" not in files:
            yield Mismatch(folder, f"{', '.join(sorted(files))} without question.txt")
        elif "solutions.json" not in files:
            yield Document(folder, None, problem="no solutions.json")
        else:
            yield from _problem(folder, {name: file.text or "" for name, file in files.items()}, solutions, loss)


def _problem(folder: str, files: dict[str, str], solutions: int, loss: Loss) -> Iterator[Document | Mismatch]:
    try:
        answers = json.loads(files["solutions.json"] or "[]")
    except (ValueError, RecursionError) as error:
        yield Mismatch(f"{folder}/solutions.json", f"no JSON ({reason(error)})")
        return
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        yield Mismatch(f"{folder}/solutions.json", "JSON, but not a list of texts")
    elif not answers:
        yield Document(folder, None, problem="no solutions")
    else:
        question = _question(files)
        for answer in answers[:solutions]:
            yield render(folder, question, answer, loss, gap="\n")


def _question(files: dict[str, str]) -> str:
    starter = files.get("starter_code.py", "").strip()
    form = "Use Call-Based format" if starter else "Use Standard Input format"
    return "\n".join(part for part in (files["question.txt"].strip(), starter, form) if part)
