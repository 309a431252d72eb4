"""The functions of grouped KAN experts, RMSNorm and the int8 quantizer as one C kernel, for CPUs (univariate.c).

Shapes: N rows, D width, E experts, G groups of channels, C coefficients of a function.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kabrn_dist.kernels.build import load_library

# Dtypes that the C files take, and their names there.
KERNEL_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
ROW_BLOCK = 64  # rows over which gradients of coefficients are summed at a time


class UnivariateArgs(ctypes.Structure):
    """Arguments of all calls, the struct `args` of univariate.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("width", "groups", "experts", "block", "blocks", "threads")),
        *((name, ctypes.c_void_p) for name in ("counts", "coefficients", "factor")),
        *((name, ctypes.c_float) for name in ("centre", "reach")),
        ("quantized", ctypes.c_int32),
    ]


class UnivariateFunction(NamedTuple):
    """Kind of a function, and what is the same for all experts and groups.

    Attributes:
        kind: "rational" (a₀…a₅, b₁…b₄), "chebyshev" (c₀…c₃), or without coefficients "relu2" (relu(RMSNorm(x))²) and
            "identity".
        center: the range of chebyshev is center ± reach.
        reach: half of its width.
    """

    kind: str
    center: float = 0.0
    reach: float = 1.0


class UnivariateKernel:
    """q(RMSNorm(φ(x·factor))) forward and backward, for fp32 and bf16 on the CPU.

    Raises:
        Unavailable: see `build.load`.
    """

    def __init__(self) -> None:
        self._library = load_library(Path(__file__).with_name("univariate.c"))
        self._library.scratch_floats.restype = ctypes.c_int64

    def forward(
        self,
        function: UnivariateFunction,
        x: Tensor,
        factor: Tensor | None,
        coefficients: Tensor,
        rows_per_expert: Sequence[int],
        quantized: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Compute the functions in one pass.

        Args:
            function: which functions.
            x: [N,D] fp32 or bf16, contiguous, rows sorted by expert.
            factor: [N,1] fp32: the functions see x·factor; None for x itself.
            coefficients: [E,G,C] fp32, contiguous.
            rows_per_expert: rows of each expert.
            quantized: whether to quantize.

        Returns:
            codes [N,D] in the dtype of x, scale [N,1] fp32 (1 if not quantized), 1/rms [N,1] fp32, and
            if quantized, the codes as int8.
        """
        out, scale = torch.empty_like(x), x.new_empty(len(x), 1, dtype=torch.float32)
        rms, int8_codes = torch.empty_like(scale), torch.empty_like(x, dtype=torch.int8) if quantized else None
        args, scratch, _keep = self._args(function, x, factor, coefficients, rows_per_expert, quantized)
        self._call(function, "forward", args, x, scratch, out, scale, rms, int8_codes)
        return out, scale, rms, int8_codes

    def backward(
        self,
        function: UnivariateFunction,
        x: Tensor,
        factor: Tensor | None,
        coefficients: Tensor,
        rows_per_expert: Sequence[int],
        grad: Tensor,
        scale: Tensor,
        rms: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of x and of the coefficients from that of the codes (straight through the rounding)."""
        grad_x, grad_coefficients = torch.empty_like(x), torch.empty_like(coefficients)
        args, scratch, _keep = self._args(function, x, factor, coefficients, rows_per_expert, True)
        partial = coefficients.new_empty(args.blocks, *coefficients.shape[1:])
        self._call(function, "backward", args, x, grad, scale, rms, scratch, partial, grad_x, grad_coefficients)
        return grad_x, grad_coefficients

    def _args(
        self,
        function: UnivariateFunction,
        x: Tensor,
        factor: Tensor | None,
        coefficients: Tensor,
        counts: Sequence[int],
        q: bool,
    ) -> tuple[UnivariateArgs, Tensor, object]:
        experts, groups, _ = coefficients.shape
        if len(counts) != experts or sum(counts) != len(x) or min(counts) < 0 or x.shape[1] % groups:
            # The kernel would write out of bounds.
            raise ValueError(f"{list(counts)} rows of {experts} experts, {groups} groups do not fit x {list(x.shape)}")
        rows = (ctypes.c_int64 * experts)(*counts)
        args = UnivariateArgs(
            x.shape[1],
            groups,
            experts,
            ROW_BLOCK,
            sum(-(-n // ROW_BLOCK) for n in counts),
            torch.get_num_threads(),
            ctypes.addressof(rows),
            coefficients.data_ptr(),
            None if factor is None else factor.data_ptr(),
            function.center,
            function.reach,
            q,
        )
        scratch = x.new_empty(args.threads * self._library.scratch_floats(ctypes.byref(args)), dtype=torch.float32)
        return args, scratch, rows

    def _call(
        self, function: UnivariateFunction, direction: str, args: UnivariateArgs, first: Tensor, *others: Tensor | None
    ) -> None:
        run = getattr(self._library, f"{function.kind}_{KERNEL_DTYPES[first.dtype]}_{direction}")
        run(ctypes.byref(args), *(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (first, *others)))
