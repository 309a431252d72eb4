"""PIQA: which of two ways reaches a goal in the physical world (Bisk et al. 2020, arXiv:1911.11641; AFL 3.0)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kabrn_dist.evaluation.files import find_files, require_one
from kabrn_dist.evaluation.missing import shown_name
from kabrn_dist.evaluation.records import DataFile, FileLayout, has_texts
from kabrn_dist.evaluation.task import Example
from kabrn_dist.evaluation.tasks.multiple_choice import MultipleChoice, Question, find_blank_question
from kabrn_dist.utils.errors import UserError


class Piqa(MultipleChoice):
    """Goals of PIQA, with two solutions each; the labels are in a file of their own."""

    name = "piqa"
    description = "ways to reach a goal in the physical world; the likelier of two is right"
    published = "https://yonatanbisk.com/piqa/data (train and valid, .jsonl and -labels.lst)"
    layout = "train.jsonl with train-labels.lst, valid.jsonl (or dev.jsonl) with its -labels.lst"
    splits = ("validation", "train")

    def load(self, path: Path, split: str) -> list[Example]:
        """Read the goals of a split and their labels.

        Raises:
            UserError: if they are not there, damaged, or not equally many.
        """
        folder = path.parent if path.is_file() and path.name.lower().endswith(".jsonl") else path
        files = find_files(self, folder, split, self.file_layout)
        goals = [file for file in files if "goal" in file.records[0]]
        if folder != path:
            goals = [file for file in goals if file.name.rpartition("/")[2] == path.name]
        labels = {file.name.partition("-labels.")[0]: file for file in files if "goal" not in file.records[0]}
        if not goals:
            raise UserError(f"{path}: labels of split {split} are there, but no goals; expected {self.layout}")
        goal = require_one(self, path, split, goals)
        return self.make_examples(self._add_labels(goal, labels, path), split)

    def _add_labels(self, goals: DataFile, labels: Mapping[str, DataFile], path: Path) -> list[dict[str, Any]]:
        if all(str(record.get("label")) in ("0", "1") for record in goals.records):
            return goals.records
        name = goals.name.partition(".jsonl")[0]
        if name not in labels:
            raise UserError(
                f"{path}: {shown_name(name, path)}-labels.lst is missing, without which nothing can be scored; add it"
            )
        found = labels[name].records
        if len(found) != len(goals.records):
            raise UserError(
                f"{path}: {len(goals.records)} goals in {shown_name(goals.name, path)} but {len(found)} labels in "
                f"{shown_name(labels[name].name, path)}; get both again: {self.published}"
            )
        return [{**record, **label} for record, label in zip(goals.records, found, strict=True)]

    def question(self, record: Mapping[str, Any]) -> Question:
        """Return the goal as lm-eval asks it."""
        context = f"Question: {record['goal']}\nAnswer:"
        return Question(context, (record["sol1"], record["sol2"]), int(record["label"]))

    @staticmethod
    def _accepts(record: Mapping[str, Any]) -> bool:
        return has_texts(record, "goal", "sol1", "sol2") or record.keys() == {"label"}

    @staticmethod
    def _find_problem(record: Mapping[str, Any]) -> str:
        if "goal" in record:
            return find_blank_question(record["goal"], (record["sol1"], record["sol2"]))
        return "" if record["label"] in ("0", "1") else f"its label is {record['label']!r}, not 0 or 1"

    file_layout = FileLayout(
        _accepts, _find_problem, archives="piqa|physicaliqa", endings=(".jsonl", ".lst"), has_several=True
    )
