"""Scores of tasks during training: `validation.tasks`, with the values of `mixkabrn eval` on the same weights."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

from kabrn_dist.backend.engine import Engine
from kabrn_dist.config import Config
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.distributed.collectives import run_on_all
from kabrn_dist.evaluation.answering import AskedExample, collect_answers, score_answers
from kabrn_dist.evaluation.registry import TASKS
from kabrn_dist.evaluation.requests import Answer, TextRequest
from kabrn_dist.evaluation.results_page import format_score
from kabrn_dist.evaluation.settings import TaskSettings
from kabrn_dist.evaluation.task_data import TaskData, load_task_data
from kabrn_dist.train.task_model import CollectiveModel, ScoringStopped
from kabrn_dist.utils.errors import UserError


def open_tasks(config: Config) -> list[TaskData]:
    """Read the examples of `validation.tasks`, before anything of a run begins.

    Args:
        config: The whole configuration.

    Raises:
        UserError: for a task that is unknown, runs code, reads whole documents, or has no data.
    """
    validation = config.validation
    found = []
    for name in dict.fromkeys(validation.tasks):
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.5)
            remedy = f"did you mean {near[0]}?" if near else f"use some of {', '.join(TASKS)}"
            raise UserError(f"validation.tasks: {name!r} is no task; {remedy}")
        task = TASKS[name]()
        if task.runs_code:
            raise UserError(
                f"validation.tasks: {name} runs programs that the model wrote, which a training run does not; remove "
                "it, and score it with: mixkabrn eval --allow-code"
            )
        assert validation.task_data is not None
        settings = TaskSettings(
            name=name,
            data=validation.task_data,
            split=task.splits[0],
            shots=task.default_shots,
            limit=validation.task_examples,
        )
        try:
            data = load_task_data(task, settings)
        except UserError as error:
            # There is no such option here.
            message = str(error).replace("--data", "validation.task_data")
            raise UserError(f"validation.tasks: {message}") from error
        if any(isinstance(request, TextRequest) for request in data.make_requests(data.examples[0], settings.shots)):
            raise UserError(
                f"validation.tasks: {name} reads documents of any length, for which training has no memory; remove it: "
                "the validation split gives bits per byte"
            )
        found.append(data)
    return found


def score_tasks(
    engine: Engine, tokenizer: Tokenizer, tasks: Sequence[TaskData], is_interrupted: Callable[[], bool]
) -> dict[str, float] | None:
    """Score tasks with the model in training. Collective.

    Args:
        engine: The model.
        tokenizer: Of its data.
        tasks: As `open_tasks` returns them, the same on all ranks.
        is_interrupted: Called before each forward pass; collective, the same on all ranks. True stops the scoring.

    Returns:
        Scores by their names in the log, on the first rank; nothing on the others. None on all ranks if it was stopped.

    Raises:
        UserError: on all ranks, if the model's outputs are not finite.
    """
    model = CollectiveModel(engine, tokenizer, is_interrupted)
    values: dict[str, float] = {}
    for data in tasks:
        try:
            answers = list(collect_answers(model, data, data.examples))
        except ScoringStopped:
            return None
        # Answers are the same on all ranks; scoring may start processes, of which one machine needs no more.
        values |= run_on_all(None, _score_task if engine.mesh.is_main else _leave_out, data, answers)
    return values


def describe_task_scores(values: dict[str, float], tasks: Sequence[TaskData]) -> str:
    """Return the scores, and of how many examples they are, as text for the console.

    Args:
        values: As `score_tasks` returns them.
        tasks: Those that were scored.
    """
    parts = []
    for data in tasks:
        start = f"tasks/{data.task.name}/"
        scores = [
            f"{name.removeprefix(start)} {format_score(value)}"
            for name, value in values.items()
            if name.startswith(start)
        ]
        parts.append(f"{data.task.name} ({len(data.examples)} examples): {', '.join(scores)}")
    return "; ".join(parts)


def _score_task(data: TaskData, answers: list[tuple[AskedExample, list[Answer]]]) -> dict[str, float]:
    results = {asked.example.id: score_answers(data, asked, each) for asked, each in answers}
    ordered = [results[example.id].scores for example in data.examples]
    scores = data.task.combine(ordered)
    return {f"tasks/{data.task.name}/{metric}": value for metric, value in scores.items()}


def _leave_out(data: TaskData, answers: list[tuple[AskedExample, list[Answer]]]) -> dict[str, float]:
    return {}
