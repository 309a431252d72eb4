"""Standard errors of scores: how far a score would move if other examples had been asked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kabrn_dist.evaluation.task import Task

# Blocks that are left out one by one where a score is no mean.
JACKKNIFE_BLOCKS = 100


class ScoreEstimate(NamedTuple):
    """A score with its uncertainty.

    Attributes:
        value: The score.
        stderr: Its standard error; not a number of fewer than two examples.
    """

    value: float
    stderr: float


def standard_error_of_mean(values: Sequence[float]) -> float:
    """Return the standard error of a mean.

    Of right and wrong answers it is √(p·(1 − p)/n), of other values their sample standard deviation over √n.

    >>> round(standard_error_of_mean([1, 0, 0, 0]), 4), standard_error_of_mean([1.0, 3.0])
    (0.2165, 1.0)

    Args:
        values: One score for each example.

    Returns:
        The standard error; not a number for fewer than two values.
    """
    count = len(values)
    if count < 2:
        return math.nan
    mean = math.fsum(values) / count
    if all(value in (0, 1) for value in values):
        return math.sqrt(mean * (1 - mean) / count)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


def estimate_scores(task: Task, scores: Sequence[Mapping[str, float]]) -> dict[str, ScoreEstimate]:
    """Return metric → score and standard error of a task.

    Where a task combines its scores into more than means, such as a quotient of sums, the error is that of the
    delete-a-block jackknife (Efron, "Bootstrap Methods: Another Look at the Jackknife", Annals of Statistics 7, 1979).

    Args:
        task: The task.
        scores: Of its examples.
    """
    if not scores:
        return {}
    values = task.combine(scores)
    if type(task).combine is Task.combine:
        errors = {name: standard_error_of_mean([each[name] for each in scores]) for name in values}
    else:
        errors = _jackknife(task, scores, values)
    return {name: ScoreEstimate(value, errors[name]) for name, value in values.items()}


def _jackknife(task: Task, scores: Sequence[Mapping[str, float]], values: Mapping[str, float]) -> dict[str, float]:
    blocks = min(len(scores), JACKKNIFE_BLOCKS)
    if blocks < 2:
        return dict.fromkeys(values, math.nan)
    others = [
        task.combine([each for number, each in enumerate(scores) if number % blocks != left_out])
        for left_out in range(blocks)
    ]
    return {name: _jackknife_error([other[name] for other in others if name in other]) for name in values}


def _jackknife_error(values: Sequence[float]) -> float:
    count = len(values)
    if count < 2:
        return math.nan
    mean = math.fsum(values) / count
    return math.sqrt((count - 1) / count * math.fsum((value - mean) ** 2 for value in values))
