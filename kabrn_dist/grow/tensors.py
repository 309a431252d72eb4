"""One logical tensor of the grown model from one of the old: copies, noise, redrawing, finer grids, moments.

Experts are worked on one by one, so that beside a stored part [E, …] one expert is in memory, not the grown tensor.

Shapes: E experts, H hidden units, O outputs, I inputs, K coefficients of a function on a grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kabrn_dist.model.init import draw_normal
from kabrn_dist.ops.grids import knot_insertion_matrix

TENSOR_PARTS = ("master", "exp_avg", "exp_avg_sq")


class GridRefinement(NamedTuple):
    """A grid that becomes finer: intervals before and after, degree of the pieces (1 for hats)."""

    old_size: int
    new_size: int
    spline_order: int


@dataclass(frozen=True)
class TensorMapping:
    """Where a tensor of the grown model comes from.

    Attributes:
        name, shape: of the grown tensor.
        source: the old tensor's name; None where it is drawn afresh, with moments of zero.
        what: for people.
        copies: slices made of each old one along the first dimension (experts, a router's rows); old slice e becomes
            the slices e, e + E, e + 2E …, so that each run of E neighbours is a whole set.
        visited: of those copies, how many a token visits.
        finer: the grid whose coefficients lie along the last dimension, where it is refined.
        hidden: H where this is a matrix of copied experts, of which units may be redrawn; output: H is its input side.
        noised: True where the copies' symmetry may be broken by noise.
        zero: True for a fresh output matrix that starts with zeros.
    """

    name: str
    shape: tuple[int, ...]
    source: str | None
    description: str
    copies: int = 1
    copies_per_token: int = 1
    refinement: GridRefinement | None = None
    hidden_size: int = 0
    is_output: bool = False
    adds_noise: bool = False
    starts_at_zero: bool = False


@dataclass(frozen=True)
class SymmetryBreaking:
    """How copies are made to differ.

    Attributes:
        noise: standard deviation of what is added to each matrix and router row, as a share of its root mean square.
        redraw: share of each copy's hidden units drawn anew (drop-upcycling, arXiv 2502.19261).
        seed: of both draws.
    """

    noise: float
    redraw: float
    seed: int


def write_part(target: Tensor, old: Tensor, mapping: TensorMapping, part: str, breaking: SymmetryBreaking) -> None:
    """Write one part of the grown tensor into `target`, from the same part of the old one. Both fp32.

    Moments: the gradients of an expert's copies add up to the gradient it had, so each has 1/copies of its mean. With
    tokens' gradients taken as independent, its mean square falls to 1/(copies·visited) of what it was; where they agree
    it falls further, and the first steps are then shorter, never longer, than Adam's usual ones. Redrawn units start
    with none.
    """
    if mapping.copies == 1 and mapping.refinement is None:
        target.copy_(old)
        return
    share = {
        "master": 1.0,
        "exp_avg": 1 / mapping.copies,
        "exp_avg_sq": 1 / (mapping.copies * mapping.copies_per_token),
    }[part]
    for expert, values in enumerate(target):
        values.copy_(refine_part(old[expert % len(old)], mapping.refinement, part) * share)
        if mapping.adds_noise and breaking.noise and part == "master":
            std = breaking.noise * float(values.square().mean().sqrt())
            values.add_(draw_normal(breaking.seed, f"{mapping.name}.noise.{expert}", tuple(values.shape), std))
        if mapping.hidden_size and breaking.redraw:
            _redraw(values, mapping, expert, part, breaking)


def _redraw(values: Tensor, mapping: TensorMapping, expert: int, part: str, breaking: SymmetryBreaking) -> None:
    """Draw the rows (columns of an output matrix) of some hidden units anew, with the mean and spread they had.

    The same units in all matrices of an expert, others in each expert.
    """
    module = mapping.name.rpartition(".")[0]
    count = round(breaking.redraw * mapping.hidden_size)
    order = draw_normal(breaking.seed, f"{module}.redrawn.{expert}", (mapping.hidden_size,), 1.0).argsort()
    units = order[:count]
    rows = values.unflatten(-1, (mapping.hidden_size, -1)).transpose(0, 1) if mapping.is_output else values
    if part != "master":
        rows[units] = 0
    elif count:
        lost = rows[units]
        drawn = draw_normal(breaking.seed, f"{mapping.name}.redrawn.{expert}", tuple(lost.shape), float(lost.std()))
        rows[units] = drawn + lost.mean()


def refine_part(values: Tensor, refinement: GridRefinement | None, part: str) -> Tensor:
    """[O,I·K] → [O,I·K']: coefficients of the same functions on the finer grid, or their moments.

    A coefficient's gradient sums over the inputs under its basis function, and a finer one has grid/finer as many: so
    moments are read off at the finer knots and scaled by that share. Read off without signs, a mean square stays
    positive where an end's coefficient is an extrapolation; by Cauchy-Schwarz no step is much longer than before.
    """
    if refinement is None:
        return values
    matrix = knot_insertion_matrix(*refinement)
    if part != "master":
        matrix = matrix * (refinement.old_size / refinement.new_size)
    if part == "exp_avg_sq":
        matrix = matrix.abs()
    return (values.double().unflatten(-1, (-1, matrix.shape[1])) @ matrix.T).flatten(-2)


class ScratchTensors:
    """Tensors in files of a folder, mapped into memory: what is held is what is being worked on, not all of them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder, self.files = folder, 0

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """An fp32 tensor of zeros."""
        self.files += 1
        file = str(self.folder / f"{self.files}")
        return torch.from_file(file, shared=True, size=prod(shape), dtype=torch.float32).view(shape)
