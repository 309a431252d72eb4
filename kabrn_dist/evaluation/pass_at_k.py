"""Probability that one of k programs passes, estimated from n (Chen et al. 2021, arXiv 2107.03374)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

# The k that are reported, where there are as many samples.
_REPORTED = (1, 10, 100)


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Return the unbiased estimate of pass@k: 1 − C(n − c, k) / C(n, k).

    Args:
        samples: n, programs that were run.
        passed: c, those that passed.
        k: Programs of which one has to pass, at most n.

    Raises:
        ValueError: if c or k do not fit n.

    Example:
        >>> pass_at_k(10, 3, 1)
        0.3
    """
    if not (0 <= passed <= samples and 1 <= k <= samples):
        raise ValueError(f"pass@{k} of {passed} in {samples} programs")
    # Whole numbers of any size: exact until the division.
    total = math.comb(samples, k)
    return (total - math.comb(samples - passed, k)) / total


def pass_at_k_naive(passed: Sequence[bool], k: int) -> float:
    """Return the fraction of all choices of k programs in which one passed: the reference for `pass_at_k`."""
    choices = list(itertools.combinations(passed, k))
    return sum(any(choice) for choice in choices) / len(choices)


def pass_metrics(passed: Sequence[bool]) -> dict[str, float]:
    """Return "pass@k" → its estimate for one problem, for k = 1, 10, 100 up to the number of programs.

    Args:
        passed: Whether each program passed.
    """
    samples, count = len(passed), sum(passed)
    return {f"pass@{k}": pass_at_k(samples, count, k) for k in _REPORTED if k <= samples}
