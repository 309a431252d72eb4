"""Processes that share the examples of an evaluation, each with a model and a part of the cores.

A worker gets its job as JSON on stdin, which stays open: its end tells the worker that nobody waits for it any more.
It writes JSON lines: the model, then results as they come, then that it is done.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from kabrn_dist.evaluation.answering import ExampleResult
from kabrn_dist.evaluation.settings import TaskSettings
from kabrn_dist.utils.errors import UserError

WORKER_MODULE = "kabrn_dist.evaluation.worker"
_EXIT_TIMEOUT_S = 10.0
# (number of the worker, what it says); None at its end.
_Messages: TypeAlias = "queue.Queue[tuple[int, dict[str, Any] | None]]"


@dataclass(frozen=True)
class ModelChoice:
    """Which model is evaluated, and how it computes.

    Attributes:
        path: Folder of a run or an export, or a model file.
        device: Such as "cpu".
        batch_size: Sequences that are decoded at once.
        threads: Of each of several processes; 0 leaves what is set.
        step: Checkpoint of a run; None for the newest intact one.
    """

    path: Path
    device: str = "cpu"
    batch_size: int = 32
    threads: int = 0
    step: int | None = None


class ModelInfo(NamedTuple):
    """A model that was loaded.

    Attributes:
        name: For tables.
        fingerprint: Of weights and tokenizer.
    """

    name: str
    fingerprint: str


class Answered(NamedTuple):
    """An example that was answered.

    Attributes:
        task: Number of the task.
        result: Of the example.
    """

    task: int
    result: ExampleResult


# The model first, then results in any order.
Events: TypeAlias = Generator[ModelInfo | Answered, None, None]


class WorkerJob(NamedTuple):
    """What a worker does.

    Attributes:
        model: To be asked.
        tasks: Settings of each task.
        ids: Ids of the examples to be asked, for each task.
    """

    model: ModelChoice
    tasks: list[TaskSettings]
    ids: list[list[str]]

    def to_json(self) -> dict[str, Any]:
        """Return the job as JSON has it."""
        model = {**asdict(self.model), "path": str(self.model.path)}
        return {"model": model, "tasks": [task.to_json() for task in self.tasks], "ids": self.ids}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> WorkerJob:
        """Return the job that `to_json` returned."""
        model = ModelChoice(**{**values["model"], "path": Path(values["model"]["path"])})
        return cls(model, [TaskSettings.from_json(task) for task in values["tasks"]], values["ids"])


def run_workers(jobs: Sequence[WorkerJob]) -> Events:
    """Run a worker for each job, and yield what they say: the model first, then results in any order.

    Args:
        jobs: One for each worker.

    Raises:
        UserError: what a worker has found wrong, or that one has died; the others are ended.
    """
    messages: _Messages = queue.Queue()
    workers = [_start_worker(job) for job in jobs]
    try:
        for number, (worker, job) in enumerate(zip(workers, jobs, strict=True)):
            threading.Thread(target=_talk, args=(number, worker, job, messages), daemon=True).start()
        yield from _receive(workers, messages)
    finally:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.wait(_EXIT_TIMEOUT_S)


def _start_worker(job: WorkerJob) -> subprocess.Popen[bytes]:
    roots = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = {"OMP_NUM_THREADS": str(job.model.threads)} if job.model.threads else {}
    # A session of its own: Ctrl-C is for the process that collects the results.
    return subprocess.Popen(
        [sys.executable, "-m", WORKER_MODULE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(roots)},
        start_new_session=True,
    )


def _talk(number: int, worker: subprocess.Popen[bytes], job: WorkerJob, messages: _Messages) -> None:
    assert worker.stdin is not None and worker.stdout is not None
    # Why a worker has died is told where its output ends.
    with contextlib.suppress(BrokenPipeError):
        worker.stdin.write(json.dumps(job.to_json()).encode() + b"\n")
        worker.stdin.flush()
    for line in worker.stdout:
        # A worker that is killed may leave half a line.
        if line.endswith(b"\n"):
            messages.put((number, json.loads(line)))
    messages.put((number, None))


def _receive(workers: Sequence[subprocess.Popen[bytes]], messages: _Messages) -> Events:
    model: ModelInfo | None = None
    running = set(range(len(workers)))
    while running:
        number, message = messages.get()
        if message is None:
            if number not in running:
                continue
            raise UserError(_describe_death(number, workers[number].wait(_EXIT_TIMEOUT_S)))
        if "error" in message:
            raise UserError(message["error"])
        if "model" in message:
            found = ModelInfo(*message["model"])
            if model is not None and model != found:
                raise UserError(
                    f"{found.name}: was changed while it was loaded; evaluate again when training has ended"
                )
            if model is None:
                model = found
                yield found
        elif "result" in message:
            yield Answered(message["task"], ExampleResult.from_json(message["result"]))
        else:
            running.discard(number)


def _describe_death(number: int, code: int) -> str:
    cause = f"ended with exit code {code}"
    if code < 0:
        name = signal.Signals(-code).name if -code in {each.value for each in signal.Signals} else str(-code)
        memory = "; if memory ran out, lower --processes or --batch-size" if -code == signal.SIGKILL else ""
        cause = f"was killed by {name}{memory}"
    return f"worker {number + 1} {cause}; what was answered is kept, and the same command goes on"
