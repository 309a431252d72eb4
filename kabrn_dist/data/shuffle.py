"""Which sequence comes when: a pure function of the position, so that nothing has to be stored or shared."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

_ROUNDS = 6
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)

# Short epochs use shorter runs, so that there are about this many to shuffle.
_RUNS_WANTED = 64

# Runs that are read side by side. A batch up to this size then holds no two neighbours of one text.
_LANES = 256


def permute(x: np.ndarray, n: int, key: int) -> np.ndarray:
    """Map integers [...] in [0, n) to int64 [...] by a bijection of [0, n) that depends on `key`.

    A Feistel cipher on the smallest even number of bits that holds n; a result beyond n is enciphered again
    until it falls inside (at most four times on average). Raises ValueError when a value lies outside [0, n).
    """
    if x.size and not 0 <= x.min() <= x.max() < n:
        raise ValueError(f"permute: values from {x.min()} to {x.max()} do not lie in [0, {n})")
    half = _half_bits(n)
    low = np.uint64((1 << half) - 1)
    values = x.astype(np.uint64).reshape(-1)
    outside = np.ones(values.shape, bool)
    while outside.any():
        left, right = values[outside] >> np.uint64(half), values[outside] & low
        for number in range(_ROUNDS):
            mixed = right + np.uint64(_round_key(key, number))
            for factor, shift in zip(_MIX, (30, 27), strict=True):
                mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
            mixed ^= mixed >> np.uint64(31)
            left, right = right, left ^ (mixed & low)
        values[outside] = (left << np.uint64(half)) | right
        outside = values >= np.uint64(n)
    return values.astype(np.int64).reshape(x.shape)


def permute_naive(x: int, n: int, key: int) -> int:
    """One value of `permute` in plain Python integers."""
    half = _half_bits(n)
    low = (1 << half) - 1
    while True:
        left, right = x >> half, x & low
        for number in range(_ROUNDS):
            mixed = (right + _round_key(key, number)) & _MASK
            mixed = ((mixed ^ (mixed >> 30)) * _MIX[0]) & _MASK
            mixed = ((mixed ^ (mixed >> 27)) * _MIX[1]) & _MASK
            left, right = right, left ^ ((mixed ^ (mixed >> 31)) & low)
        x = (left << half) | right
        if x < n:
            return x


@dataclass(frozen=True)
class BlockShuffle:
    """Global position → sequence number. Each epoch visits each of the `sequences` exactly once.

    Runs of consecutive sequences are shuffled, not single ones, and many runs are read in turn: a batch is drawn from
    all over the corpus, and yet each file is read forwards in a few places. Where the
    run length does not divide the number of sequences, the rest comes at the epoch's end; a rotation that
    differs from epoch to epoch decides which sequences these are, and where runs begin.
    """

    sequences: int
    seed: int
    block_size: int = 16

    def __post_init__(self) -> None:
        if self.sequences < 1 or self.block_size < 1:
            raise ValueError(f"Order: sequences {self.sequences} and run {self.block_size} must be at least 1")

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Map global positions, int [...] from 0 on without end, to sequence numbers, int64 [...].

        Raises ValueError when a position is negative.
        """
        positions = np.asarray(positions, np.int64)
        if positions.size and positions.min() < 0:
            raise ValueError(f"Order: position {positions.min()} is negative")
        epochs, slots = np.divmod(positions, self.sequences)
        numbers = np.empty_like(slots)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            numbers[here] = self._epoch(slots[here], epoch)
        return numbers

    def _epoch(self, slots: np.ndarray, epoch: int) -> np.ndarray:
        key, rotation = epoch_keys(self.seed, epoch)
        run = max(1, min(self.block_size, self.sequences // _RUNS_WANTED))
        runs = self.sequences // run
        numbers = slots.copy()
        whole = slots < runs * run
        place, offset = _interleave(slots[whole], runs, run)
        numbers[whole] = permute(place, runs, key) * run + offset
        return (numbers + rotation % self.sequences) % self.sequences


def _interleave(slots: np.ndarray, blocks: int, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Slot → (run's place, offset in the run), taking one sequence of each of `_LANES` runs in turn."""
    window, within = np.divmod(slots, _LANES * block_size)
    lanes = np.minimum(_LANES, blocks - window * _LANES)
    return window * _LANES + within % lanes, within // lanes


def epoch_keys(seed: int, epoch: int) -> tuple[int, int]:
    """Return the permutation key and the rotation of an epoch, two unsigned 64-bit integers."""
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def _half_bits(n: int) -> int:
    return max(1, ((n - 1).bit_length() + 1) // 2)


def _round_key(key: int, number: int) -> int:
    return (key + (number + 1) * _GOLDEN) & _MASK
