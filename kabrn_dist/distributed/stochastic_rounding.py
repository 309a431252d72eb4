"""Gradients in int8 with one scale a row, rounded up or down by chance so that they are right on average.

The chance is a hash of the value's bits and its place: the same input is rounded the same way in every run, and there
is no generator whose state would have to be kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SMALLEST = 1e-30


def round_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[N,D] of any float dtype → codes [N,D] int8 and step [N,1] fp32 (or wider): `codes · step` is the value.

    A row with an infinity or NaN comes back without a finite value.
    """
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    step = wide.abs().amax(1, keepdim=True) / 127
    codes = wide / step.clamp(min=_SMALLEST)
    codes.add_(_noise(wide), alpha=2**-24).round_().clamp_(-127, 127)
    return codes.to(torch.int8), step


def _noise(values: Tensor) -> Tensor:
    """[N,D] int32 from −2²³ to 2²³ − 1, a function of each value's bits and place alone.

    Two rounds of multiplication, as in the finaliser of MurmurHash3, and the bits that they mix best, the upper ones.
    """
    row, column = (torch.arange(n, dtype=torch.int32, device=values.device) for n in values.shape)
    x = (row * -2048144789)[:, None] + column * -1640531527
    x ^= values.float().contiguous().view(torch.int32)
    x *= -1028477387
    x ^= x >> 15
    x *= -2048144789
    return x.bitwise_right_shift_(8)
