"""The list of tasks for people: what each needs, whether it is in a folder, and in short why one is left out."""

from __future__ import annotations

import re
from pathlib import Path

from kabrn_dist.evaluation.missing import MissingData, MissingSplit
from kabrn_dist.evaluation.task import Task
from kabrn_dist.utils.errors import UserError

_MOST_CHARACTERS = 160


def describe_task(task: Task, data: Path | None = None) -> str:
    """Return what a task asks, the files and options that it needs, and what of it is found.

    Args:
        task: The task.
        data: Where its data is looked for; None: nowhere.
    """
    splits = ", ".join((f"{task.splits[0]} (default)", *task.splits[1:]))
    shots = f"{task.default_shots} few-shot examples of {task.shots_split}" if task.shots_split else "no examples"
    lines = [
        f"{task.name}: {task.description}",
        f"  files: {task.layout}",
        f"  published: {task.published}",
        f"  splits: {splits}; prompts: {shots} by default; main score: {task.main_metric}",
    ]
    if task.runs_code:
        lines.append("  runs code that the model wrote: needs --allow-code")
    if data is not None:
        lines.append(f"  in {data}: {_describe_found(task, data)}")
    return "\n".join(lines)


def describe_reason(task: Task, data: Path, error: UserError) -> str:
    """Return in a short line why a task cannot be scored.

    Args:
        task: The task.
        data: Where its data was looked for.
        error: What was raised.
    """
    if isinstance(error, MissingData):
        reason = error.short
    else:
        reason = str(error).removeprefix(f"{task.name}: ").removeprefix(f"{data}: ")
        # Addresses are what `--list` is for.
        reason = "; ".join(part for part in reason.split("; ") if not re.search("https?://", part))
    return reason if len(reason) <= _MOST_CHARACTERS else f"{reason[: _MOST_CHARACTERS - 1]}…"


def _describe_found(task: Task, data: Path) -> str:
    found, reason = [], ""
    for split in task.splits:
        try:
            if count := len(task.load(data, split)):
                found.append(f"{split} ({count:,} example{'' if count == 1 else 's'})")
        except MissingSplit:
            continue
        except UserError as error:
            if not isinstance(error, MissingData) or not reason:
                reason = describe_reason(task, data, error)
    return ", ".join(found) or reason or "no split found"
