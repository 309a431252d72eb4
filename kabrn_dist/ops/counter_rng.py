"""Counter-based random numbers: a hash of (seed, token, position), no generator state.

The numbers are the same for any layout of ranks and after any resume.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

# Odd multipliers with well mixed bits (splitmix64's), as signed numbers; int64 products wrap.
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
_STRIDE = 0x9E3779B97F4A7C15 - 2**64
_MASKS = {shift: (1 << (64 - shift)) - 1 for shift in (27, 30, 31, 40)}


def noise_key(seed: int, name: str) -> int:
    """Return the key of a stream; streams of different names or seeds are unrelated."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}/noise".encode()).digest()[:8], "little", signed=True)


def hash_combine(*numbers: Tensor) -> Tensor:
    """Hash int64 tensors that broadcast against each other into one (splitmix64's finalizer on each in turn)."""
    mixed = torch.zeros((), dtype=torch.int64, device=numbers[0].device)
    for number in numbers:
        mixed = (mixed + number) * _FIRST + _STRIDE
        mixed = (mixed ^ _shift(mixed, 30)) * _FIRST
        mixed = (mixed ^ _shift(mixed, 27)) * _SECOND
        mixed = mixed ^ _shift(mixed, 31)
    return mixed


def hash_uniform(*numbers: Tensor) -> Tensor:
    """Return fp32 numbers in [0, 1), one for each combination of int64 numbers: the upper 24 bits of their hash.

    Example:
        >>> hash_uniform(torch.tensor(7), torch.arange(3))
        tensor([0.9882, 0.2875, 0.7575])
    """
    return _shift(hash_combine(*numbers), 40).to(torch.float32) * 2.0**-24


def _shift(value: Tensor, bits: int) -> Tensor:
    # torch shifts the sign in; a logical shift clears it.
    return (value >> bits) & _MASKS[bits]
