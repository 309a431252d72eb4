"""One worker of an evaluation in several processes: `python -m kabrn_dist.evaluation.worker`, started by `workers`."""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

from kabrn_dist.evaluation.answering import answer_examples
from kabrn_dist.evaluation.load import load_evaluated_model
from kabrn_dist.evaluation.registry import TASKS
from kabrn_dist.evaluation.task_data import TaskData, load_task_data
from kabrn_dist.evaluation.workers import Answered, Events, ModelChoice, ModelInfo, WorkerJob
from kabrn_dist.utils.errors import UserError

EXIT_ORPHANED = 3


def main() -> int:
    """Do the job that is on stdin; return the exit code."""
    # Whatever else prints must not come between the messages.
    messages = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        messages.write(json.dumps(message).encode() + b"\n")
        messages.flush()

    job = WorkerJob.from_json(json.loads(sys.stdin.buffer.readline()))
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        data = [load_task_data(TASKS[task.name](), task) for task in job.tasks]
        for event in answer_here(job.model, data, job.ids):
            if isinstance(event, ModelInfo):
                send({"model": list(event)})
            else:
                send({"task": event.task, "result": event.result.to_json()})
    except UserError as error:
        send({"error": str(error)})
        return 2
    send({"done": True})
    return 0


def answer_here(choice: ModelChoice, tasks: list[TaskData], ids: list[list[str]]) -> Events:
    """Load a model in this process and yield it, then the result of each example.

    Args:
        choice: The model.
        tasks: Examples of each task.
        ids: Ids of those that are asked, for each task.

    Raises:
        UserError: for a model that cannot be loaded, or whose outputs are not finite.
    """
    model = load_evaluated_model(choice.path, choice.device, choice.batch_size, choice.step)
    yield ModelInfo(model.name, model.fingerprint)
    for number, (data, chosen) in enumerate(zip(tasks, ids, strict=True)):
        wanted = set(chosen)
        examples = [example for example in data.examples if example.id in wanted]
        for result in answer_examples(model, data, examples):
            yield Answered(number, result)


def _exit_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(EXIT_ORPHANED)


if __name__ == "__main__":
    sys.exit(main())
