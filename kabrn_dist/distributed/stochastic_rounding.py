"""Stochastic rounding of gradients to int8 with one scale a row: unbiased, and without a generator's state.

The noise is a hash of the value's bits and its position, so that the same input is rounded the same way in every run.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MIN_STEP = 1e-30


def round_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows to int8; `codes · step` is the value. A row with an infinity or NaN gets no finite value.

    Args:
        rows: [N,D] of any float dtype.

    Returns:
        codes [N,D] int8, and step [N,1] fp32 (or wider).
    """
    values = rows.to(torch.promote_types(rows.dtype, torch.float32))
    step = values.abs().amax(1, keepdim=True) / 127
    codes = values / step.clamp(min=_MIN_STEP)
    codes.add_(_noise(values), alpha=2**-24).round_().clamp_(-127, 127)
    return codes.to(torch.int8), step


def _noise(values: Tensor) -> Tensor:
    """[N,D] int32 from −2²³ to 2²³ − 1, a function of each value's bits and position alone.

    Two rounds of multiplication, as in the finaliser of MurmurHash3, and the bits that they mix best, the upper ones.
    """
    row, column = (torch.arange(n, dtype=torch.int32, device=values.device) for n in values.shape)
    x = (row * -2048144789)[:, None] + column * -1640531527
    x ^= values.float().contiguous().view(torch.int32)
    x *= -1028477387
    x ^= x >> 15
    x *= -2048144789
    return x.bitwise_right_shift_(8)
