"""Select, once a process, what computes functions and products: C kernels, or torch's own operations."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kabrn_dist.kernels.build import KernelUnavailable, find_compiler
from kabrn_dist.kernels.cross_entropy import CrossEntropyKernel
from kabrn_dist.kernels.gate import GateKernel
from kabrn_dist.kernels.heads import HeadsKernel
from kabrn_dist.kernels.short_conv import ShortConvKernel
from kabrn_dist.kernels.spline import SplineKernel
from kabrn_dist.kernels.ternary import TernaryKernel
from kabrn_dist.kernels.univariate import KERNEL_DTYPES, UnivariateKernel

ENV_SWITCH = "KABRN_KERNELS"


class Kernels(NamedTuple):
    """All C kernels.

    Attributes:
        univariate: learned functions with RMSNorm and the quantizer.
        ternary: rounding, packing and scaling around ternary products.
        gate: SwiGLU's gate with RMSNorm and the quantizer.
        spline: expansion into B-splines.
        cross_entropy: cross-entropy of logits, with its gradient in their place.
        short_conv: the short causal convolution of packed documents.
        heads: rotation and norm of heads.
    """

    univariate: UnivariateKernel
    ternary: TernaryKernel
    gate: GateKernel
    spline: SplineKernel
    cross_entropy: CrossEntropyKernel
    short_conv: ShortConvKernel
    heads: HeadsKernel


class KernelSelection(NamedTuple):
    """Kernels selected for a type of device.

    Attributes:
        kernels: None for torch's own operations.
        reason: for the log, such as "fused C kernels (gcc)" or "eager torch, because no C compiler was found".
    """

    kernels: Kernels | None
    reason: str


@cache
def select_kernels(device: str) -> KernelSelection:
    """Select the kernels of a type of device ("cpu", "cuda"), and compile them if needed, once a process.

    KABRN_KERNELS=off in the environment selects torch's own operations.
    """
    try:
        if os.environ.get(ENV_SWITCH) == "off":
            raise KernelUnavailable(f"{ENV_SWITCH} is off")
        if device != "cpu":
            raise KernelUnavailable(f"there is no kernel for {device}")
        kernels = Kernels(
            UnivariateKernel(),
            TernaryKernel(),
            GateKernel(),
            SplineKernel(),
            CrossEntropyKernel(),
            ShortConvKernel(),
            HeadsKernel(),
        )
        return KernelSelection(kernels, f"fused C kernels ({Path(find_compiler()).name})")
    except KernelUnavailable as why:
        return KernelSelection(None, f"eager torch, because {why}")


def kernels_for(x: Tensor) -> Kernels | None:
    """Return the kernels that take x; None where torch's own operations are used."""
    return select_kernels(x.device.type).kernels if x.dtype in KERNEL_DTYPES else None


# Rows and widths of the product that is timed, and how often.
_TIMED_SIZE, _TIMED_RUNS = 384, 5


@cache
def int8_matmul_is_faster(device: str, dtype: torch.dtype) -> bool:
    """Return whether a type of device multiplies codes faster in int8 than in fp32. Measured once a process.

    Both give the same bits, so the choice changes speed only.
    """
    if dtype == torch.float64:
        return False
    size = _TIMED_SIZE
    codes = (torch.arange(size * size, device=device) * 37 % 255 - 127).view(size, size).to(torch.int8)
    signs = (torch.arange(size * size, device=device) * 11 % 3 - 1).view(size, size).to(torch.int8)
    codes32, signs32 = codes.float(), signs.float()
    try:
        is_exact = torch.equal(torch._int_mm(codes, signs.T).float(), codes32 @ signs32.T)
    except RuntimeError:
        return False
    return is_exact and _seconds(lambda: torch._int_mm(codes, signs.T), device) < _seconds(
        lambda: codes32 @ signs32.T, device
    )


# How much faster fp32 must be. Its sums are rounded differently, so a choice must not depend on a close race.
_CLEARLY = 1.25


@cache
def matmul_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to multiply values of `dtype` in, before rounding back. Measured once a process.

    fp32 on processors without units for half precision, or with slow ones; elsewhere `dtype` itself.
    """
    if device != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    size = _TIMED_SIZE
    narrow = torch.linspace(-1, 1, size * size).view(size, size).to(dtype)
    narrow32 = narrow.float()
    times: dict[torch.dtype, list[float]] = {dtype: [], torch.float32: []}
    for _ in range(_TIMED_RUNS):
        for values in (narrow, narrow32):
            # CPU time of this process, whatever else runs.
            begin = time.process_time()
            torch.mm(values, values)
            times[values.dtype].append(time.process_time() - begin)
    return torch.float32 if min(times[dtype]) > _CLEARLY * min(times[torch.float32]) else dtype


def _seconds(run: Callable[[], Tensor], device: str) -> float:
    """The shortest of a few runs."""
    times = []
    for _ in range(_TIMED_RUNS):
        begin = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)
