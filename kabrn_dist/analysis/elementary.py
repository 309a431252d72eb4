"""Elementary functions f for symbolic fits of the form c·f(a·x + b) + d.

They act on the last axis. If a function is undefined at a point of an axis, or has a pole between two points, the
whole axis is NaN, so no fit depends on a lucky choice of points.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Elementary(NamedTuple):
    """A function of one variable.

    Attributes:
        name: Name in reports.
        complexity: Rank by simplicity; of equally good fits the simplest is chosen.
        apply: The function.
        slope: Values of a that give different shapes; others are equivalent to a change of b, c or d. Only 1
            (`one`), ±1 (`sign`), all above 0 (`size`), or all (`any`).
        shift: False if a change of b is equivalent to a change of c or d.
        period: Period in b; half of it changes the sign, so a smaller b is equivalent. 0 for none.
    """

    name: str
    complexity: int
    apply: Callable[[Tensor], Tensor]
    slope: Literal["one", "sign", "size", "any"] = "size"
    shift: bool = True
    period: float = 0.0


def _where(valid: Tensor, values: Tensor) -> Tensor:
    return values.masked_fill(~valid.all(-1, keepdim=True), float("nan"))


def _reciprocal(u: Tensor) -> Tensor:
    return _where((u > 0).all(-1, keepdim=True) | (u < 0).all(-1, keepdim=True), 1 / u)


ELEMENTARY = (
    Elementary("x", 1, lambda u: u, "one", shift=False),
    Elementary("x^2", 2, torch.square, "one"),
    Elementary("1/x", 2, _reciprocal, "one"),
    Elementary("sqrt", 2, lambda u: _where(u >= 0, u.clamp(min=0).sqrt()), "sign"),
    Elementary("exp", 2, torch.exp, "any", shift=False),
    Elementary("log", 2, lambda u: _where(u > 0, u.clamp(min=1e-30).log()), "sign"),
    Elementary("sin", 2, torch.sin, period=2 * math.pi),
    Elementary("cos", 2, torch.cos, period=2 * math.pi),
    Elementary("abs", 3, torch.abs, "one"),
    Elementary("x^3", 3, lambda u: u**3, "one"),
    Elementary("x^4", 3, lambda u: u**4, "one"),
    Elementary("tan", 3, lambda u: _where(u.abs() < 0.49 * math.pi, u.tan())),
    Elementary("tanh", 3, torch.tanh),
    Elementary("sigmoid", 3, torch.sigmoid),
    Elementary("gaussian", 3, lambda u: (-u * u).exp()),
    Elementary("silu", 4, F.silu, "any"),
)


def write_formula(name: str, a: float, b: float, c: float, d: float) -> str:
    """Return c·f(a·x + b) + d as text, without the constants that have no effect."""
    if name == "constant":
        return f"{d:.3g}"
    slope = "x" if a == 1 else f"{a:.3g}·x"
    inside = slope + _term(b)
    power = name[0] == "x" or name == "1/x"
    f = name.replace("x", f"({inside})" if _term(b) else "x") if power else f"{name}({inside})"
    return f"{c:.3g}·{f}{_term(d)}"


def _term(value: float) -> str:
    return "" if abs(value) < 5e-4 else f" {'+' if value > 0 else '−'} {abs(value):.3g}"
