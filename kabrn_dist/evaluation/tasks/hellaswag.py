"""HellaSwag: which ending a description of everyday events has (Zellers et al. 2019, arXiv:1905.07830; MIT license)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kabrn_dist.evaluation.records import FileLayout, has_texts
from kabrn_dist.evaluation.tasks.multiple_choice import MultipleChoice, Question, find_blank_question


class HellaSwag(MultipleChoice):
    """Endings of HellaSwag. Marks of WikiHow, such as "[header]", are removed as lm-eval does."""

    name = "hellaswag"
    description = "endings of everyday descriptions; the likeliest of four is right"
    published = "https://github.com/rowanz/hellaswag (data/hellaswag_{train,val}.jsonl)"
    layout = "hellaswag_train.jsonl and hellaswag_val.jsonl with ctx_a, ctx_b, endings, label (the test has no labels)"
    splits = ("validation", "train")

    def question(self, record: Mapping[str, Any]) -> Question:
        """Return the activity and the beginning, with the four endings."""
        beginning = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
        return Question(clean_marks(beginning), tuple(map(clean_marks, record["endings"])), int(record["label"]))

    def published_id(self, record: Mapping[str, Any]) -> str:
        """Return the published number."""
        return str(record.get("ind", ""))

    @staticmethod
    def _accepts(record: Mapping[str, Any]) -> bool:
        endings = record.get("endings")
        return (
            has_texts(record, "activity_label", "ctx_a", "ctx_b")
            and isinstance(endings, list)
            and all(isinstance(ending, str) for ending in endings)
            and "label" in record
        )

    @staticmethod
    def _find_problem(record: Mapping[str, Any]) -> str:
        count, label = len(record["endings"]), record["label"]
        if count < 2:
            return f"'endings' has {count}, and at least 2 are needed"
        if str(label) not in map(str, range(count)):
            return f"'label' is {label!r}, and its endings have the numbers 0 to {count - 1}"
        beginning = f"{record['activity_label']}{record['ctx_a']}{record['ctx_b']}"
        return find_blank_question(beginning, record["endings"])

    file_layout = FileLayout(_accepts, _find_problem, archives="hellaswag")


def clean_marks(text: str) -> str:
    """Return a text without marks in brackets; "[title]" ends a sentence.

    Example:
        >>> clean_marks("How to swim [title] Begin slowly. [step] Breathe.")
        'How to swim. Begin slowly. Breathe.'
    """
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")
