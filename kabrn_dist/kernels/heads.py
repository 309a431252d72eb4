"""Rotation and RMSNorm of heads as C kernels, for CPUs (heads.c): one pass that also brings heads in another order.

Shapes: B batch, H heads, T time, D width of a head. Tensors are [B,H,T,D] in any order in memory, but the values of a
head lie together; results lie as [B,T,H,D] or [B,H,T,D], whichever the caller's does not.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from kabrn_dist.kernels.build import load_library
from kabrn_dist.kernels.univariate import KERNEL_DTYPES

_Strides = ctypes.c_int64 * 3


class HeadsArgs(ctypes.Structure):
    """Arguments of all calls, the struct `args` of heads.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "heads", "time", "width", "threads")),
        *((name, _Strides) for name in ("from_strides", "to_strides", "grad_strides")),
        *((name, ctypes.c_float) for name in ("eps", "direction")),
    ]


class HeadsKernel:
    """Rotation and norm of heads, for fp32 and bf16.

    Raises:
        KernelUnavailable: see `build.load_library`.
    """

    def __init__(self) -> None:
        self._library = load_library(Path(__file__).with_name("heads.c"))

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, back: bool, by_head: bool) -> Tensor:
        """Turn each pair (first half, second half) by its angle.

        Args:
            x: [B,H,T,D], D even.
            cos: [B,1,T,D/2] fp32, of the angles.
            sin: [B,1,T,D/2] fp32.
            back: turn by the negative angles.
            by_head: the result lies as [B,H,T,D]; else as [B,T,H,D].
        """
        half = x.shape[-1] // 2
        if x.shape[-1] % 2 or not cos.shape == sin.shape == (x.shape[0], 1, x.shape[2], half):
            # The kernel would read out of bounds.
            raise ValueError(f"heads {list(x.shape)} do not fit angles {list(cos.shape)}")
        out = _empty(x, by_head)
        args = _args(x, out, direction=-1.0 if back else 1.0)
        self._call("rotate", args, x, cos.contiguous(), sin.contiguous(), out)
        return out

    def norm(self, x: Tensor, eps: float) -> Tensor:
        """Divide each head by its root mean square; the result lies as [B,T,H,D]."""
        out = _empty(x, by_head=False)
        self._call("norm", _args(x, out, eps=eps), x, out)
        return out

    def norm_grad(self, x: Tensor, grad: Tensor, eps: float) -> Tensor:
        """Return the gradient of x, which lies as [B,H,T,D], from that of the normalized heads."""
        if grad.shape != x.shape or grad.dtype != x.dtype:
            raise ValueError(f"heads {list(x.shape)} do not fit their gradient {list(grad.shape)}")
        out = _empty(x, by_head=True)
        self._call("norm_grad", _args(x, out, grad, eps=eps), x, grad, out)
        return out

    def _call(self, name: str, args: HeadsArgs, first: Tensor, *others: Tensor) -> None:
        run = getattr(self._library, f"{KERNEL_DTYPES[first.dtype]}_{name}")
        run(ctypes.byref(args), *(ctypes.c_void_p(each.data_ptr()) for each in (first, *others)))


def _empty(x: Tensor, by_head: bool) -> Tensor:
    batch, heads, time, width = x.shape
    return x.new_empty(x.shape) if by_head else x.new_empty(batch, time, heads, width).transpose(1, 2)


def _args(x: Tensor, out: Tensor, grad: Tensor | None = None, eps: float = 0.0, direction: float = 0.0) -> HeadsArgs:
    tensors = (x, out, x if grad is None else grad)
    # The step to the next value of heads of one value may be anything.
    if x.numel() and x.shape[-1] > 1 and any(each.stride(-1) != 1 for each in tensors):
        raise ValueError("the values of a head do not lie together")
    strides = (_Strides(*each.stride()[:3]) for each in tensors)
    return HeadsArgs(*x.shape, torch.get_num_threads(), *strides, eps, direction)
