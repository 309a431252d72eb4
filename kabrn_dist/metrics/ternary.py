"""Statistics of ternary weights: sums that add up over pieces, ranks and layouts, and their means per layer.

Shapes: L layers, M ternary matrices or stacks of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kabrn_dist.distributed.mesh import Mesh


class TernaryStats(NamedTuple):
    """Sums over weights, float64 scalars or [L]. Those of all pieces of a tensor add up to those of the whole.

    Attributes:
        total: number of weights.
        minus: number of weights with code −1.
        zero: number of weights with code 0.
        plus: number of weights with code +1.
        flips: number of weights whose code has changed.
        distance: Σ | |w| − γ/2 | / (γ/2), the distance of latents from the nearest threshold, in thresholds.
        scale: Σ γ.
    """

    total: Tensor
    minus: Tensor
    zero: Tensor
    plus: Tensor
    flips: Tensor
    distance: Tensor
    scale: Tensor

    def values(self) -> dict[str, Tensor]:
        """Return means: the fractions `minus`, `zero`, `plus` and `flips`, and `margin` and `scale`.

        The margin is the mean distance of |w| from the threshold γ/2 at which its code changes, relative to that
        threshold: 0 where all latents lie on it, 1.31 for Gaussian ones. (The mean of |w| relative to the threshold
        says nothing: γ is the mean of |w|, so it is 2 whatever the weights are.)
        """
        fractions = {name: getattr(self, name) / self.total for name in ("minus", "zero", "plus", "flips")}
        return fractions | {"margin": self.distance / self.total, "scale": self.scale / self.total}


def weight_sums(latent: Tensor, codes: Tensor, gamma: Tensor, before: Tensor | None = None) -> TernaryStats:
    """Return the sums of any piece of a ternary matrix, or of several.

    Args:
        latent: high-precision weights, of any shape and float dtype.
        codes: their −1, 0, 1, of the same shape and any dtype.
        gamma: scale of each weight's matrix, which broadcasts to that shape.
        before: codes before an update; None counts no flips.
    """
    sizes = latent.detach().float().abs()
    half = gamma.float() / 2
    counted = [(codes == value).sum() for value in (-1, 0, 1)]
    flips = (codes != before).sum() if before is not None else torch.zeros((), device=latent.device)
    distance = ((sizes - half).abs() / half).sum(dtype=torch.float64)
    scale = gamma.expand_as(latent).sum(dtype=torch.float64)
    total = torch.tensor(latent.numel(), device=latent.device)
    return TernaryStats(*(part.double() for part in (total, *counted, flips, distance, scale)))


def sum_layers(
    parts: Iterable[tuple[int, Tensor, Tensor, Tensor]], before: Sequence[Tensor], layers: int, mesh: Mesh
) -> TernaryStats:
    """Return the sums [L] of each layer over all ranks. Collective.

    Args:
        parts: (layer, latent, codes, γ) of every matrix or piece that this rank counts.
        before: codes of the same parts before the update.
        layers: L.
        mesh: all ranks; each weight is counted by one of them.
    """
    sums = torch.zeros(len(TernaryStats._fields), layers, dtype=torch.float64, device=mesh.device)
    for (layer, latent, codes, gamma), old in zip(parts, before, strict=True):
        sums[:, layer] += torch.stack(weight_sums(latent, codes, gamma, old))
    return TernaryStats(*mesh.all_reduce_sum(sums))


def weight_values(sums: TernaryStats | None) -> dict[str, float]:
    """Return the layers' means by their names in the log; nothing for None."""
    return {
        f"ternary/{name}/layer_{layer}": value
        for name, column in (sums.values() if sums else {}).items()
        for layer, value in enumerate(column.tolist())
    }
