"""OpenBookQA: elementary science facts to combine (Mihaylov et al. 2018, arXiv:1809.02789; Apache 2.0)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kabrn_dist.evaluation.records import FileLayout
from kabrn_dist.evaluation.tasks.arc import find_choice_problem, is_stem_with_choices, read_choices
from kabrn_dist.evaluation.tasks.multiple_choice import MultipleChoice, Question


class OpenBookQA(MultipleChoice):
    """Questions of OpenBookQA, without its facts; each choice continues the question."""

    name = "openbookqa"
    description = "elementary science without the book of facts; the likeliest choice is right"
    published = "https://allenai.org/data/open-book-qa (OpenBookQA-V1-Sep2018.zip)"
    layout = "Main/{train,dev,test}.jsonl with question.stem, question.choices, answerKey; or the archive"
    splits = ("test", "validation", "train")
    file_layout = FileLayout(
        is_stem_with_choices,
        find_choice_problem,
        r"(^|/)main/\w+\.jsonl|(^|/)(openbookqa|obqa)[^/]*\.jsonl|^(train|dev|test)\.jsonl",
        r"(^|/)(openbookqa|obqa)[^/]*$",
    )

    def published_id(self, record: Mapping[str, Any]) -> str:
        """Return the published id."""
        return str(record.get("id", ""))

    def question(self, record: Mapping[str, Any]) -> Question:
        """Return the question as lm-eval asks it: the stem alone."""
        return read_choices(record, record["question"]["stem"])
