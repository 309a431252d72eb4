"""Mixture of sources: which source comes at which position, a pure function like the order within each source.

A period of 4096 positions gives every source its slots in proportion to its weight, evenly distributed; periods repeat
until a source is exhausted. The other sources then take the following slots in proportion to their weights.
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
    """Divide the slots of a period by weight, by largest remainders, with at least 1 for a weight above 0.

    Args:
        weights: Weights [S] in any unit.

    Returns:
        int64 [S] that sums to 4096.

    Raises:
        ValueError: if no weight is above 0, or more than 4096 are.

    Example:
        >>> count_slots([3, 1, 0]).tolist()
        [3072, 1024, 0]
    """
    weight_array = np.asarray(weights, np.float64)
    positive = weight_array > 0
    if not 1 <= positive.sum() <= PERIOD:
        raise ValueError(f"mixture: {positive.sum()} of {len(weights)} weights are above 0; use 1 to {PERIOD}")
    exact = weight_array / weight_array.sum() * PERIOD
    counts = np.maximum(np.floor(exact).astype(np.int64), positive)
    # Raising sources to 1 may have taken more slots than there are: those furthest above their quota give.
    while counts.sum() > PERIOD:
        counts[np.argmax(np.where(counts > 1, counts - exact, -np.inf))] -= 1
    while counts.sum() < PERIOD:
        counts[np.argmax(np.where(positive, exact - counts, -np.inf))] += 1
    return counts


def schedule_slots(slot_counts: np.ndarray) -> np.ndarray:
    """Assign the slots of a period to sources, so that after any slot each is within 1 of its quota.

    Draw k of the c draws of a source has to lie in slots ⌊4096·k/c⌋ to ⌈4096·(k+1)/c⌉ − 1. Draws whose windows have
    begun are served by earliest deadline, which finds such a schedule whenever one exists; and one always does.

    Args:
        slot_counts: int64 [S] that sums to 4096.

    Returns:
        Source of each slot, int64 [4096].
    """
    counts = slot_counts.tolist()
    draws = [0] * len(counts)
    beginning: list[list[int]] = [[] for _ in range(PERIOD)]
    beginning[0] = [source for source, count in enumerate(counts) if count]
    ready: list[tuple[int, int]] = []
    schedule = np.empty(PERIOD, np.int64)
    for slot in range(PERIOD):
        for source in beginning[slot]:
            heapq.heappush(ready, (-(-(draws[source] + 1) * PERIOD // counts[source]), source))
        source = heapq.heappop(ready)[1]
        schedule[slot] = source
        draws[source] += 1
        if draws[source] < counts[source]:
            beginning[max(slot + 1, draws[source] * PERIOD // counts[source])].append(source)
    return schedule


class _Segment(NamedTuple):
    """Positions with the same set of sources.

    Attributes:
        start: First position.
        draws_before: Draws of each source before `start`, int64 [S].
        slot_counts: Slots of each source in a period, int64 [S].
        schedule: Source of each slot, int64 [4096].
        rank: Slots of the same source before each slot, int64 [4096].
    """

    start: int
    draws_before: np.ndarray
    slot_counts: np.ndarray
    schedule: np.ndarray
    rank: np.ndarray


class Mixture:
    """Map from global position to (source, position within the source), without gaps in any source.

    Args:
        weights: Weight of each source [S], in any unit; a source of weight 0 is never drawn.
        draw_limits: Draws after which each source [S] is exhausted; None for never.

    Attributes:
        slots_per_period: Positions of each source in a period while no source is exhausted, int64 [S].
        num_positions: Number of positions; None if they never end.

    Raises:
        ValueError: as `count_slots`.

    Example:
        >>> mixture = Mixture([1, 1], [None, None])
        >>> sources, positions = mixture(np.arange(5))
        >>> sources.tolist(), positions.tolist()
        ([0, 1, 0, 1, 0], [0, 0, 1, 1, 2])
    """

    def __init__(self, weights: Sequence[float], draw_limits: Sequence[int | None]) -> None:
        self.slots_per_period = count_slots(weights)
        self.num_positions: int | None = None
        self._segments: list[_Segment] = []
        remaining = np.array(weights, np.float64)
        start, draws = 0, np.zeros(len(remaining), np.int64)
        while True:
            segment = _make_segment(start, draws, remaining)
            self._segments.append(segment)
            ends = [_end_of(segment, s, n) for s, n in enumerate(draw_limits) if n is not None and remaining[s] > 0]
            if not ends:
                break
            start = min(ends)
            draws = self.count_draws(start)
            exhausted = [n is not None and count >= n for n, count in zip(draw_limits, draws.tolist(), strict=True)]
            remaining[exhausted] = 0
            if not remaining.any():
                self.num_positions = start
                break
        self._starts = np.array([segment.start for segment in self._segments])

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Map global positions, int [N], to source numbers and positions within the sources, int64 [N] each.

        Raises:
            IndexError: if a position is negative or beyond the end.
        """
        positions = np.asarray(positions, np.int64)
        if positions.size and (positions.min() < 0 or positions.max() >= (self.num_positions or np.inf)):
            raise IndexError(f"positions {positions.min()} to {positions.max()} of a mixture of {self.num_positions}")
        sources, positions_in_source = np.empty_like(positions), np.empty_like(positions)
        numbers = np.searchsorted(self._starts, positions, "right") - 1
        for number in np.unique(numbers).tolist():
            segment, in_segment = self._segments[number], numbers == number
            period, slot = np.divmod(positions[in_segment] - segment.start, PERIOD)
            source = segment.schedule[slot]
            sources[in_segment] = source
            positions_in_source[in_segment] = (
                segment.draws_before[source] + period * segment.slot_counts[source] + segment.rank[slot]
            )
        return sources, positions_in_source

    def count_draws(self, position: int) -> np.ndarray:
        """Return the number of draws of each source before `position`, int64 [S]."""
        segment = next(segment for segment in reversed(self._segments) if segment.start <= position)
        period, slot = divmod(position - segment.start, PERIOD)
        in_period = np.bincount(segment.schedule[:slot], minlength=len(segment.slot_counts))
        return segment.draws_before + period * segment.slot_counts + in_period


