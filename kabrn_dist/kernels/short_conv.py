"""The short causal convolution of packed documents as a C kernel, for CPUs (short_conv.c).

Shapes: B batch, T time, D width, J taps on earlier tokens.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from kabrn_dist.kernels.build import load_library
from kabrn_dist.kernels.univariate import KERNEL_DTYPES

MAX_TAPS = 64


class ShortConvArgs(ctypes.Structure):
    """Arguments of all calls, the struct `args` of short_conv.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "time", "width", "taps", "threads")),
        *((name, ctypes.c_void_p) for name in ("weight", "positions")),
    ]


class ShortConvKernel:
    """The convolution forward and backward, for fp32 and bf16.

    Tensors are contiguous: x [B,T,D] and before [B,J,D] of one dtype, weight [J,D] fp32 with J ≤ `MAX_TAPS`, positions
    [B,T] int64.

    Raises:
        KernelUnavailable: see `build.load_library`.
    """

    def __init__(self) -> None:
        self._library = load_library(Path(__file__).with_name("short_conv.c"))
        self._library.blocks.restype = ctypes.c_int64

    def forward(self, x: Tensor, before: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
        """Return the convolved tokens [B,T,D]."""
        out = torch.empty_like(x)
        self._call("forward", x, before, weight, positions, out)
        return out

    def backward(
        self, x: Tensor, before: Tensor, weight: Tensor, positions: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of x, before and weight from that of the result."""
        # Zeros, as the kernel writes nothing for a row without tokens.
        grad_x, grad_before = torch.empty_like(x), torch.zeros_like(before)
        blocks = self._library.blocks(ctypes.c_int64(x.shape[1]))
        sums = weight.new_empty(x.shape[0] * blocks, *weight.shape)
        self._call("backward", x, before, weight, positions, grad, grad_x, grad_before, sums)
        return grad_x, grad_before, sums.sum(0)

    def _call(
        self, direction: str, x: Tensor, before: Tensor, weight: Tensor, positions: Tensor, *others: Tensor
    ) -> None:
        (batch, time, width), taps = x.shape, len(weight)
        fits = before.shape == (batch, taps, width) and weight.shape == (taps, width) and taps <= MAX_TAPS
        if not fits or positions.shape != (batch, time) or before.dtype != x.dtype:
            # The kernel would read out of bounds.
            shapes = [list(each.shape) for each in (before, weight, positions)]
            raise ValueError(f"x {list(x.shape)} does not fit before, weight and positions: {shapes}")
        args = ShortConvArgs(batch, time, width, taps, torch.get_num_threads(), weight.data_ptr(), positions.data_ptr())
        run = getattr(self._library, f"{KERNEL_DTYPES[x.dtype]}_{direction}")
        run(ctypes.byref(args), *(ctypes.c_void_p(each.data_ptr()) for each in (x, before, *others)))
