"""ARC: science questions of grade-school exams (Clark et al. 2018, arXiv:1803.05457; CC BY-SA 4.0)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kabrn_dist.evaluation.files import find_files, require_one
from kabrn_dist.evaluation.missing import shown_name
from kabrn_dist.evaluation.records import FileLayout
from kabrn_dist.evaluation.task import Example
from kabrn_dist.evaluation.tasks.multiple_choice import MultipleChoice, Question, find_blank_question
from kabrn_dist.utils.errors import UserError


def is_stem_with_choices(record: Mapping[str, Any]) -> bool:
    """Return whether a record has `question.stem`, `question.choices` of text and label, and `answerKey`."""
    question = record.get("question")
    choices = question.get("choices") if isinstance(question, Mapping) else None
    if not isinstance(choices, list) or not isinstance(question, Mapping):
        return False
    if not all(isinstance(choice, Mapping) and isinstance(choice.get("text"), str) for choice in choices):
        return False
    return isinstance(question.get("stem"), str) and "answerKey" in record


def find_choice_problem(record: Mapping[str, Any]) -> str:
    """Return why the right choice of a record that `is_stem_with_choices` cannot be told; "" if it can."""
    choices, key = record["question"]["choices"], str(record["answerKey"])
    labels = [str(choice.get("label")) for choice in choices]
    if len(choices) < 2:
        return f"'choices' has {len(choices)}, and at least 2 are needed"
    if labels.count(key) != 1:
        return f"'answerKey' is {key!r}, which is the label of {labels.count(key) or 'none'} of its choices"
    return find_blank_question(record["question"]["stem"], [choice["text"] for choice in choices])


def read_choices(record: Mapping[str, Any], context: str) -> Question:
    """Return the question of a record that `is_stem_with_choices`."""
    choices = record["question"]["choices"]
    labels = [str(choice["label"]) for choice in choices]
    return Question(context, tuple(choice["text"] for choice in choices), labels.index(str(record["answerKey"])))


class Arc(MultipleChoice):
    """Questions of both sets, with the set as a group."""

    name = "arc"
    description = "science questions of school exams, easy and challenge sets; the likeliest choice is right"
    published = "https://allenai.org/data/arc (ARC-V1-Feb2018.zip)"
    layout = "ARC-Easy-{Train,Dev,Test}.jsonl and ARC-Challenge-{Train,Dev,Test}.jsonl, in folders or the archive"
    splits = ("test", "validation", "train")
    file_layout = FileLayout(
        is_stem_with_choices,
        find_choice_problem,
        r"(^|/)ARC-(Easy|Challenge)-\w+\.jsonl",
        r"(^|/)ARC[^/]*$",
        has_several=True,
    )
    sets: tuple[str, ...] = ("easy", "challenge")

    def load(self, path: Path, split: str) -> list[Example]:
        """Read the questions of a split, the easy ones first.

        Raises:
            UserError: if they are not there, or damaged.
        """
        files = find_files(self, path, split, self.file_layout)
        examples: list[Example] = []
        for name in self.sets:
            own = [file for file in files if f"arc-{name}-" in file.name.rpartition("/")[2].lower()]
            if not own:
                found = ", ".join(shown_name(file.name, path) for file in files)
                raise UserError(
                    f"{path}: no {name} set of split {split} there, which task {self.name} needs; found {found}; give "
                    f"--data a folder that has it, or use --tasks arc_{'easy' if name == 'challenge' else 'challenge'}"
                )
            read = self.make_examples(require_one(self, path, split, own).records, split, set=name)
            examples += [replace(example, id=f"{name}/{example.id}") for example in read]
        return examples

    def published_id(self, record: Mapping[str, Any]) -> str:
        """Return the published id."""
        return str(record.get("id", ""))

    def question(self, record: Mapping[str, Any]) -> Question:
        """Return the question as lm-eval asks it."""
        return read_choices(record, f"Question: {record['question']['stem']}\nAnswer:")


class ArcEasy(Arc):
    """Questions of the easy set."""

    name = "arc_easy"
    description = "science questions of school exams, the easy set; the likeliest choice is right"
    file_layout = replace(Arc.file_layout, pattern=r"(^|/)ARC-Easy-\w+\.jsonl")
    sets = ("easy",)


class ArcChallenge(Arc):
    """Questions of the challenge set."""

    name = "arc_challenge"
    description = "science questions of school exams, the set that is hard for retrieval; the likeliest choice is right"
    file_layout = replace(Arc.file_layout, pattern=r"(^|/)ARC-Challenge-\w+\.jsonl")
    sets = ("challenge",)
