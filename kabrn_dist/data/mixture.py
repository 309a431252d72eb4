"""Which source comes when: a pure function of the position, as the order within each source is.

A period of 4096 positions gives every source its share of them, spread out evenly; periods repeat until a source is
used up. It then leaves, and the others share what follows by their weights.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import ceil, floor
from typing import NamedTuple

import numpy as np

PERIOD = 4096


def count_slots(weights: Sequence[float]) -> np.ndarray:
    """Split the period by weight: int64 [S] that sums to 4096, by largest remainders, at least 1 for a weight above 0.

    Raises ValueError when no weight is above 0 or more than 4096 are.
    """
    shares = np.asarray(weights, np.float64)
    some = shares > 0
    if not 1 <= some.sum() <= PERIOD:
        raise ValueError(f"mixture: {some.sum()} of {len(shares)} weights are above 0; 1 to {PERIOD} can be")
    exact = shares / shares.sum() * PERIOD
    counts = np.maximum(np.floor(exact).astype(np.int64), some)
    # Sources that were raised to 1 may have taken more than there is: those who have most over their share give.
    while counts.sum() > PERIOD:
        counts[np.argmax(np.where(counts > 1, counts - exact, -np.inf))] -= 1
    while counts.sum() < PERIOD:
        counts[np.argmax(np.where(some, exact - counts, -np.inf))] += 1
    return counts


def schedule_slots(slot_counts: np.ndarray) -> np.ndarray:
    """The source of each slot of a period, int64 [4096]; after any slot each has had within 1 of its share.

    Draw k of c of a source has to lie in slots ⌊4096·k/c⌋ to ⌈4096·(k+1)/c⌉ − 1. The draws whose windows have begun
    are served by earliest deadline, which finds such a table wherever there is one; and there always is one.
    """
    wanted = slot_counts.tolist()
    drawn = [0] * len(wanted)
    beginning: list[list[int]] = [[] for _ in range(PERIOD)]
    beginning[0] = [source for source, count in enumerate(wanted) if count]
    ready: list[tuple[int, int]] = []
    table = np.empty(PERIOD, np.int64)
    for slot in range(PERIOD):
        for source in beginning[slot]:
            heapq.heappush(ready, (-(-(drawn[source] + 1) * PERIOD // wanted[source]), source))
        source = heapq.heappop(ready)[1]
        table[slot] = source
        drawn[source] += 1
        if drawn[source] < wanted[source]:
            beginning[max(slot + 1, drawn[source] * PERIOD // wanted[source])].append(source)
    return table


class _Segment(NamedTuple):
    """Positions from `start` on with the same sources. `base` [S]: draws of each source before; the rest: a period.

    `counts` [S] slots of each source, `table` [4096] the source of a slot, `rank` [4096] its source's slots before it.
    """

    start: int
    base: np.ndarray
    counts: np.ndarray
    table: np.ndarray
    rank: np.ndarray


class Mixture:
    """Global position → (source, position within the source); each source's positions are 0, 1, 2, … without a gap.

    Args:
        weights: [S] share of each source, in any unit; a source of weight 0 is never drawn.
        limits: [S] draws after which a source leaves; None: it never does.

    Attributes:
        counts: int64 [S] positions of each source in a period, while all are there.
        length: positions there are; None where they never end.

    Raises ValueError as `count_slots`.
    """

    def __init__(self, weights: Sequence[float], draw_limits: Sequence[int | None]) -> None:
        self.slots_per_period = count_slots(weights)
        self.num_positions: int | None = None
        self._segments: list[_Segment] = []
        left = np.array(weights, np.float64)
        start, base = 0, np.zeros(len(left), np.int64)
        while True:
            segment = _make_segment(start, base, left)
            self._segments.append(segment)
            ends = [(_end_of(segment, s, n), s) for s, n in enumerate(draw_limits) if n is not None and left[s] > 0]
            if not ends:
                break
            start = min(ends)[0]
            base = self.count_draws(start)
            left[[n is not None and drawn >= n for n, drawn in zip(draw_limits, base.tolist(), strict=True)]] = 0
            if not left.any():
                self.num_positions = start
                break
        self._starts = np.array([segment.start for segment in self._segments])

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Map global positions, int [N], to source numbers and positions within the sources, int64 [N] each.

        Raises IndexError when a position is negative or beyond the end.
        """
        positions = np.asarray(positions, np.int64)
        if positions.size and (positions.min() < 0 or positions.max() >= (self.num_positions or np.inf)):
            raise IndexError(f"positions {positions.min()} to {positions.max()} of a mixture of {self.num_positions}")
        sources, within = np.empty_like(positions), np.empty_like(positions)
        numbers = np.searchsorted(self._starts, positions, "right") - 1
        for number in np.unique(numbers).tolist():
            segment, here = self._segments[number], numbers == number
            period, slot = np.divmod(positions[here] - segment.start, PERIOD)
            source = segment.table[slot]
            sources[here] = source
            within[here] = segment.base[source] + period * segment.counts[source] + segment.rank[slot]
        return sources, within

    def count_draws(self, position: int) -> np.ndarray:
        """Return how often each source is drawn before `position`, int64 [S]."""
        segment = next(segment for segment in reversed(self._segments) if segment.start <= position)
        period, slot = divmod(position - segment.start, PERIOD)
        rest = np.bincount(segment.table[:slot], minlength=len(segment.base))
        return segment.base + period * segment.counts + rest


def _make_segment(start: int, base: np.ndarray, weights: np.ndarray) -> _Segment:
    counts = count_slots(weights.tolist())
    table = schedule_slots(counts)
    rank = np.empty(PERIOD, np.int64)
    for source in np.unique(table).tolist():
        here = table == source
        rank[here] = np.arange(here.sum())
    return _Segment(start, base, counts, table, rank)


def _end_of(segment: _Segment, source: int, limit: int) -> int:
    """The position after the source's last draw, if the segment went on for so long."""
    period, rank = divmod(limit - int(segment.base[source]) - 1, int(segment.counts[source]))
    slot = int(np.flatnonzero(segment.table == source)[rank])
    return segment.start + period * PERIOD + slot + 1


def mixture_naive(weights: Sequence[float], draw_limits: Sequence[int | None]) -> Iterator[tuple[int, int]]:
    """The (source, position within it) of positions 0, 1, 2, … one at a time, by counting."""
    drawn = [0] * len(weights)
    while True:
        left = [0 if n is not None and d >= n else w for w, n, d in zip(weights, draw_limits, drawn, strict=True)]
        if not any(left):
            return
        shares = [Fraction(int(count), PERIOD) for count in count_slots(left)]
        used_up, slot, had = False, 0, [0] * len(weights)
        while not used_up:
            if slot % PERIOD == 0:
                had = [0] * len(weights)
            open_now = [
                (ceil((had[s] + 1) / share), s)
                for s, share in enumerate(shares)
                if share and floor(had[s] / share) <= slot % PERIOD
            ]
            source = min(open_now)[1]
            yield source, drawn[source]
            drawn[source], had[source], slot = drawn[source] + 1, had[source] + 1, slot + 1
            used_up = drawn[source] == draw_limits[source]
