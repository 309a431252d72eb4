"""The columns just before a slice of time, from the ranks that hold them: what a short convolution needs.

Every rank of the group must make the same calls in the same order, in backward too.

Shapes: P ranks of the group, B batch, L tokens of a slice, J columns asked for, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def halo_exchange(x: Tensor, count: int, group: dist.ProcessGroup) -> Tensor:
    """The `count` columns in front of this rank's slice, zeros in front of the row's start. Differentiable.

    A message of `count` columns to the next rank; where slices are shorter than that, ⌈J/L⌉ messages of a slice, each
    handing on the one before. Backward sends as much the other way.

    Args:
        x: [B,L,D], L the same on all ranks.

    Returns:
        [B,J,D] in the dtype of x.
    """
    length = x.shape[1]
    piece = x[:, -count:]
    pieces: list[Tensor] = []
    for _ in range(-(-count // length)):
        # What the rank before has received last is the slice before its own.
        piece = _Shift.apply(piece, group)
        pieces.insert(0, piece)
    return torch.cat(pieces, 1)[:, -count:]


class _Shift(torch.autograd.Function):
    """Each rank's tensor on the rank after it; zeros on the first. Backward: the gradient on the rank before."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _shift(mine, group, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _shift(grad, ctx.group, -1), None


def _shift(mine: Tensor, group: dist.ProcessGroup, step: int) -> Tensor:
    """Send to the rank `step` further and receive from the one `step` behind, where there are such."""
    ranks, place = dist.get_process_group_ranks(group), dist.get_rank(group)
    came = torch.zeros_like(mine, memory_format=torch.contiguous_format)
    messages = []
    if 0 <= place + step < len(ranks):
        messages.append(dist.P2POp(dist.isend, mine.contiguous(), ranks[place + step], group))
    if 0 <= place - step < len(ranks):
        messages.append(dist.P2POp(dist.irecv, came, ranks[place - step], group))
    for work in dist.batch_isend_irecv(messages) if messages else ():
        work.wait()
    return came
