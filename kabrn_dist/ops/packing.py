"""Ternary codes in few bits: two a code where they are read, two or (five a byte) 1.6 where they travel."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kabrn_dist.kernels.selection import select_kernels
from kabrn_dist.kernels.ternary import PACK_BLOCK
from kabrn_dist.kernels.univariate import KERNEL_DTYPES

# Codes that are packed together in base 3, five a byte, into 16 bytes.
BASE3_BLOCK = 80


def pack(codes: Tensor) -> Tensor:
    """int8 codes −1, 0, 1 → uint8, 16 bytes for each 64 codes begun, whatever the shape."""
    kernels = select_kernels(codes.device.type).kernels
    if kernels is not None:
        return kernels.ternary.pack(codes.contiguous())
    return pack_naive(codes)


def pack_naive(codes: Tensor) -> Tensor:
    """Byte i of a block holds codes i, 16 + i, 32 + i and 48 + i, each plus 1, from its low bits up."""
    flat = codes.reshape(-1)
    flat = torch.cat([flat, flat.new_zeros(-len(flat) % PACK_BLOCK)])
    parts = (flat + 1).to(torch.uint8).view(-1, 4, PACK_BLOCK // 4)
    return (parts[:, 0] | parts[:, 1] << 2 | parts[:, 2] << 4 | parts[:, 3] << 6).view(-1)


def unpack(packed: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Codes of `shape` in `dtype` from what `pack` made."""
    kernels = select_kernels(packed.device.type).kernels
    if kernels is not None and dtype in (torch.int8, *KERNEL_DTYPES):
        return kernels.ternary.unpack(packed, math.prod(shape), dtype).view(shape)
    parts = [(packed.view(-1, PACK_BLOCK // 4) >> shift) & 3 for shift in (0, 2, 4, 6)]
    codes = torch.stack(parts, 1).to(torch.int8) - 1
    return codes.view(-1)[: math.prod(shape)].view(shape).to(dtype)


def pack_base3(codes: Tensor) -> Tensor:
    """int8 codes −1, 0, 1, a multiple of 80 of them → uint8, 16 bytes for each 80.

    Byte i of a block is Σ (code 16·j + i, plus 1)·3^j over j = 0…4.
    """
    digits = (codes.reshape(-1, 5, BASE3_BLOCK // 5) + 1).to(torch.uint8)
    packed = digits[:, 4].clone()
    for place in (3, 2, 1, 0):
        packed.mul_(3).add_(digits[:, place])
    return packed.view(-1)


def unpack_base3(packed: Tensor) -> Tensor:
    """int8 codes of what `pack_base3` made."""
    kernels = select_kernels(packed.device.type).kernels
    if kernels is not None:
        return kernels.ternary.unpack_base3(packed.contiguous())
    return unpack_base3_naive(packed)


def unpack_base3_naive(packed: Tensor) -> Tensor:
    """The same, a digit at a time."""
    left, digits = packed.view(-1, BASE3_BLOCK // 5), []
    for _ in range(5):
        digits.append((left % 3).to(torch.int8) - 1)
        left = left // 3
    return torch.stack(digits, 1).view(-1)


class WireFormat(NamedTuple):
    """How codes travel.

    Attributes:
        block: codes are sent in multiples of this; bytes: that such a block takes.
        encode: int8 codes → uint8. as_two_bits: what arrived → two bits a code.
    """

    block_codes: int
    block_bytes: int
    encode: Callable[[Tensor], Tensor]
    to_two_bits: Callable[[Tensor], Tensor]

    def num_bytes(self, codes: int) -> int:
        """That a multiple of the block takes."""
        return codes // self.block_codes * self.block_bytes


WIRE_FORMATS = {
    "two_bits": WireFormat(PACK_BLOCK, PACK_BLOCK // 4, pack, lambda packed: packed),
    # Both kinds of block must fit.
    "base_three": WireFormat(4 * BASE3_BLOCK, 64, pack_base3, lambda packed: pack(unpack_base3(packed))),
}
