"""What learning one domain after another leaves of each: the matrix, and its averages.

Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", arXiv 1706.08840, section 2: R[i, j] is the
accuracy on domain j, in tokens, after domain i has been learned; with D domains

    average accuracy   ACC = Σ_j R[D, j] / D
    backward transfer  BWT = Σ_{j < D} (R[D, j] − R[j, j]) / (D − 1), negative where domains are forgotten
    forward transfer   FWT = Σ_{j > 1} (R[j − 1, j] − R[0, j]) / (D − 1), R[0] being the base
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


class Measurement(NamedTuple):
    """Of the held-out part of a shard set.

    Attributes:
        bits: Per byte of what is learned there: texts, or the assistant's words.
        accuracy: Share of what is learned there that the model finds likeliest, in tokens.
        answers: Share of answers that are right to their last token, which is what greedy decoding would write; of
            texts 0.
    """

    bits: float
    accuracy: float
    answers: float


class Averages(NamedTuple):
    """Averages over the domains of one or several sequences.

    Attributes:
        learned: accuracy on each domain as soon as it is learned.
        accuracy: ACC.
        backward: BWT.
        forward: FWT.
        learned_bits: bits per byte of each domain as soon as it is learned.
        bits: bits per byte of all domains at the end.
        bits_rise: bits per byte of all but the last at the end, less those as soon as they were learned.
        answers_learned: share of right answers of each domain as soon as it is learned.
        answers: share of right answers of all domains at the end.
        base_rise: relative rise of the base's own bits per byte at the end.
    """

    learned: float
    accuracy: float
    backward: float
    forward: float
    learned_bits: float
    bits: float
    bits_rise: float
    answers_learned: float
    answers: float
    base_rise: float


def stack_measurements(sequences: Sequence[Sequence[Sequence[Measurement]]]) -> tuple[Matrix, Matrix, Matrix]:
    """Return the mean over sequences of each figure, [D+1,D+1]: row 0 and column 0 are the base's."""
    values = np.array(sequences, np.float64).mean(0)
    return values[..., 0], values[..., 1], values[..., 2]


def average_matrices(bits: Matrix, accuracy: Matrix, answers: Matrix) -> Averages:
    """Return the averages of what `stack_measurements` returns."""
    of_domains, bits_of_domains = accuracy[:, 1:], bits[:, 1:]
    count = of_domains.shape[1]
    others = max(1, count - 1)
    learned, learned_bits = np.diag(of_domains[1:]), np.diag(bits_of_domains[1:])
    # The row above the one that learns a domain.
    before = np.diag(of_domains)
    return Averages(
        learned=float(learned.mean()),
        accuracy=float(of_domains[-1].mean()),
        backward=float((of_domains[-1] - learned)[:-1].sum() / others),
        forward=float((before - of_domains[0])[1:].sum() / others),
        learned_bits=float(learned_bits.mean()),
        bits=float(bits_of_domains[-1].mean()),
        bits_rise=float((bits_of_domains[-1] - learned_bits)[:-1].sum() / others),
        answers_learned=float(np.diag(answers)[1:].mean()),
        answers=float(answers[-1, 1:].mean()),
        base_rise=float(bits[-1, 0] / bits[0, 0] - 1),
    )
