"""Operations around ternary products, each in one pass over memory on the CPU (ternary.c).

Shapes: N rows, D width, R rows of latents with a scale each.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from kabrn_dist.kernels.build import load_library
from kabrn_dist.kernels.univariate import KERNEL_DTYPES

PACK_BLOCK = 64  # codes that are packed together, into 16 bytes
DTYPE_NAMES = KERNEL_DTYPES | {torch.int32: "int32", torch.int8: "int8"}


class TernaryKernel:
    """Rounding and packing of latents, casts of codes, scaling of results; for fp32 and bf16, all contiguous.

    Raises:
        Unavailable: see `build.load`.
    """

    def __init__(self) -> None:
        self._library = load_library(Path(__file__).with_name("ternary.c"))
        self._library.partials.restype = ctypes.c_int64

    def scale_rows(self, x: Tensor, factor: Tensor, dtype: torch.dtype, columns: Tensor | None = None) -> Tensor:
        """Multiply x [N,...] of fp32, bf16 or int32 by factor [N] (of any shape with N elements) and columns [...].

        Factors are fp32. The product is computed in fp32 and rounded once, to `dtype`: fp32 or bf16.
        """
        out = torch.empty_like(x, dtype=dtype)
        rows, width = len(x), x[:1].numel()
        self._call("scale_rows", (x.dtype, dtype), x, factor, columns, rows, width, torch.get_num_threads(), out)
        return out

    def abs_sums(self, latents: Tensor) -> Tensor:
        """Return Σ|w| [R] in fp64 of each row of latents [R,n]."""
        rows, each = latents.shape
        pieces = self._library.partials(ctypes.c_int64(rows), ctypes.c_int64(each))
        partial = latents.new_empty(pieces, dtype=torch.float64)
        self._call("abs_sums", (latents.dtype,), latents, rows, each, torch.get_num_threads(), partial)
        return partial.view(rows, -1).sum(1)

    def ternarize(self, latents: Tensor, gamma: Tensor) -> Tensor:
        """Round latents [R,n] with γ [R] fp32 to int8 codes −1, 0, 1 [R,n]."""
        codes = torch.empty_like(latents, dtype=torch.int8)
        rows, each = latents.shape
        self._call("ternarize", (latents.dtype,), latents, gamma, rows, each, torch.get_num_threads(), codes)
        return codes

    def cast(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Return int8 codes as fp32 or bf16."""
        out = torch.empty_like(codes, dtype=dtype)
        self._call("cast", (dtype,), codes, codes.numel(), torch.get_num_threads(), out)
        return out

    def pack(self, codes: Tensor) -> Tensor:
        """Pack int8 codes −1, 0, 1: uint8, 16 bytes for each block of 64 codes; the last may be incomplete."""
        packed = codes.new_empty(-(-codes.numel() // PACK_BLOCK) * (PACK_BLOCK // 4), dtype=torch.uint8)
        self._call("pack", (), codes, codes.numel(), torch.get_num_threads(), packed)
        return packed

    def unpack(self, packed: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        """Return the first `count` codes that `pack` packed, in int8, fp32 or bf16."""
        out = packed.new_empty(count, dtype=dtype)
        self._call("unpack", (dtype,), packed, count, torch.get_num_threads(), out)
        return out

    def unpack_base3(self, packed: Tensor) -> Tensor:
        """Return the int8 codes of uint8 bytes, 16 bytes for each 80 codes."""
        codes = packed.new_empty(packed.numel() * 5, dtype=torch.int8)
        self._call("unpack_base3", (), packed, packed.numel() // 16, torch.get_num_threads(), codes)
        return codes

    def _call(self, name: str, dtypes: tuple[torch.dtype, ...], *arguments: Tensor | int | None) -> None:
        function = getattr(self._library, "_".join([name, *(DTYPE_NAMES[dtype] for dtype in dtypes)]))
        function(*(ctypes.c_int64(a) if isinstance(a, int) else _address(a) for a in arguments))


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
