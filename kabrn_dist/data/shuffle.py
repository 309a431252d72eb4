"""Shuffled order of sequences: a pure function of the position, so that nothing has to be stored or shared."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

_ROUNDS = 6
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)

# Short epochs use shorter blocks, so that there are about this many to shuffle.
_TARGET_BLOCKS = 64

# Blocks that are interleaved. A batch up to this size then holds no two neighbors of one text.
_LANES = 256


def permute(x: np.ndarray, n: int, key: int) -> np.ndarray:
    """Map integers in [0, n) through a bijection of [0, n) that depends on the key.

    A Feistel cipher on the smallest even number of bits that holds n; a result beyond n is enciphered again until it
    falls inside (cycle walking, at most four times on average).

    Args:
        x: Integers [...] in [0, n).
        n: Size of the domain.
        key: Unsigned 64-bit key.

    Returns:
        int64, of the shape of `x`.

    Raises:
        ValueError: if a value lies outside [0, n).

    Example:
        >>> permute(np.arange(8), 8, key=1).tolist()
        [6, 4, 5, 3, 1, 2, 0, 7]
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
    """Return one value of `permute`, computed in plain Python integers."""
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
    """Map from global position to sequence number, in which each epoch visits each sequence exactly once.

    Blocks of consecutive sequences are shuffled instead of single ones, and many blocks are interleaved: a batch is
    drawn from all over the corpus, and yet each file is read forward in a few places. If the block size does not
    divide the number of sequences, the remainder comes at the end of the epoch; a rotation that differs from epoch to
    epoch decides which sequences these are, and where blocks begin.

    Attributes:
        sequences: Number of sequences in an epoch.
        seed: Seed of the order.
        block_size: Sequences in a block; fewer in short epochs.

    Raises:
        ValueError: if `sequences` or `block_size` is below 1.

    Example:
        >>> shuffle = BlockShuffle(sequences=6, seed=0)
        >>> shuffle(np.arange(6)).tolist(), shuffle(np.arange(6, 12)).tolist()
        ([2, 3, 5, 1, 0, 4], [1, 0, 4, 2, 3, 5])
    """

    sequences: int
    seed: int
    block_size: int = 16

    def __post_init__(self) -> None:
        if self.sequences < 1 or self.block_size < 1:
            raise ValueError(
                f"BlockShuffle: sequences {self.sequences} and block_size {self.block_size} must be at least 1"
            )

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Map global positions, int [...] of any size, to sequence numbers, int64 [...].

        Raises:
            ValueError: if a position is negative.
        """
        positions = np.asarray(positions, np.int64)
        if positions.size and positions.min() < 0:
            raise ValueError(f"BlockShuffle: position {positions.min()} is negative")
        epochs, slots = np.divmod(positions, self.sequences)
        numbers = np.empty_like(slots)
        for epoch in np.unique(epochs).tolist():
            in_epoch = epochs == epoch
            numbers[in_epoch] = self._shuffle_epoch(slots[in_epoch], epoch)
        return numbers

    def _shuffle_epoch(self, slots: np.ndarray, epoch: int) -> np.ndarray:
        key, rotation = epoch_keys(self.seed, epoch)
        size = max(1, min(self.block_size, self.sequences // _TARGET_BLOCKS))
        blocks = self.sequences // size
        numbers = slots.copy()
        in_blocks = slots < blocks * size
        block, offset = _interleave(slots[in_blocks], blocks, size)
        numbers[in_blocks] = permute(block, blocks, key) * size + offset
        return (numbers + rotation % self.sequences) % self.sequences


def _interleave(slots: np.ndarray, blocks: int, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Map slots to (block, offset in the block), taking one sequence from each of `_LANES` blocks in turn."""
    window, slot = np.divmod(slots, _LANES * block_size)
    lanes = np.minimum(_LANES, blocks - window * _LANES)
    return window * _LANES + slot % lanes, slot // lanes


def epoch_keys(seed: int, epoch: int) -> tuple[int, int]:
    """Return the permutation key and the rotation of an epoch, two unsigned 64-bit integers."""
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def _half_bits(n: int) -> int:
    return max(1, ((n - 1).bit_length() + 1) // 2)


def _round_key(key: int, number: int) -> int:
    return (key + (number + 1) * _GOLDEN) & _MASK
