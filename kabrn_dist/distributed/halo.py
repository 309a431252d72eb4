"""Halo exchange for short convolutions: the columns just before a slice of time, from the ranks that hold them.

Every rank of the group must make the same calls in the same order, in backward too.

Shapes: P ranks of the group, B batch, L tokens of a slice, J columns of the halo, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def halo_exchange(x: Tensor, size: int, group: dist.ProcessGroup) -> Tensor:
    """Return the columns in front of this rank's slice, zeros in front of the row's start. Collective. Differentiable.

    Each rank sends J columns to the next; where slices are shorter than that, it sends ⌈J/L⌉ messages of a slice, each
    of which passes on the one before. Backward sends as much the other way.

    Args:
        x: [B,L,D], L the same on all ranks.
        size: J.
        group: the ranks in the order of their slices.

    Returns:
        [B,J,D] in the dtype of x.
    """
    length = x.shape[1]
    piece = x[:, -size:]
    pieces: list[Tensor] = []
    for _ in range(-(-size // length)):
        # The last message that the previous rank received is the slice before its own.
        piece = _Shift.apply(piece, group)
        pieces.insert(0, piece)
    return torch.cat(pieces, 1)[:, -size:]


class _Shift(torch.autograd.Function):
    """Each rank's tensor on the rank after it; zeros on the first. Backward: the gradient on the rank before."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _shift(x, group, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _shift(grad, ctx.group, -1), None


def _shift(x: Tensor, group: dist.ProcessGroup, step: int) -> Tensor:
    """Send to the rank `step` further and receive from the one `step` behind, where these exist."""
    ranks, rank = dist.get_process_group_ranks(group), dist.get_rank(group)
    received = torch.zeros_like(x, memory_format=torch.contiguous_format)
    messages = []
    if 0 <= rank + step < len(ranks):
        messages.append(dist.P2POp(dist.isend, x.contiguous(), ranks[rank + step], group))
    if 0 <= rank - step < len(ranks):
        messages.append(dist.P2POp(dist.irecv, received, ranks[rank - step], group))
    for work in dist.batch_isend_irecv(messages) if messages else ():
        work.wait()
    return received
