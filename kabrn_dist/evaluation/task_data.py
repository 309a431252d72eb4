"""The examples of a task that an evaluation asks, read and checked before any model is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kabrn_dist.evaluation.missing import MissingData, MissingSplit
from kabrn_dist.evaluation.requests import GenerateRequest, Request
from kabrn_dist.evaluation.selection import hash_number, order_examples, select_shots
from kabrn_dist.evaluation.settings import SAMPLING_TOP_P, TaskSettings
from kabrn_dist.evaluation.task import Example, Task
from kabrn_dist.utils.errors import UserError


@dataclass(frozen=True)
class TaskData:
    """A task with the examples to be asked.

    Attributes:
        task: The task.
        settings: Of this evaluation.
        examples: To be asked, in the order of the results.
        shots: Examples with their answers for the prompts, ordered; more than are in one.
        order: Ids of all examples of the split, in this order.
        data_sha256: Hash of all examples of the split and of those for prompts.
    """

    task: Task
    settings: TaskSettings
    examples: list[Example]
    shots: list[Example]
    order: list[str]
    data_sha256: str

    def make_requests(self, example: Example, shots: int) -> list[Request]:
        """Return what is asked of a model about an example, with so many few-shot examples before it."""
        settings = self.settings
        requests = self.task.requests(example, select_shots(self.shots, example, shots))
        return [
            replace(
                request,
                num_samples=settings.num_samples,
                temperature=settings.temperature,
                top_p=SAMPLING_TOP_P if settings.temperature else 1.0,
                seed=hash_number(f"{settings.seed}/{settings.name}/{example.id}/{number}"),
            )
            if isinstance(request, GenerateRequest)
            else request
            for number, request in enumerate(requests)
        ]


def load_task_data(task: Task, settings: TaskSettings) -> TaskData:
    """Read the examples of a task.

    Args:
        task: The task.
        settings: Where they are, and which of them are asked.

    Raises:
        UserError: for files that are missing or damaged, an unknown or empty split, or more few-shot examples than
            there are.
    """
    if settings.split not in task.splits:
        raise UserError(f"{task.name}: has no split {settings.split!r}; its splits are {', '.join(task.splits)}")
    everything = task.load(settings.data, settings.split)
    if not everything:
        raise UserError(
            f"{task.name}: the split {settings.split} of {settings.data} holds no examples; {task.name} is published "
            f"at {task.published}, and this is expected: {task.layout}"
        )
    ordered = order_examples(everything, settings.seed)
    if len({example.id for example in ordered}) < len(ordered):
        raise UserError(f"{task.name}: two examples of {settings.data} have one id; remove duplicates from the files")
    shots = _load_shots(task, settings, everything)
    return TaskData(
        task=task,
        settings=settings,
        examples=ordered[: settings.limit] if settings.limit else ordered,
        shots=shots,
        order=[example.id for example in ordered],
        data_sha256=_hash_examples([everything, shots]),
    )


def _load_shots(task: Task, settings: TaskSettings, asked: list[Example]) -> list[Example]:
    count = settings.shots
    if not count:
        return []
    if not task.shots_split:
        raise UserError(f"{task.name}: has no few-shot examples; use --shots 0 for it")
    try:
        pool = asked if task.shots_split == settings.split else task.load(settings.data, task.shots_split)
    except MissingSplit as error:
        state = f"cannot be used in {settings.data}: {error.unusable}" if error.unusable else f"{settings.data} lacks"
        remedy = "get its files again" if error.unusable else "add its files"
        raise MissingData(
            f"{task.name}: few-shot examples come from the split {task.shots_split}, which {state} (it has "
            f"{', '.join(error.found)}); {remedy} (published at {task.published}), or use --shots {task.name}=0",
            f"no split {task.shots_split} found, of which few-shot examples are; use --shots {task.name}=0",
        ) from error
    # One more than are shown: the one to be answered may be among them.
    needed = count + (task.shots_split == settings.split)
    if len(pool) < needed:
        raise UserError(
            f"{task.name}: {count} few-shot examples are asked for, and the split {task.shots_split} of "
            f"{settings.data} holds {len(pool)}; add some, or use --shots {max(0, len(pool) - needed + count)}"
        )
    return order_examples(pool, settings.seed)[:needed]


def _hash_examples(splits: Sequence[Sequence[Example]]) -> str:
    digest = hashlib.sha256()
    for examples in splits:
        for example in examples:
            fields: Mapping[str, object] = example.record
            digest.update(json.dumps([example.id, dict(fields)], sort_keys=True, default=repr).encode())
        digest.update(b"\0")
    return digest.hexdigest()
