"""Data of a ternary matrix's picture: a histogram of its latents and a corner of its codes. Needs no matplotlib.

Shapes: R rows and C columns of a matrix that are shown.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Bins of latent / γ. Thresholds lie on edges, so a bin has one code; the outermost bins hold what lies beyond.
REACH, BINS = 4.0, 64
# Largest number of rows and columns that a picture shows.
CORNER = 64


class TernaryFigure(NamedTuple):
    """One ternary matrix, or a stack of them.

    Attributes:
        name: name within its layer, such as "mixer.inputs.query".
        histogram: [BINS] number of weights by latent / γ, from −REACH to REACH.
        codes: [R,C] −1, 0, 1: the upper left corner of the first matrix.
        shape: shape of the whole matrix or stack.
    """

    name: str
    histogram: Tensor
    codes: Tensor
    shape: tuple[int, ...]


def count_latents(latent: Tensor, gamma: Tensor) -> Tensor:
    """Return the histogram [BINS] float64 of latent / γ; counts of a tensor's pieces add up.

    Args:
        latent: high-precision weights of any shape.
        gamma: scales, which broadcast to that shape.
    """
    bins = ((latent.detach().float() / gamma.float() + REACH) * (BINS / (2 * REACH))).floor_()
    return torch.bincount(bins.clamp_(0, BINS - 1).long().flatten(), minlength=BINS).double()


def make_ternary_figure(
    name: str, shape: tuple[int, ...], latent: Tensor, codes: Tensor, gamma: Tensor
) -> TernaryFigure:
    """Return the picture's data of a whole stack of matrices.

    Args:
        name: name within the layer.
        shape: shape of the parameter.
        latent: [E,O,I] high-precision weights.
        codes: [E,O,I] their −1, 0, 1.
        gamma: scales, which broadcast to [E,O,I].
    """
    return TernaryFigure(name, count_latents(latent, gamma), codes[0, :CORNER, :CORNER].cpu(), shape)
