"""SwiGLU's gate, RMSNorm and the int8 quantiser as one C kernel, for CPUs (gate.c).

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
    """`job` of gate.c."""

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
        """One pass.

        Returns:
            codes [N,D] in the dtype of gate, scale [N,1] fp32 (1 where not quantised), 1/rms [N,1] fp32, and where
            quantised the codes again as int8.
        """
        out, scale = torch.empty_like(gate), torch.empty_like(gate_factor)
        rms, kept = torch.empty_like(scale), torch.empty_like(gate, dtype=torch.int8) if quantized else None
        job, scratch = self._job(gate, gate_factor, up, up_factor, quantized)
        self._call("forward", job, gate, up, scratch, out, scale, rms, kept)
        return out, scale, rms, kept

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
        """From the gradient of the codes (straight through the rounding) to those of gate and up."""
        for_gate, for_up = torch.empty_like(gate), torch.empty_like(up)
        job, scratch = self._job(gate, gate_factor, up, up_factor, True)
        self._call("backward", job, gate, up, grad, scale, rms, scratch, for_gate, for_up)
        return for_gate, for_up

    def exp(self, x: Tensor) -> Tensor:
        """eˣ as the gate computes it, for tests. x: [D] fp32."""
        out = torch.empty_like(x)
        pointers = ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(len(x)), ctypes.c_void_p(out.data_ptr())
        self._library.exp_all(*pointers)
        return out

    def _job(
        self, gate: Tensor, gate_factor: Tensor, up: Tensor, up_factor: Tensor, quantized: bool
    ) -> tuple[GateArgs, Tensor]:
        rows, width = gate.shape
        if up.shape != gate.shape or up.dtype != gate.dtype or not len(gate_factor) == len(up_factor) == rows:
            # The kernel would read where nothing is.
            shapes = [list(part.shape) for part in (gate_factor, up, up_factor)]
            raise ValueError(f"gate {list(gate.shape)} does not fit its factor, up and its factor: {shapes}")
        factors = gate_factor.data_ptr(), up_factor.data_ptr()
        job = GateArgs(rows, width, torch.get_num_threads(), *factors, quantized)
        floats = job.threads * self._library.scratch_floats(ctypes.byref(job))
        return job, gate.new_empty(floats, dtype=torch.float32)

    def _call(self, way: str, job: GateArgs, first: Tensor, *others: Tensor | None) -> None:
        run = getattr(self._library, f"{KERNEL_DTYPES[first.dtype]}_{way}")
        run(ctypes.byref(job), *(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (first, *others)))
