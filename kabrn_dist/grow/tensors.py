"""Growth of one logical tensor: copies, noise, redrawn units, finer grids, and the moments of AdamW.

Experts are processed one at a time, so memory holds a stored part [E, …] and one expert, not the grown tensor.

Shapes: E experts, H hidden units, O outputs, I inputs, K coefficients of a function on a grid.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kabrn_dist.model.init import draw_normal
from kabrn_dist.ops.grids import knot_insertion_matrix
from kabrn_dist.utils.errors import UserError

TENSOR_PARTS = ("master", "exp_avg", "exp_avg_sq")


class GridRefinement(NamedTuple):
    """Refinement of a grid.

    Attributes:
        old_size: Intervals before.
        new_size: Intervals after.
        spline_order: Degree of the polynomial pieces; 1 for hats.
    """

    old_size: int
    new_size: int
    spline_order: int


@dataclass(frozen=True)
class TensorMapping:
    """Origin of a tensor of the grown model.

    Attributes:
        name: Name of the grown tensor.
        shape: Its shape.
        source: Name of the old tensor; None for a newly initialized one, whose moments are zero.
        description: The origin in words, for the console.
        copies: Slices made from each old one along the first dimension (experts, rows of a router). Old slice e
            becomes the slices e, e + E, e + 2E …, so every E neighbors are a complete set.
        copies_per_token: How many of those copies a token visits.
        refinement: Refinement of the grid whose coefficients lie along the last dimension, if any.
        hidden_size: H of a matrix of copied experts, whose units may be redrawn; 0 for other tensors.
        is_output: True if the hidden units are the inputs of the matrix.
        adds_noise: True if noise may break the symmetry of the copies.
        starts_at_zero: True for a new output matrix that starts with zeros.
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
    """Randomness that makes copies differ.

    Attributes:
        noise: Standard deviation of the noise on each matrix and router row, as a fraction of its root mean square.
        redraw: Fraction of each copy's hidden units that are drawn again (drop-upcycling, arXiv 2502.19261).
        seed: Seed of both.
    """

    noise: float
    redraw: float
    seed: int


def write_part(target: Tensor, old: Tensor, mapping: TensorMapping, part: str, breaking: SymmetryBreaking) -> None:
    """Write one part of the grown tensor, made from the same part of the old one.

    Moments: the gradients of an expert's copies add up to the expert's gradient, so the mean of each is 1/copies of
    it. If the gradients of tokens are independent, the mean square falls to 1/(copies·copies_per_token). If they
    agree it falls further, and the first steps are shorter than Adam's usual ones, never longer. The moments of
    redrawn units are zero.

    Args:
        target: The part of the grown tensor, fp32.
        old: The part of the old tensor, fp32.
        mapping: Origin of the tensor.
        part: One of `TENSOR_PARTS`.
        breaking: Noise and redrawing.
    """
    if mapping.copies == 1 and mapping.refinement is None:
        target.copy_(old)
        return
    factor = {
        "master": 1.0,
        "exp_avg": 1 / mapping.copies,
        "exp_avg_sq": 1 / (mapping.copies * mapping.copies_per_token),
    }[part]
    for expert, values in enumerate(target):
        values.copy_(refine_part(old[expert % len(old)], mapping.refinement, part) * factor)
        if mapping.adds_noise and breaking.noise and part == "master":
            std = breaking.noise * float(values.square().mean().sqrt())
            values.add_(draw_normal(breaking.seed, f"{mapping.name}.noise.{expert}", tuple(values.shape), std))
        if mapping.hidden_size and breaking.redraw:
            _redraw(values, mapping, expert, part, breaking)


def _redraw(values: Tensor, mapping: TensorMapping, expert: int, part: str, breaking: SymmetryBreaking) -> None:
    """Draw the rows (columns of an output matrix) of some hidden units again, with the mean and spread they had.

    The units are the same in all matrices of an expert, and different in each expert.
    """
    module = mapping.name.rpartition(".")[0]
    count = round(breaking.redraw * mapping.hidden_size)
    order = draw_normal(breaking.seed, f"{module}.redrawn.{expert}", (mapping.hidden_size,), 1.0).argsort()
    units = order[:count]
    rows = values.unflatten(-1, (mapping.hidden_size, -1)).transpose(0, 1) if mapping.is_output else values
    if part != "master":
        rows[units] = 0
    elif count:
        replaced = rows[units]
        drawn = draw_normal(
            breaking.seed, f"{mapping.name}.redrawn.{expert}", tuple(replaced.shape), float(replaced.std())
        )
        rows[units] = drawn + replaced.mean()


def refine_part(values: Tensor, refinement: GridRefinement | None, part: str) -> Tensor:
    """Return the coefficients of the same functions on a finer grid, or their moments.

    The gradient of a coefficient sums over the inputs under its basis function, and a finer basis function has
    old_size/new_size as many. So moments are interpolated at the finer knots and scaled by that ratio. Interpolated
    without signs, a mean square stays positive where a coefficient at an end is an extrapolation; by Cauchy-Schwarz
    no step is much longer than before.

    Args:
        values: [O,I·K] old part of the tensor.
        refinement: Old and new grid; None returns `values`.
        part: One of `TENSOR_PARTS`.

    Returns:
        [O,I·K'] part on the new grid, fp64.
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
    """Tensors in files of a folder, mapped into memory, so that only those in use take up memory.

    Attributes:
        folder: The folder, which is created.
        files: Number of tensors made so far.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder, self.files = folder, 0

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """Return a new fp32 tensor of zeros.

        Raises:
            UserError: if the disk has no room for it.
        """
        self.files += 1
        file, count = self.folder / f"{self.files}", prod(shape)
        try:
            with file.open("wb") as made:
                # A mapped file on a full disk would end this process with SIGBUS when it is written to.
                os.posix_fallocate(made.fileno(), 0, max(1, count * torch.float32.itemsize))
        except OSError as error:
            raise UserError(
                f"{file}: cannot be written ({error.strerror}); make room, or choose a run.folder on another disk"
            ) from error
        return torch.from_file(str(file), shared=True, size=count, dtype=torch.float32).view(shape)
