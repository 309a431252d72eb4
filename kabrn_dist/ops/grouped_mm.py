"""Products of rows that are sorted by matrix, each with its own, one product a matrix.

Shapes:
    N: rows, sorted by matrix.
    I: input features.
    O: output features.
    E: matrices (experts).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def grouped_mm(rows: Tensor, weight: Tensor, rows_per_matrix: Sequence[int]) -> Tensor:
    """Multiply rows [N,I], sorted by matrix, by matrices [E,O,I] → [N,O]; int8 gives int32."""
    multiply, dtype = (torch._int_mm, torch.int32) if rows.dtype == torch.int8 else (torch.mm, rows.dtype)
    if len(rows_per_matrix) == 1:
        return multiply(rows, weight[0].T)
    out = rows.new_empty(len(rows), weight.shape[1], dtype=dtype)
    start = 0
    for matrix, n in zip(weight, rows_per_matrix, strict=True):
        stop, padded = start + n, start + _common_count(n, rows)
        if n and padded <= len(rows):
            # What this writes beyond its own rows, the matrices of those rows write again.
            multiply(rows[start:padded], matrix.T, out=out[start:padded])
        elif n:
            out[start:stop] = multiply(_pad_rows(rows[start:stop], padded - stop), matrix.T)[:n]
        start = stop
    return out


def grouped_weight_grad(left: Tensor, right: Tensor, rows_per_matrix: Sequence[int]) -> Tensor:
    """Sum the outer products of rows [N,O] and [N,I], sorted by matrix → [E,O,I]; zeros for matrices without rows."""
    if len(rows_per_matrix) == 1:
        return (left.T @ right)[None]
    out = left.new_empty(len(rows_per_matrix), left.shape[1], right.shape[1])
    start = 0
    for matrix, n in zip(out, rows_per_matrix, strict=True):
        missing = _common_count(n, left) - n
        if n:
            factors = (_pad_rows(part[start : start + n], missing) for part in (left, right))
            torch.mm(next(factors).T, next(factors), out=matrix)
        else:
            matrix.zero_()
        start += n
    return out


def _common_count(n: int, rows: Tensor) -> int:
    """The next number of rows, from n on, that others have too; n itself where a new number costs nothing.

    oneDNN compiles a kernel for each number of rows that it has not met, in half precision on CPUs: 0.7 ms, where a
    product of an expert takes 0.1 ms, and experts get other numbers in every step. There are 16 in each octave from 512
    on, and all are multiples of 32.
    """
    if rows.device.type != "cpu" or rows.dtype not in (torch.bfloat16, torch.float16):
        return n
    step = max(32, (1 << max(n.bit_length() - 1, 0)) // 16)
    return -(-n // step) * step


def _pad_rows(rows: Tensor, missing: int) -> Tensor:
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows
