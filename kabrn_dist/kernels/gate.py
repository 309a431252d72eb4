"""SwiGLU's gate, RMSNorm and the int8 quantizer as one C kernel, for CPUs (gate.c).

Shapes: N rows, D width.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from kabrn_dist.kernels.build import load_library
from kabrn_dist.kernels.univariate import KERNEL_DTYPES


class GateArgs(ctypes.Structure):
    """Arguments of all calls, the struct `args` of gate.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "width", "threads")),
        *((name, ctypes.c_void_p) for name in ("gate_factor", "up_factor")),
        ("quantized", ctypes.c_int32),
    ]


class GateKernel:
    """q(RMSNorm(silu(gate·gate_factor) · (up·up_factor))) forward and backward, for fp32 and bf16.

    Tensors are contiguous: gate and up [N,D] of one dtype, their factors [N,1] fp32.

    Raises:
        Unavailable: see `build.load`.
    """

    def __init__(self) -> None:
        self._library = load_library(Path(__file__).with_name("gate.c"))
        self._library.scratch_floats.restype = ctypes.c_int64

    def forward(
        self, gate: Tensor, gate_factor: Tensor, up: Tensor, up_factor: Tensor, quantized: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Compute the gate in one pass.

        Returns:
            codes [N,D] in the dtype of gate, scale [N,1] fp32 (1 if not quantized), 1/rms [N,1] fp32, and, if
            quantized, the codes as int8.
        """
        out, scale = torch.empty_like(gate), torch.empty_like(gate_factor)
        rms, int8_codes = torch.empty_like(scale), torch.empty_like(gate, dtype=torch.int8) if quantized else None
        args, scratch = self._args(gate, gate_factor, up, up_factor, quantized)
        self._call("forward", args, gate, up, scratch, out, scale, rms, int8_codes)
        return out, scale, rms, int8_codes

    def backward(
        self,
        gate: Tensor,
        gate_factor: Tensor,
        up: Tensor,
        up_factor: Tensor,
        grad: Tensor,
        scale: Tensor,
        rms: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of gate and up from that of the codes (straight through the rounding)."""
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        args, scratch = self._args(gate, gate_factor, up, up_factor, True)
        self._call("backward", args, gate, up, grad, scale, rms, scratch, grad_gate, grad_up)
        return grad_gate, grad_up

    def exp(self, x: Tensor) -> Tensor:
        """Return eˣ of x [D] fp32 as the gate computes it, for tests."""
        out = torch.empty_like(x)
        pointers = ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(len(x)), ctypes.c_void_p(out.data_ptr())
        self._library.exp_all(*pointers)
        return out

    def _args(
        self, gate: Tensor, gate_factor: Tensor, up: Tensor, up_factor: Tensor, quantized: bool
    ) -> tuple[GateArgs, Tensor]:
        rows, width = gate.shape
        if up.shape != gate.shape or up.dtype != gate.dtype or not len(gate_factor) == len(up_factor) == rows:
            # The kernel would read out of bounds.
            shapes = [list(part.shape) for part in (gate_factor, up, up_factor)]
            raise ValueError(f"gate {list(gate.shape)} does not fit its factor, up and its factor: {shapes}")
        factors = gate_factor.data_ptr(), up_factor.data_ptr()
        args = GateArgs(rows, width, torch.get_num_threads(), *factors, quantized)
        floats = args.threads * self._library.scratch_floats(ctypes.byref(args))
        return args, gate.new_empty(floats, dtype=torch.float32)

    def _call(self, direction: str, args: GateArgs, first: Tensor, *others: Tensor | None) -> None:
        run = getattr(self._library, f"{KERNEL_DTYPES[first.dtype]}_{direction}")
        run(ctypes.byref(args), *(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (first, *others)))
