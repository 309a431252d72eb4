"""Standard errors of scores: how far a score would move if other examples had been asked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kabrn_dist.evaluation.task import Task

# Blocks that are left out one by one where a score is no mean.
JACKKNIFE_BLOCKS = 100
# Of a normal distribution, 95 % lie within so many standard deviations.
_DEVIATIONS_95 = 1.959964


class ScoreEstimate(NamedTuple):
    """A score with its uncertainty.

    Attributes:
        value: The score.
        stderr: Its standard error; not a number of fewer than two examples.
        limit: Of answers that are all wrong, or all right, how far the score may yet be from 0, or 1, with 95 %
            confidence: the standard error, 0, does not say it. Not a number of others.
    """

    value: float
    stderr: float
    limit: float = math.nan


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


def limit_of_equal_answers(values: Sequence[float]) -> float:
    """Return the far end of the 95 % interval of a share whose examples are all right, or all wrong.

    The interval is that of Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", Journal of
    the American Statistical Association 22, 1927: of 0 right answers to n questions it ends at z²/(n + z²).

    >>> round(limit_of_equal_answers([0] * 60), 4), round(limit_of_equal_answers([1] * 60), 4)
    (0.0602, 0.9398)

    Args:
        values: One score for each example.

    Returns:
        The limit; not a number for fewer than two values, and for those that are not all 0 or all 1.
    """
    if len(values) < 2 or values[0] not in (0, 1) or any(value != values[0] for value in values):
        return math.nan
    distance = _DEVIATIONS_95**2 / (len(values) + _DEVIATIONS_95**2)
    return 1 - distance if values[0] else distance


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
    limits = {
        name: limit_of_equal_answers([each.get(name, math.nan) for each in scores])
        for name, value in values.items()
        if value in (0, 1)
    }
    return {name: ScoreEstimate(value, errors[name], limits.get(name, math.nan)) for name, value in values.items()}


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
