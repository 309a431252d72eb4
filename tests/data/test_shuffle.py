"""The order: a bijection in every epoch, the same from vectors and from plain integers."""

from __future__ import annotations

import numpy as np
import pytest

from kabrn_dist.data.shuffle import BlockShuffle, epoch_keys, permute, permute_naive


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_permute_is_a_bijection_and_agrees_with_plain_integers(n: int) -> None:
    for key in (0, 7, 2**64 - 1):
        out = permute(np.arange(n), n, key)
        assert sorted(out.tolist()) == list(range(n))
        some = range(0, n, max(1, n // 50))
        assert [permute_naive(x, n, key) for x in some] == out[list(some)].tolist()


def test_permute_of_huge_ranges_agrees_with_plain_integers() -> None:
    for n in (10**9 + 7, 2**40 + 1, 2**62 - 1):
        x = np.array([0, 1, n // 3, n - 1])
        assert permute(x, n, 5).tolist() == [permute_naive(int(v), n, 5) for v in x]


def test_permute_is_uniform_over_keys() -> None:
    n, keys = 11, 4000
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), permute(np.arange(n), n, key)] += 1
    # 121 cells with 100 degrees of freedom: a chi-square of 160 is exceeded once in 10,000 tries.
    assert ((counts - keys / n) ** 2 / (keys / n)).sum() < 160


def test_permute_keeps_the_shape_and_refuses_values_outside() -> None:
    assert permute(np.zeros((2, 0), np.int64), 5, 1).shape == (2, 0)
    assert permute(np.arange(6).reshape(2, 3), 6, 1).shape == (2, 3)
    for bad in (-1, 6):
        with pytest.raises(ValueError, match="do not lie in"):
            permute(np.array([bad]), 6, 1)


def order_naive(position: int, sequences: int, seed: int, run: int) -> int:
    """`Order` one position at a time."""
    epoch, slot = divmod(position, sequences)
    key, rotation = epoch_keys(seed, epoch)
    run = max(1, min(run, sequences // 64))
    runs = sequences // run
    if slot < runs * run:
        place, offset = turns_naive(runs, run)[slot]
        slot = permute_naive(place, runs, key) * run + offset
    return (slot + rotation) % sequences


def turns_naive(runs: int, run: int) -> list[tuple[int, int]]:
    """All (run, offset) of an epoch in order: 256 runs side by side, one sequence of each in turn."""
    windows = [range(first, min(first + 256, runs)) for first in range(0, runs, 256)]
    return [(place, offset) for window in windows for offset in range(run) for place in window]


@pytest.mark.parametrize("sequences", [1, 2, 15, 16, 17, 100, 1023, 1024, 1025, 1039, 4500])
def test_every_epoch_visits_every_sequence_once(sequences: int) -> None:
    order = BlockShuffle(sequences, seed=3)
    numbers = order(np.arange(3 * sequences)).reshape(3, sequences)
    for epoch in numbers:
        assert sorted(epoch.tolist()) == list(range(sequences))
    some = list(range(0, 3 * sequences, 7))
    assert [order_naive(p, sequences, 3, 16) for p in some] == numbers.reshape(-1)[some].tolist()


def test_epochs_and_seeds_differ_and_runs_stay_together() -> None:
    n = 16 * 4096 + 5
    positions = np.arange(n)
    first = BlockShuffle(n, 1)(positions)
    assert (first != BlockShuffle(n, 1)(positions + n)).mean() > 0.9
    assert (first != BlockShuffle(n, 2)(positions)).mean() > 0.9
    steps = (first[256:] - first[:-256]) % n
    assert (steps == 1).mean() > 0.9, "each lane reads forwards"
    assert np.abs(np.corrcoef(positions, first)[0, 1]) < 0.06


def test_positions_in_any_grouping_give_the_same_numbers() -> None:
    order = BlockShuffle(777, 9)
    whole = order(np.arange(2000))
    assert [int(order(np.array([p]))[0]) for p in range(700, 900)] == whole[700:900].tolist()
    assert (order(np.arange(2000).reshape(4, 500)).reshape(-1) == whole).all()


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        BlockShuffle(0, 1)
    with pytest.raises(ValueError, match="negative"):
        BlockShuffle(5, 1)(np.array([-1]))


def test_a_batch_holds_no_neighbors() -> None:
    numbers = np.sort(BlockShuffle(20_000, seed=1)(np.arange(128)))
    assert np.diff(numbers).min() > 1
    assert numbers.max() - numbers.min() > 15_000
