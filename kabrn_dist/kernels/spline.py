"""The passes around the products of a layer with a spline on every edge, as a C kernel for CPUs (spline.c).

Shapes: N rows, I inputs, K = G + p basis functions; the K splines of all inputs come first, then their silu.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kabrn_dist.kernels.build import load_library
from kabrn_dist.kernels.univariate import KERNEL_DTYPES

MAX_DEGREE = 7
# Output of `expand`: a value itself, its int8 code, or its code divided by the scale.
PLAIN, CODES, VALUES = range(3)


class SplineSpec(NamedTuple):
    """Uniform splines of degree 1…MAX_DEGREE, and their continuation outside the grid.

    Attributes:
        low: lower end of the grid.
        high: upper end of the grid.
        intervals: of the grid.
        degree: p.
        peak: the largest value inside the grid.
        values: [p + 1] of the first functions at the low end.
        slopes: [p + 1] of these functions there, a step.
    """

    low: float
    high: float
    intervals: int
    degree: int
    peak: float
    values: Sequence[float]
    slopes: Sequence[float]


class SplineArgs(ctypes.Structure):
    """Arguments of all calls, the struct `args` of spline.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "intervals", "degree", "threads", "form")),
        *((name, ctypes.c_float) for name in ("low", "high", "per_step", "peak")),
        *((name, ctypes.c_float * (MAX_DEGREE + 1)) for name in ("values", "slopes")),
    ]


class SplineKernel:
    """Values of all splines and of silu, and their gradient; for fp32 and bf16, all tensors contiguous.

    Raises:
        Unavailable: see `build.load`.
    """

    def __init__(self) -> None:
        self._library = load_library(Path(__file__).with_name("spline.c"))

    def expand(self, curve: SplineSpec, x: Tensor, form: int, out: Tensor) -> Tensor:
        """Write the values of x [N,I] to out [N,(K+1)·I] of its dtype; return scales [N,2] fp32 of splines and silu."""
        scale = x.new_empty(len(x), 2, dtype=torch.float32)
        self._call("forward", curve, form, x, out, scale)
        return scale

    def gather(self, curve: SplineSpec, x: Tensor, grad: Tensor, gammas: Tensor) -> Tensor:
        """Return the gradient of x [N,I] from that of the values [N,(K+1)·I]; gammas [2] are of splines and silu."""
        out = torch.empty_like(x)
        self._call("backward", curve, PLAIN, x, grad, gammas, out)
        return out

    def _call(self, direction: str, curve: SplineSpec, form: int, x: Tensor, *tensors: Tensor) -> None:
        rows, inputs = x.shape
        values = tensors[0]
        size = curve.intervals + curve.degree + 1
        if values.shape != (rows, inputs * size) or values.dtype != x.dtype or not 1 <= curve.degree <= MAX_DEGREE:
            # The kernel would read out of bounds.
            raise ValueError(
                f"{list(values.shape)} in {values.dtype} is not the expansion of {list(x.shape)} in {x.dtype}"
            )
        per_step = curve.intervals / (curve.high - curve.low)
        ends = (_pad(part) for part in (curve.values, curve.slopes))
        args = SplineArgs(
            *(rows, inputs, curve.intervals, curve.degree, torch.get_num_threads(), form),
            *(curve.low, curve.high, per_step, curve.peak),
            *ends,
        )
        run = getattr(self._library, f"{KERNEL_DTYPES[x.dtype]}_{direction}")
        run(ctypes.byref(args), *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, *tensors)))


def _pad(part: Sequence[float]) -> ctypes.Array[ctypes.c_float]:
    return (ctypes.c_float * (MAX_DEGREE + 1))(*part)
