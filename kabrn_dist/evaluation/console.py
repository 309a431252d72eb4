"""An evaluation on the console: a bar while it runs, a line for each task that is complete, and a table at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kabrn_dist.evaluation.results import SUMMARY_NAME, TaskScores
from kabrn_dist.evaluation.results_page import PAGE_NAME, format_score
from kabrn_dist.evaluation.run import AnswerExamples, Evaluation, EvaluationProgress, run_evaluation

# Width of tables in a pipe or a file; a terminal has its own.
_FILE_WIDTH = 120


def show_evaluation(evaluation: Evaluation, answer: AnswerExamples | None = None) -> None:
    """Run an evaluation and show it.

    Args:
        evaluation: What is evaluated.
        answer: As for `run_evaluation`.

    Raises:
        UserError: as `run_evaluation`.
    """
    console = Console(width=None if Console().is_terminal else _FILE_WIDTH, highlight=False, markup=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, disable=not console.is_terminal)
    with progress:
        bars = [progress.add_task(data.task.name, total=len(data.examples)) for data in evaluation.tasks]

        def report(news: EvaluationProgress) -> None:
            progress.update(bars[news.task], completed=news.done)
            if news.scores is not None:
                console.print(_describe_scores(news.scores))

        model, scores = run_evaluation(evaluation, report, answer)
    console.print(make_table(model.name, scores))
    for each in scores:
        for note in each.notes:
            console.print(f"{each.data.task.name}: {note}")
    console.print(f"{evaluation.out / SUMMARY_NAME} has all scores, {evaluation.out / PAGE_NAME} shows answers")


def make_table(model: str, scores: Sequence[TaskScores]) -> Table:
    """Return the table of an evaluation.

    Args:
        model: Name of the model.
        scores: Of its tasks.
    """
    table = Table(title=f"{model}: scores")
    table.add_column("task")
    table.add_column("metric")
    for name in ("score", "± stderr", "examples", "shots", "seconds"):
        table.add_column(name, justify="right")
    for each in scores:
        for number, (metric, score) in enumerate(each.scores.items()):
            stderr = None if math.isnan(score.stderr) else score.stderr
            cells = (each.data.task.name, metric, format_score(score.value), format_score(stderr))
            rest = (f"{len(each.results):,}", str(each.data.settings.shots), f"{each.seconds:,.0f}")
            table.add_row(*cells, *rest) if number == 0 else table.add_row("", *cells[1:])
    return table


def _describe_scores(scores: TaskScores) -> str:
    metric, score = next(iter(scores.scores.items()))
    error = "" if math.isnan(score.stderr) else f" ± {format_score(score.stderr)}"
    return (
        f"{scores.data.task.name}: {metric} {format_score(score.value)}{error}, {len(scores.results):,} "
        f"example{'' if len(scores.results) == 1 else 's'} in {scores.seconds:,.0f} s"
    )
