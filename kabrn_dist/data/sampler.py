"""Global position → which sequence of which source: the mixture of the sources and the order of each, together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from kabrn_dist.data.corpus import WeightedSource
from kabrn_dist.data.mixture import Mixture
from kabrn_dist.data.shuffle import BlockShuffle

# Positions that are looked up together: the order of one costs as much as that of hundreds.
_WINDOW = 4096
_WINDOWS_KEPT = 4


class MixtureSampler:
    """What a run draws, a pure function of the position. `counts`: sequences of each source, 0 for one left out.

    Attributes:
        length: positions there are; None where they never end.
        slots: of a period of the mixture, those of each source.
    """

    def __init__(self, sources: Sequence[WeightedSource], sequences_per_source: Sequence[int], seed: int) -> None:
        limits = [_limit(drawn.epochs, count) for drawn, count in zip(sources, sequences_per_source, strict=True)]
        self._mixture = Mixture([drawn.weight for drawn in sources], limits)
        self._shuffles = [
            BlockShuffle(max(1, count), _seed_of(seed, drawn.name))
            for drawn, count in zip(sources, sequences_per_source, strict=True)
        ]
        self._windows: dict[int, np.ndarray] = {}
        self.num_positions = self._mixture.num_positions
        self.slots_per_period: list[int] = self._mixture.slots_per_period.tolist()

    def lookup(self, positions: np.ndarray) -> np.ndarray:
        """Map positions, int64 [N], to sources and sequence numbers, int64 [2, N].

        Raises IndexError when a position is negative or beyond the end.
        """
        sources, numbers = self._mixture(positions)
        for source in np.unique(sources).tolist():
            here = sources == source
            numbers[here] = self._shuffles[source](numbers[here])
        return np.stack([sources, numbers])

    def lookup_cached(self, positions: np.ndarray) -> np.ndarray:
        """`find` that remembers what lies around: quicker for positions close together. For one thread at a time."""
        if positions.size and not 0 <= positions.min() <= positions.max() < (self.num_positions or np.inf):
            raise IndexError(f"positions {positions.min()} to {positions.max()} of {self.num_positions} sequences")
        found = np.empty((2, len(positions)), np.int64)
        windows = positions // _WINDOW
        for window in np.unique(windows).tolist():
            here = windows == window
            found[:, here] = self._window(window)[:, positions[here] - window * _WINDOW]
        return found

    def sequences_drawn(self, position: int) -> list[int]:
        """Return how many sequences of each source lie below a position."""
        return [int(n) for n in self._mixture.count_draws(position)]

    def _window(self, window: int) -> np.ndarray:
        if window not in self._windows:
            while len(self._windows) >= _WINDOWS_KEPT:
                del self._windows[next(iter(self._windows))]
            first, last = window * _WINDOW, (window + 1) * _WINDOW
            self._windows[window] = self.lookup(
                np.arange(first, last if self.num_positions is None else min(last, self.num_positions))
            )
        return self._windows[window]


def _limit(epochs: float | None, sequences: int) -> int | None:
    """Draws of a source until it leaves."""
    return None if epochs is None else max(1, round(epochs * sequences))


def _seed_of(seed: int, name: str) -> int:
    """The seed of one source's order: sources of the same size must not be walked alike."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little")
