"""Low-rank factors beside a matrix (LoRA, arXiv 2106.09685), read by the same quantized input.

Shapes:
    E: matrices (experts).
    O: output features.
    I: input features.
    R: rank.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LowRank(NamedTuple):
    """Factors of a matrix that is added to another one: W·x becomes W·x + B·(A·x).

    Attributes:
        a: [E,R,I] fp32.
        b: [E,O,R] fp32, with all factors in it.
    """

    a: Tensor
    b: Tensor
