"""Packed ternary codes: 2 bits a code where they are read, 2 or 1.6 bits (five codes a byte) where they travel."""

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
    """Pack codes into two bits each.

    Args:
        codes: int8 of −1, 0, 1, of any shape.

    Returns:
        uint8, 16 bytes for each block of 64 codes; the last block may be incomplete.

    Example:
        >>> codes = torch.tensor([[1, 0], [-1, 1]], dtype=torch.int8)
        >>> packed = pack(codes)
        >>> packed.shape, unpack(packed, (2, 2), torch.float32).tolist()
        (torch.Size([16]), [[1.0, 0.0], [-1.0, 1.0]])
    """
    kernels = select_kernels(codes.device.type).kernels
    if kernels is not None:
        return kernels.ternary.pack(codes.contiguous())
    return pack_naive(codes)


def pack_naive(codes: Tensor) -> Tensor:
    """Pack as `pack` does, in torch's operations.

    Byte i of a block holds codes i, 16 + i, 32 + i and 48 + i, each plus 1, from its low bits up.
    """
    flat = codes.reshape(-1)
    flat = torch.cat([flat, flat.new_zeros(-len(flat) % PACK_BLOCK)])
    parts = (flat + 1).to(torch.uint8).view(-1, 4, PACK_BLOCK // 4)
    return (parts[:, 0] | parts[:, 1] << 2 | parts[:, 2] << 4 | parts[:, 3] << 6).view(-1)


def unpack(packed: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the codes that `pack` packed, in a shape and dtype."""
    kernels = select_kernels(packed.device.type).kernels
    if kernels is not None and dtype in (torch.int8, *KERNEL_DTYPES):
        return kernels.ternary.unpack(packed, math.prod(shape), dtype).view(shape)
    parts = [(packed.view(-1, PACK_BLOCK // 4) >> shift) & 3 for shift in (0, 2, 4, 6)]
    codes = torch.stack(parts, 1).to(torch.int8) - 1
    return codes.view(-1)[: math.prod(shape)].view(shape).to(dtype)


def pack_base3(codes: Tensor) -> Tensor:
    """Pack int8 codes −1, 0, 1 in base 3: uint8, 16 bytes for each 80 codes, which must be whole blocks.

    Byte i of a block is Σ (code 16·j + i, plus 1)·3^j over j = 0…4.
    """
    digits = (codes.reshape(-1, 5, BASE3_BLOCK // 5) + 1).to(torch.uint8)
    packed = digits[:, 4].clone()
    for digit in (3, 2, 1, 0):
        packed.mul_(3).add_(digits[:, digit])
    return packed.view(-1)


def unpack_base3(packed: Tensor) -> Tensor:
    """Return the int8 codes that `pack_base3` packed."""
    kernels = select_kernels(packed.device.type).kernels
    if kernels is not None:
        return kernels.ternary.unpack_base3(packed.contiguous())
    return unpack_base3_naive(packed)


def unpack_base3_naive(packed: Tensor) -> Tensor:
    """Unpack as `unpack_base3` does, in torch's operations, a digit at a time."""
    left, digits = packed.view(-1, BASE3_BLOCK // 5), []
    for _ in range(5):
        digits.append((left % 3).to(torch.int8) - 1)
        left = left // 3
    return torch.stack(digits, 1).view(-1)


class WireFormat(NamedTuple):
    """Encoding of ternary codes on the wire.

    Attributes:
        block_codes: codes are sent in multiples of this number.
        block_bytes: bytes that such a block takes.
        encode: int8 codes → uint8.
        to_two_bits: received bytes → two bits a code (`pack`).
    """

    block_codes: int
    block_bytes: int
    encode: Callable[[Tensor], Tensor]
    to_two_bits: Callable[[Tensor], Tensor]

    def num_bytes(self, codes: int) -> int:
        """Return the bytes that a number of codes takes, a multiple of the block."""
        return codes // self.block_codes * self.block_bytes


WIRE_FORMATS = {
    "two_bits": WireFormat(PACK_BLOCK, PACK_BLOCK // 4, pack, lambda packed: packed),
    # Both kinds of block must fit.
    "base_three": WireFormat(4 * BASE3_BLOCK, 64, pack_base3, lambda packed: pack(unpack_base3(packed))),
}
