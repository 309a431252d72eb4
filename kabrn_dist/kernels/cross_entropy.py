"""Cross-entropy of logits and its gradient as a C kernel, for CPUs (cross_entropy.c).

Shapes: N rows, C classes.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from kabrn_dist.kernels.build import load_library
from kabrn_dist.kernels.univariate import KERNEL_DTYPES


class CrossEntropyArgs(ctypes.Structure):
    """Arguments of all calls, the struct `args` of cross_entropy.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "width", "threads")),
        ("targets", ctypes.c_void_p),
    ]


class CrossEntropyKernel:
    """Cross-entropy forward and backward, for fp32 and bf16.

    Tensors are contiguous: logits [N,C], targets [N] int64, of which −100 counts for nothing.

    Raises:
        KernelUnavailable: see `build.load_library`.
    """

    def __init__(self) -> None:
        self._library = load_library(Path(__file__).with_name("cross_entropy.c"))

    def forward(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy [N] fp32 in nats, 0 for rows without a target, and log Σ exp(logits) [N] fp32."""
        nats = logits.new_empty(len(logits), dtype=torch.float32)
        log_sum = torch.empty_like(nats)
        self._call("forward", logits, targets, nats, log_sum)
        return nats, log_sum

    def backward_(self, logits: Tensor, targets: Tensor, log_sum: Tensor, grad: Tensor) -> Tensor:
        """Put the gradient of the logits in their place, from that of the cross-entropy [N] fp32; return it."""
        self._call("backward", logits, targets, log_sum, grad)
        return logits

    def _call(self, direction: str, logits: Tensor, targets: Tensor, *others: Tensor) -> None:
        rows, classes = logits.shape
        if targets.shape != (rows,) or targets.dtype != torch.int64:
            # The kernel would read out of bounds.
            raise ValueError(f"{rows} rows of logits do not fit targets {list(targets.shape)} {targets.dtype}")
        args = CrossEntropyArgs(rows, classes, torch.get_num_threads(), targets.data_ptr())
        run = getattr(self._library, f"{KERNEL_DTYPES[logits.dtype]}_{direction}")
        run(ctypes.byref(args), *(ctypes.c_void_p(each.data_ptr()) for each in (logits, *others)))
