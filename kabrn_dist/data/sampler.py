"""Sampler of a mixture: global position → sequence of a source, by the mixture of sources and the order of each."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from kabrn_dist.data.corpus import WeightedSource
from kabrn_dist.data.mixture import Mixture
from kabrn_dist.data.shuffle import BlockShuffle

# Positions that are looked up together: the order of one costs as much as that of hundreds.
_WINDOW = 4096
_CACHED_WINDOWS = 4


class MixtureSampler:
    """Order in which a run draws sequences, a pure function of the position.

    Args:
        sources: Sources of the run.
        sequences_per_source: Number of sequences of each source, 0 for one that is left out.
        seed: Seed of the order.

    Attributes:
        num_positions: Number of positions; None if they never end.
        slots_per_period: Slots of each source in a period of the mixture.
    """

    def __init__(self, sources: Sequence[WeightedSource], sequences_per_source: Sequence[int], seed: int) -> None:
        counted = list(zip(sources, sequences_per_source, strict=True))
        draw_limits = [_draw_limit(source.epochs, count) for source, count in counted]
        self._mixture = Mixture([source.weight for source in sources], draw_limits)
        self._shuffles = [BlockShuffle(max(1, count), _source_seed(seed, source.name)) for source, count in counted]
        self._windows: dict[int, np.ndarray] = {}
        self.num_positions = self._mixture.num_positions
        self.slots_per_period: list[int] = self._mixture.slots_per_period.tolist()

    def lookup(self, positions: np.ndarray) -> np.ndarray:
        """Map positions, int64 [N], to sources and sequence numbers, int64 [2, N].

        Raises:
            IndexError: if a position is negative or beyond the end.
        """
        sources, numbers = self._mixture(positions)
        for source in np.unique(sources).tolist():
            of_source = sources == source
            numbers[of_source] = self._shuffles[source](numbers[of_source])
        return np.stack([sources, numbers])

    def lookup_cached(self, positions: np.ndarray) -> np.ndarray:
        """Look up positions as `lookup` does, faster for positions close together. For one thread at a time.

        Raises:
            IndexError: if a position is negative or beyond the end.
        """
        if positions.size and not 0 <= positions.min() <= positions.max() < (self.num_positions or np.inf):
            raise IndexError(f"positions {positions.min()} to {positions.max()} of {self.num_positions} sequences")
        sequences = np.empty((2, len(positions)), np.int64)
        windows = positions // _WINDOW
        for window in set(windows.tolist()):
            in_window = windows == window
            sequences[:, in_window] = self._window(window)[:, positions[in_window] - window * _WINDOW]
        return sequences

    def sequences_drawn(self, position: int) -> list[int]:
        """Return the number of sequences of each source before a position."""
        return [int(count) for count in self._mixture.count_draws(position)]

    def _window(self, window: int) -> np.ndarray:
        if window not in self._windows:
            while len(self._windows) >= _CACHED_WINDOWS:
                del self._windows[next(iter(self._windows))]
            start, stop = window * _WINDOW, (window + 1) * _WINDOW
            stop = stop if self.num_positions is None else min(stop, self.num_positions)
            self._windows[window] = self.lookup(np.arange(start, stop))
        return self._windows[window]


def _draw_limit(epochs: float | None, sequences: int) -> int | None:
    return None if epochs is None else max(1, round(epochs * sequences))


def _source_seed(seed: int, name: str) -> int:
    # Sources of the same size must not be walked alike.
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little")