def _make_segment(start: int, draws_before: np.ndarray, weights: np.ndarray) -> _Segment:
    slot_counts = count_slots(weights.tolist())
    schedule = schedule_slots(slot_counts)
    rank = np.empty(PERIOD, np.int64)
    for source in np.unique(schedule).tolist():
        slots = schedule == source
        rank[slots] = np.arange(slots.sum())
    return _Segment(start, draws_before, slot_counts, schedule, rank)


def _end_of(segment: _Segment, source: int, draw_limit: int) -> int:
    """Return the position after the source's last draw, if the segment lasted until then."""
    period, rank = divmod(draw_limit - int(segment.draws_before[source]) - 1, int(segment.slot_counts[source]))
    slot = int(np.flatnonzero(segment.schedule == source)[rank])
    return segment.start + period * PERIOD + slot + 1


def mixture_naive(weights: Sequence[float], draw_limits: Sequence[int | None]) -> Iterator[tuple[int, int]]:
    """Yield the (source, position within it) of positions 0, 1, 2, … one at a time, by counting."""
    draws = [0] * len(weights)
    while True:
        remaining = [0 if n is not None and d >= n else w for w, n, d in zip(weights, draw_limits, draws, strict=True)]
        if not any(remaining):
            return
        fractions = [Fraction(int(count), PERIOD) for count in count_slots(remaining)]
        is_exhausted, slot, draws_in_period = False, 0, [0] * len(weights)
        while not is_exhausted:
            if slot % PERIOD == 0:
                draws_in_period = [0] * len(weights)
            candidates = [
                (ceil((draws_in_period[source] + 1) / fraction), source)
                for source, fraction in enumerate(fractions)
                if fraction and floor(draws_in_period[source] / fraction) <= slot % PERIOD
            ]
            source = min(candidates)[1]
            yield source, draws[source]
            draws[source], draws_in_period[source], slot = draws[source] + 1, draws_in_period[source] + 1, slot + 1
            is_exhausted = draws[source] == draw_limits[source]
