"""All-gather of keys and values over the slices of a sequence, for softmax attention.

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
    """Gather keys and values from the row's start to the end of this rank's slice. Collective. Differentiable.

    Forward is one all-gather, backward one reduce-scatter: each rank sums all ranks' gradients of its slice.

    Args:
        k: [B,H,L,K], L the same on all ranks.
        v: [B,H,L,V] in the dtype of k.
        group: the ranks in the order of their slices.

    Returns:
        [B,H,R·L,K] and [B,H,R·L,V]. Slices after this rank's are left out: no query of this rank may see them.
    """
    slices: Tensor = _Gather.apply(torch.cat([k, v], -1), group)
    past = slices[: dist.get_rank(group) + 1].movedim(0, 2).flatten(2, 3)
    return past[..., : k.shape[-1]], past[..., k.shape[-1] :]


def gather_past_ids(ids: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather [B,L] int64, such as documents, into [B,R·L]. Collective. No gradient."""
    return _gather(ids, group)[: dist.get_rank(group) + 1].movedim(0, 1).flatten(1)


class _Gather(torch.autograd.Function):
    """[...] of each rank → [P,...] on all; backward sums all ranks' gradients of a slice on the rank that holds it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_sum(grad, ctx.group).to(grad.dtype), None


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    gathered = x.new_empty(dist.get_world_size(group), *x.shape)
    _all_gather(gathered.view(-1), x.contiguous().view(-1), group=group)
    return gathered
