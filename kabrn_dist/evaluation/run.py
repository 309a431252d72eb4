"""An evaluation from start to end: earlier results, the examples that are missing, scores, files, and a page."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import kabrn_dist
from kabrn_dist.evaluation.result_file import ResultFile
from kabrn_dist.evaluation.results import TaskScores, summarize_task, summary_json, write_summary
from kabrn_dist.evaluation.results_page import PAGE_NAME, read_samples, render_results_page
from kabrn_dist.evaluation.task_data import TaskData
from kabrn_dist.evaluation.workers import Answered, Events, ModelChoice, ModelInfo, WorkerJob, run_workers
from kabrn_dist.utils.atomic_io import atomic_write, make_folder

AnswerExamples = Callable[[ModelChoice, list[TaskData], list[list[str]]], Events]


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated.

    Attributes:
        model: The model.
        tasks: The tasks, with their examples.
        out: Folder of the results.
        processes: Number of processes that share the work.
    """

    model: ModelChoice
    tasks: list[TaskData]
    out: Path
    processes: int = 1


class EvaluationProgress(NamedTuple):
    """How far an evaluation has come.

    Attributes:
        task: Number of the task.
        done: Examples that have results.
        scores: Of a task whose examples all have results; None before.
        earlier: Examples whose results were in the folder before.
        tokens: That the model has written, or scored, for the others.
    """

    task: int
    done: int
    scores: TaskScores | None = None
    earlier: int = 0
    tokens: int = 0


def run_evaluation(
    evaluation: Evaluation, report: Callable[[EvaluationProgress], None], answer: AnswerExamples | None = None
) -> tuple[ModelInfo, list[TaskScores]]:
    """Evaluate a model, going on from results that are in the folder.

    Args:
        evaluation: What is evaluated.
        report: Told of every example that has a result, and of every task that is complete.
        answer: Answers examples in this process; None loads the model of `evaluation`.

    Returns:
        The model, and the scores of each task.

    Raises:
        UserError: for results of something else in the folder, a model that cannot be used, a worker that has died,
            or a disk that refuses. What was answered is kept.
    """
    make_folder(evaluation.out)
    with ExitStack() as stack:
        files = [stack.enter_context(open_results(evaluation.out, data)) for data in evaluation.tasks]
        session = _Session(evaluation.tasks, files, report)
        events = stack.enter_context(closing(_answer_missing(evaluation, session.missing, answer)))
        try:
            for event in events:
                session.handle(event)
        finally:
            for file in files:
                file.sync()
        assert session.model is not None
        model, scores = session.model, [each for each in session.scores if each is not None]
    summary = write_summary(evaluation.out, summary_json(model, evaluation.model.path, scores))
    samples = {
        task: read_samples(evaluation.out / f"{task}.jsonl", summary["tasks"][task]) for task in summary["tasks"]
    }
    # Texts may hold halves of surrogate pairs, which UTF-8 does not have.
    atomic_write(evaluation.out / PAGE_NAME, render_results_page(summary, samples).encode(errors="replace"))
    return model, scores


def open_results(out: Path, data: TaskData) -> ResultFile:
    """Open the file of a task's results.

    Args:
        out: Folder of the results.
        data: The task.

    Raises:
        UserError: if it holds results of other settings or of other data.
    """
    header = {
        "task": data.task.name,
        "package": kabrn_dist.__version__,
        "settings": data.settings.fixed(),
        "data_sha256": data.data_sha256,
        "data": str(data.settings.data),
    }
    return ResultFile(out / f"{data.task.name}.jsonl", header)


class _Session:
    """Files what comes in, and completes each task whose last result this is."""

    def __init__(
        self, tasks: Sequence[TaskData], files: Sequence[ResultFile], report: Callable[[EvaluationProgress], None]
    ) -> None:
        self.tasks, self.files, self.report = tasks, files, report
        self.model: ModelInfo | None = None
        self.scores: list[TaskScores | None] = [None for _ in tasks]
        self.missing = [
            [example.id for example in data.examples if example.id not in file.results]
            for data, file in zip(tasks, files, strict=True)
        ]
        self._to_come = [len(ids) for ids in self.missing]
        self._tokens = [0 for _ in tasks]
        self._start = time.monotonic()

    def handle(self, event: ModelInfo | Answered) -> None:
        if isinstance(event, ModelInfo):
            self.model = event
            for file in self.files:
                file.begin(event._asdict())
            # Results of an earlier session may be all there are to be.
            for number, count in enumerate(self._to_come):
                self._report(number)
                if not count:
                    self._complete(number)
            return
        self.files[event.task].append(event.result)
        self._to_come[event.task] -= 1
        self._tokens[event.task] += event.result.count_tokens()
        self._report(event.task)
        if not self._to_come[event.task]:
            self._complete(event.task)

    def _report(self, number: int, scores: TaskScores | None = None) -> None:
        count = len(self.tasks[number].examples)
        done, earlier = count - self._to_come[number], count - len(self.missing[number])
        self.report(EvaluationProgress(number, done, scores, earlier, self._tokens[number]))

    def _complete(self, number: int) -> None:
        data, file, now = self.tasks[number], self.files[number], time.monotonic()
        file.finish(data.order)
        results = [file.results[example.id] for example in data.examples]
        scores = summarize_task(data, results, now - self._start if self.missing[number] else 0.0)
        self.scores[number], self._start = scores, now
        self._report(number, scores)


def _answer_missing(evaluation: Evaluation, missing: list[list[str]], answer: AnswerExamples | None) -> Events:
    """Answer in this process, or share the examples evenly among workers."""
    processes = min(evaluation.processes, max(1, sum(map(len, missing))))
    if processes > 1:
        settings = [data.settings for data in evaluation.tasks]
        return run_workers(
            [
                WorkerJob(evaluation.model, settings, [ids[number::processes] for ids in missing])
                for number in range(processes)
            ]
        )
    if answer is None:
        # The model's packages take a while to import.
        from kabrn_dist.evaluation.worker import answer_here

        answer = answer_here
    return answer(evaluation.model, evaluation.tasks, missing)


def share_threads(processes: int) -> int:
    """Return how many threads each of several processes gets of the cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes)
