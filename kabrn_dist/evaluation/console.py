"""An evaluation on the console: a bar while it runs, a line for each task that is complete, and a table at the end."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table

from kabrn_dist.evaluation.progress import ProgressDisplay
from kabrn_dist.evaluation.results import SUMMARY_NAME, TaskScores
from kabrn_dist.evaluation.results_page import (
    PAGE_NAME,
    describe_limit,
    format_metric,
    format_score,
    is_lower_better,
)
from kabrn_dist.evaluation.run import AnswerExamples, Evaluation, EvaluationProgress, run_evaluation
from kabrn_dist.evaluation.statistics import ScoreEstimate

# Width of tables in a pipe or a file; a terminal has its own.
_FILE_WIDTH = 120


def show_evaluation(evaluation: Evaluation, answer: AnswerExamples | None = None) -> None:
    """Run an evaluation and show it. SIGTERM ends it as Ctrl-C does.

    Args:
        evaluation: What is evaluated.
        answer: As for `run_evaluation`.

    Raises:
        UserError: as `run_evaluation`.
        KeyboardInterrupt: after Ctrl-C and SIGTERM, when it was told what is kept.
    """
    console = Console(width=None if Console().is_terminal else _FILE_WIDTH, highlight=False, markup=False)
    display = ProgressDisplay(console, str(evaluation.model.path), evaluation.tasks)

    def report(news: EvaluationProgress) -> None:
        display.update(news)
        if news.scores is not None:
            console.print(_describe_scores(news.scores))

    try:
        with _interrupted_by_sigterm(), display:
            model, scores = run_evaluation(evaluation, report, answer)
    except KeyboardInterrupt:
        kept = display.describe_kept() or "no example has a result yet"
        console.print(f"kept in {evaluation.out}: {kept}; the same command goes on", soft_wrap=True)
        raise
    console.print(make_table(model.name, scores))
    if any(is_lower_better(metric) for each in scores for metric in each.scores):
        console.print("↓ lower is better")
    for each in scores:
        for note in each.notes:
            console.print(f"{each.data.task.name}: {note}")
    console.print(f"all scores: {evaluation.out / SUMMARY_NAME}", soft_wrap=True)
    console.print(f"answers, right and wrong: {evaluation.out / PAGE_NAME}", soft_wrap=True)


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    # Only the main thread may say what a signal does.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def make_table(model: str, scores: Sequence[TaskScores]) -> Table:
    """Return the table of an evaluation.

    Args:
        model: Name of the model.
        scores: Of its tasks.
    """
    table = Table(title=f"{model}: scores")
    table.add_column("task")
    table.add_column("metric")
    for name in ("score", "± stderr", "examples", "shots", "time"):
        table.add_column(name, justify="right")
    for each in scores:
        for number, (metric, score) in enumerate(each.scores.items()):
            cells = (each.data.task.name, format_metric(metric), format_score(score.value), _describe_error(score))
            rest = (f"{len(each.results):,}", str(each.data.settings.shots), f"{each.seconds:,.0f} s")
            table.add_row(*cells, *rest) if number == 0 else table.add_row("", *cells[1:])
    return table


def _describe_scores(scores: TaskScores) -> str:
    metric, score = next(iter(scores.scores.items()))
    error = "" if math.isnan(score.stderr) else f" ± {_describe_error(score)}"
    if not math.isnan(score.limit):
        error = f" ({_describe_error(score)} with 95 % confidence)"
    return (
        f"{scores.data.task.name}: {metric} {format_score(score.value)}{error}, {len(scores.results):,} "
        f"example{'' if len(scores.results) == 1 else 's'} in {scores.seconds:,.0f} s"
    )


def _describe_error(score: ScoreEstimate) -> str:
    """The standard error, or, of a score that has none to speak of, its limit."""
    if not math.isnan(score.limit):
        return describe_limit(score.limit, score.value)
    return format_score(None if math.isnan(score.stderr) else score.stderr)
