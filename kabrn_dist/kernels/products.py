"""What a ternary product needs around the multiplication, each in one pass over memory on the CPU (products.c).

Shapes: N rows, D width, E matrices, O output width, I input width.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from kabrn_dist.kernels.build import load
from kabrn_dist.kernels.functions import DTYPES


class Products:
    """Rows scaled, latents rounded to −1, 0, 1, signs widened; for fp32 and bf16. All tensors contiguous.

    Raises:
        Unavailable: see `build.load`.
    """

    def __init__(self) -> None:
        self._library = load(Path(__file__).with_name("products.c"))
        self._library.partials.restype = ctypes.c_int64

    def scale(self, x: Tensor, factor: Tensor) -> Tensor:
        """x [N,...] times factor [N] (of any shape with N elements, fp32) → the same in the dtype of x."""
        out = torch.empty_like(x)
        rows, width = len(x), x[:1].numel()
        self._call("scale", x.dtype, x, factor, rows, width, torch.get_num_threads(), out)
        return out

    def ternary(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[E,O,I] latents → codes [E,O,I] in their dtype, γ [E,1,1] fp32, and the codes again as int8."""
        matrices, each = len(weight), weight[:1].numel()
        codes, kept = torch.empty_like(weight), torch.empty_like(weight, dtype=torch.int8)
        gamma = weight.new_empty(matrices, 1, 1, dtype=torch.float32)
        pieces = self._library.partials(ctypes.c_int64(matrices), ctypes.c_int64(each))
        partial = weight.new_empty(pieces, dtype=torch.float32)
        threads = torch.get_num_threads()
        self._call("ternary", weight.dtype, weight, matrices, each, threads, partial, gamma, codes, kept)
        return codes, gamma, kept

    def widen(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """int8 → the same numbers in fp32 or bf16."""
        out = torch.empty_like(codes, dtype=dtype)
        self._call("widen", dtype, codes, codes.numel(), torch.get_num_threads(), out)
        return out

    def _call(self, name: str, dtype: torch.dtype, *arguments: Tensor | int) -> None:
        function = getattr(self._library, f"{name}_{DTYPES[dtype]}")
        function(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int64(a) for a in arguments))
