"""Ternary codes in two bits and in base 3."""

from __future__ import annotations

import pytest
import torch

from kabrn_dist.kernels.selection import select_kernels
from kabrn_dist.ops import packing
from kabrn_dist.ops.packing import (
    WIRE_FORMATS,
    pack,
    pack_base3,
    pack_naive,
    unpack,
    unpack_base3,
    unpack_base3_naive,
)

SHAPES = [(0,), (1,), (63,), (64,), (65,), (3, 7, 11), (5, 130), (2, 64, 64)]


def draw(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(-1, 2, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", SHAPES)
def test_two_bits_come_back(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    codes = draw(shape)
    packed = pack(codes)
    assert len(packed) == -(-codes.numel() // 64) * 16
    assert torch.equal(packed, pack_naive(codes))
    for dtype in (torch.int8, torch.float32, torch.bfloat16, torch.float16, torch.float64):
        found = unpack(packed, shape, dtype)
        assert found.dtype == dtype and torch.equal(found, codes.to(dtype))
    monkeypatch.setattr(packing, "select_kernels", lambda device: select_kernels("cpu")._replace(kernels=None))
    assert torch.equal(unpack(packed, shape, torch.float32), codes.float()) and torch.equal(pack(codes), packed)


@pytest.mark.parametrize("blocks", [1, 3, 40])
def test_base_three_comes_back_in_a_fifth_of_a_byte(blocks: int) -> None:
    codes = draw((blocks * 80,))
    packed = pack_base3(codes)
    assert packed.dtype == torch.uint8 and len(packed) * 5 == len(codes)
    assert torch.equal(unpack_base3(packed), codes) and torch.equal(unpack_base3_naive(packed), codes)
    # Read digit by digit, as a number in base 3 is.
    block, byte = codes.view(blocks, 5, 16)[-1, :, 3].tolist(), int(packed.view(blocks, 16)[-1, 3])
    assert [byte // 3**j % 3 - 1 for j in range(5)] == block


def test_every_byte_of_base_three_has_its_digits() -> None:
    packed = torch.arange(3**5 // 16 * 16 + 16).clamp_(max=3**5 - 1).to(torch.uint8)
    assert torch.equal(unpack_base3(packed), unpack_base3_naive(packed))
    assert torch.equal(pack_base3(unpack_base3(packed)), packed)


@pytest.mark.parametrize("name", sorted(WIRE_FORMATS))
def test_what_travels_arrives_as_two_bits(name: str) -> None:
    way = WIRE_FORMATS[name]
    codes = draw((way.block_codes * 7,))
    sent = way.encode(codes)
    assert len(sent) == way.num_bytes(len(codes))
    assert torch.equal(way.to_two_bits(sent), pack(codes))
