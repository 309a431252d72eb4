"""The one choice of what computes functions and products: C kernels, or torch's own operations."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from kabrn_dist.kernels.build import Unavailable, find_compiler
from kabrn_dist.kernels.functions import DTYPES, Functions
from kabrn_dist.kernels.gate import Gate
from kabrn_dist.kernels.products import Products
from kabrn_dist.kernels.spline import Spline

SWITCH = "KABRN_KERNELS"


class Kernels(NamedTuple):
    functions: Functions
    products: Products
    gate: Gate
    spline: Spline


class Choice(NamedTuple):
    """What computes on a type of device.

    Attributes:
        kernels: None for torch's own operations.
        reason: for the log, such as "fused C kernels (gcc)" or "eager torch, because no C compiler was found".
    """

    kernels: Kernels | None
    reason: str


@cache
def choose(device: str) -> Choice:
    """What computes on a type of device ("cpu", "cuda"): chosen, and where needed compiled, once a process.

    KABRN_KERNELS=off in the environment chooses torch's own operations.
    """
    try:
        if os.environ.get(SWITCH) == "off":
            raise Unavailable(f"{SWITCH} is off")
        if device != "cpu":
            raise Unavailable(f"there is no kernel for {device}")
        kernels = Kernels(Functions(), Products(), Gate(), Spline())
        return Choice(kernels, f"fused C kernels ({Path(find_compiler()).name})")
    except Unavailable as why:
        return Choice(None, f"eager torch, because {why}")


def kernels_for(x: Tensor) -> Kernels | None:
    """The kernels that take x; None where torch's own operations must do."""
    return choose(x.device.type).kernels if x.dtype in DTYPES else None
