"""The mixture of sources: shares, spread, passes, and agreement with counting one position at a time."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from kabrn_dist.data.mixture import PERIOD, Mixture, count_slots, mixture_naive, schedule_slots

WEIGHTS = [
    [1.0],
    [1.0, 1.0],
    [2.0, 1.0, 1.0],
    [0.7, 0.2, 0.1],
    [1.0, 0.0, 3.0],
    [1e-9, 1.0, 0.5],
    [1e9, 1.0, 1.0, 1.0],
    [float(n) for n in range(1, 40)],
    np.random.default_rng(0).dirichlet(np.full(300, 0.3)).tolist(),
]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_counts_are_the_weights_to_a_slot(weights: list[float]) -> None:
    counts, shares = count_slots(weights), np.array(weights) / sum(weights)
    assert counts.sum() == PERIOD and ((counts > 0) == (shares > 0)).all()
    plain = shares * PERIOD >= 1
    # Sources below a slot take one from the largest, so only among them may it be more.
    slack = (~plain & (shares > 0)).sum()
    assert (np.abs(counts - shares * PERIOD)[plain] <= 1 + slack).all()
    if not slack:
        assert np.abs(counts / PERIOD - shares).max() < 1 / PERIOD
    assert (count_slots([7 * weight for weight in weights]) == counts).all()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_no_source_is_ever_a_draw_away_from_its_share(weights: list[float]) -> None:
    counts = count_slots(weights)
    table = schedule_slots(counts)
    for source, count in enumerate(counts.tolist()):
        had = np.cumsum(table == source)
        assert had[-1] == count
        assert np.abs(had - count / PERIOD * np.arange(1, PERIOD + 1)).max() < 1


@pytest.mark.parametrize(
    ("weights", "limits"),
    [
        ([1.0], [None]),
        ([1.0], [10]),
        ([3.0, 1.0], [None, None]),
        ([3.0, 1.0, 1.0, 0.0, 0.001], [None, 700, 5000, None, 50]),
        ([1.0, 1.0], [1, 1]),
        ([1.0, 1.0, 2.0], [3000, 3000, 6000]),
        ([5.0, 1.0, 2.0], [4096, 4097, 1]),
        ([0.0, 2.0, 1.0], [5, 9000, 11]),
    ],
)
def test_positions_agree_with_counting(weights: list[float], limits: list[int | None]) -> None:
    mixture, n = Mixture(weights, limits), 12_000
    wanted = np.array(list(islice(mixture_naive(weights, limits), n)))
    if mixture.num_positions is not None:
        assert min(n, mixture.num_positions) == len(wanted)
        assert mixture.num_positions == sum(limit or 0 for limit, weight in zip(limits, weights, strict=True) if weight)
    sources, within = mixture(np.arange(len(wanted)))
    assert (sources == wanted[:, 0]).all() and (within == wanted[:, 1]).all()
    for position in (0, 1, 777, 4096, 8191, len(wanted)):
        drawn = np.bincount(wanted[:position, 0], minlength=len(weights))
        assert mixture.count_draws(min(position, len(wanted))).tolist() == drawn.tolist()
    # Any grouping, any order: positions know nothing of each other.
    some = np.random.default_rng(1).permutation(len(wanted))[:500]
    assert (mixture(some)[1] == wanted[some, 1]).all()


def test_every_source_walks_without_a_gap_and_leaves_in_time() -> None:
    weights, limits = [5.0, 1.0, 0.3, 2.0], [20_000, None, 100, 3]
    sources, within = Mixture(weights, limits)(np.arange(60_000))
    for source, limit in enumerate(limits):
        mine = within[sources == source]
        assert (mine == np.arange(len(mine))).all() and (limit is None or len(mine) == limit)
    assert (sources[40_000:] == 1).all(), "the one that never leaves goes on alone"


def test_far_positions_are_as_quick_as_near_ones() -> None:
    mixture = Mixture([2.0, 1.0], [None, 10**12])
    sources, within = mixture(np.array([10**15]))
    assert (sources[0], int(within[0])) == (0, 10**15 - 10**12)
    assert mixture.count_draws(10**15).sum() == 10**15


def test_nonsense_is_refused() -> None:
    for weights in ([], [0.0, 0.0], [1.0] * (PERIOD + 1)):
        with pytest.raises(ValueError, match="weights are above 0"):
            Mixture(weights, [None] * len(weights))
    mixture = Mixture([1.0, 1.0], [5, 5])
    for bad in (-1, 10):
        with pytest.raises(IndexError, match="of a mixture of 10"):
            mixture(np.array([bad]))
