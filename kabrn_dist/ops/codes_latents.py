"""Latents of ternary codes and scales: rounded again, they give these codes and these scales, bit for bit.

A scale γ is the mean |w| of its latents. Zeros become 0, and the k others of n latents ±γ·n/k, a few of them one step
of fp32 larger, so that the mean is γ again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kabrn_dist.ops.weight_quant import ternarize


def make_latents(codes: Tensor, scales: Tensor, scale_group_size: int | None) -> Tensor | None:
    """Return latents [E,O,I] fp32; None if these codes and scales are those of no latents.

    Args:
        codes: [E,O,I] int8.
        scales: [E,S] fp32, a scale of each matrix or of each group of its outputs.
        scale_group_size: Outputs that share a scale; None for all of a matrix.
    """
    outputs = codes.shape[1]
    group = min(scale_group_size or outputs, outputs)
    latents = torch.empty(codes.shape)
    whole = outputs // group
    for start, stop, gamma in (
        (0, whole * group, scales[:, :whole].reshape(-1)),
        (whole * group, outputs, scales[:, whole:].reshape(-1)),
    ):
        if len(gamma):
            part = codes[:, start:stop]
            latents[:, start:stop] = _make_runs(part.reshape(len(gamma), -1), gamma).view(part.shape)
    found = ternarize(latents, 1, scale_group_size)
    assert found.gamma is not None
    wanted = scales.repeat_interleave(group, 1)[:, :outputs, None] if scale_group_size else scales[:, :, None]
    empty = (codes == 0).all(-1, keepdim=True) if scale_group_size else (codes == 0).all(-1).all(-1)[:, None, None]
    # A scale of zeros alone changes nothing.
    same = (found.gamma == wanted) | empty
    return latents if bool(same.all()) and torch.equal(found.codes(torch.int8), codes) else None


def _make_runs(codes: Tensor, gamma: Tensor) -> Tensor:
    """Latents [R,n] of runs of codes with a scale each. All sums are exact in fp64."""
    nonzero = codes != 0
    count = nonzero.sum(1)
    total = gamma.double() * codes.shape[1]
    size = (total / count.clamp(min=1)).float()
    size = torch.where(size.double() * count > total, torch.nextafter(size, torch.zeros(())), size)
    larger = torch.nextafter(size, torch.full((), torch.inf))
    missing = total - size.double() * count
    num_larger = (missing / (larger.double() - size.double())).round().to(torch.int64)
    is_larger = nonzero.cumsum(1) <= num_larger[:, None]
    return torch.where(is_larger, larger[:, None], size[:, None]) * codes
