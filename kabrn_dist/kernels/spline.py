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
# What `expand` leaves of a value: itself, its int8 code, or its code over the scale.
PLAIN, CODES, VALUES = range(3)


class SplineSpec(NamedTuple):
    """Uniform splines of degree 1…MOST_DEGREE, and how they leave the grid.

    Attributes:
        low, high, intervals, degree: of the grid.
        peak: the largest value inside it.
        values, slopes: [p + 1] of the first functions at the low end; slopes a step.
    """

    low: float
    high: float
    intervals: int
    degree: int
    peak: float
    values: Sequence[float]
    slopes: Sequence[float]


class SplineArgs(ctypes.Structure):
    """`job` of spline.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "intervals", "degree", "threads", "form")),
        *((name, ctypes.c_float) for name in ("low", "high", "per_step", "peak")),
        *((name, ctypes.c_float * (MAX_DEGREE + 1)) for name in ("values", "slopes")),
    ]


class SplineKernel:
    """Values of all splines and of silu, and back from their gradient; for fp32 and bf16, all tensors contiguous.

    Raises:
        Unavailable: see `build.load`.
    """

    def __init__(self) -> None:
        self._library = load_library(Path(__file__).with_name("spline.c"))

    def expand(self, curve: SplineSpec, x: Tensor, form: int, out: Tensor) -> Tensor:
        """x [N,I] → out [N,(K+1)·I] of its dtype, and the scales [N,2] fp32 of splines and silu (1 where PLAIN)."""
        scale = x.new_empty(len(x), 2, dtype=torch.float32)
        self._call("forward", curve, form, x, out, scale)
        return scale

    def gather(self, curve: SplineSpec, x: Tensor, grad: Tensor, gammas: Tensor) -> Tensor:
        """The gradient [N,(K+1)·I] of the values, times gammas [2] fp32 of splines and silu → that of x [N,I]."""
        out = torch.empty_like(x)
        self._call("backward", curve, PLAIN, x, grad, gammas, out)
        return out

    def _call(self, way: str, curve: SplineSpec, form: int, x: Tensor, *tensors: Tensor) -> None:
        rows, inputs = x.shape
        wide = tensors[0]
        size = curve.intervals + curve.degree + 1
        if wide.shape != (rows, inputs * size) or wide.dtype != x.dtype or not 1 <= curve.degree <= MAX_DEGREE:
            # The kernel would read where nothing is.
            raise ValueError(f"{list(wide.shape)} in {wide.dtype} is not the expansion of {list(x.shape)} in {x.dtype}")
        per_step = curve.intervals / (curve.high - curve.low)
        ends = (pad(part) for part in (curve.values, curve.slopes))
        job = SplineArgs(
            *(rows, inputs, curve.intervals, curve.degree, torch.get_num_threads(), form),
            *(curve.low, curve.high, per_step, curve.peak),
            *ends,
        )
        run = getattr(self._library, f"{KERNEL_DTYPES[x.dtype]}_{way}")
        run(ctypes.byref(job), *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, *tensors)))


def pad(part: Sequence[float]) -> ctypes.Array[ctypes.c_float]:
    return (ctypes.c_float * (MAX_DEGREE + 1))(*part)
