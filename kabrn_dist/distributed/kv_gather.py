"""Whole rows from slices of time: what softmax attention needs of the other ranks of a sequence group.

Every rank of the group must make the same calls in the same order, in backward too.

Shapes: P ranks of the group, r this rank, B batch, H heads, L tokens of a slice, W width, R = r + 1 slices seen.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kabrn_dist.distributed.reduce_scatter import reduce_scatter_sum

# torch 2.13 renamed it; the old name warns there, the new one does not exist before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def gather_past(k: Tensor, v: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Keys and values from the row's start to the end of this rank's slice, in one message. Differentiable.

    Backward is one exchange: each rank gets all ranks' gradients of its slice, and sums them.

    Args:
        k: [B,H,L,K]; v: [B,H,L,V], one dtype; L the same on all ranks.

    Returns:
        [B,H,R·L,K] and [B,H,R·L,V]. Slices after this rank's are left out: no query here may see them.
    """
    slices: Tensor = _Gather.apply(torch.cat([k, v], -1), group)
    past = slices[: dist.get_rank(group) + 1].movedim(0, 2).flatten(2, 3)
    return past[..., : k.shape[-1]], past[..., k.shape[-1] :]


def gather_past_ids(ids: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B,L] int64, such as documents, → [B,R·L]. No gradient."""
    return _gather(ids, group)[: dist.get_rank(group) + 1].movedim(0, 1).flatten(1)


class _Gather(torch.autograd.Function):
    """[...] of each rank → [P,...] on all; backward sums what the ranks say of a slice at its home."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(mine, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_sum(grad, ctx.group).to(grad.dtype), None


def _gather(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    everyone = mine.new_empty(dist.get_world_size(group), *mine.shape)
    _all_gather(everyone.view(-1), mine.contiguous().view(-1), group=group)
    return everyone
