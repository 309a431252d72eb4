"""What a ternary product needs around the multiplication, each in one pass over memory on the CPU (products.c).

Shapes: N rows, D width, R runs of latents with a scale each.
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
    """Latents rounded to −1, 0, 1 and packed, codes widened, results scaled; for fp32 and bf16. All contiguous.

    Raises:
        Unavailable: see `build.load`.
    """

    def __init__(self) -> None:
        self._library = load_library(Path(__file__).with_name("ternary.c"))
        self._library.partials.restype = ctypes.c_int64

    def scale_rows(self, x: Tensor, factor: Tensor, dtype: torch.dtype, columns: Tensor | None = None) -> Tensor:
        """x [N,...] of fp32, bf16 or int32 times factor [N] (of any shape with N elements) and columns [...].

        Factors are fp32. Computed in fp32 and rounded once, to `dtype`: fp32 or bf16.
        """
        out = torch.empty_like(x, dtype=dtype)
        rows, width = len(x), x[:1].numel()
        self._call("scale_rows", (x.dtype, dtype), x, factor, columns, rows, width, torch.get_num_threads(), out)
        return out

    def abs_sums(self, latents: Tensor) -> Tensor:
        """[R,n] → [R] fp64, Σ|w| of each run."""
        rows, each = latents.shape
        pieces = self._library.partials(ctypes.c_int64(rows), ctypes.c_int64(each))
        partial = latents.new_empty(pieces, dtype=torch.float64)
        self._call("abs_sums", (latents.dtype,), latents, rows, each, torch.get_num_threads(), partial)
        return partial.view(rows, -1).sum(1)

    def ternarize(self, latents: Tensor, gamma: Tensor) -> Tensor:
        """[R,n] latents and γ [R] fp32 → [R,n] int8 of −1, 0, 1."""
        codes = torch.empty_like(latents, dtype=torch.int8)
        rows, each = latents.shape
        self._call("ternarize", (latents.dtype,), latents, gamma, rows, each, torch.get_num_threads(), codes)
        return codes

    def cast(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """int8 → the same numbers in fp32 or bf16."""
        out = torch.empty_like(codes, dtype=dtype)
        self._call("cast", (dtype,), codes, codes.numel(), torch.get_num_threads(), out)
        return out

    def pack(self, codes: Tensor) -> Tensor:
        """int8 of −1, 0, 1 → uint8, 16 bytes for each 64 codes begun."""
        packed = codes.new_empty(-(-codes.numel() // PACK_BLOCK) * (PACK_BLOCK // 4), dtype=torch.uint8)
        self._call("pack", (), codes, codes.numel(), torch.get_num_threads(), packed)
        return packed

    def unpack(self, packed: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        """The first `count` codes of what `pack` made, in int8, fp32 or bf16."""
        out = packed.new_empty(count, dtype=dtype)
        self._call("unpack", (dtype,), packed, count, torch.get_num_threads(), out)
        return out

    def unpack_base3(self, packed: Tensor) -> Tensor:
        """uint8, 16 bytes for each 80 codes → int8 codes."""
        codes = packed.new_empty(packed.numel() * 5, dtype=torch.int8)
        self._call("unpack_base3", (), packed, packed.numel() // 16, torch.get_num_threads(), codes)
        return codes

    def _call(self, name: str, dtypes: tuple[torch.dtype, ...], *arguments: Tensor | int | None) -> None:
        function = getattr(self._library, "_".join([name, *(DTYPE_NAMES[dtype] for dtype in dtypes)]))
        function(*(ctypes.c_int64(a) if isinstance(a, int) else _address(a) for a in arguments))


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
