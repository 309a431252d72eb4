"""Sums over ranks of which each rank needs one piece."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def sum_at_owners(pieces: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Piece r of all ranks, summed on rank r of the group: what a reduce-scatter returns. Collective.

    Pieces travel in their dtype and are summed where they belong, in fp32 and in the order of ranks, so the bits do not
    depend on who comes first. gloo's own reduce-scatter is an all-reduce, which sends twice the bytes.

    Args:
        pieces: [P,...], P ranks of the group.

    Returns:
        [...] in fp32, or fp64 where the pieces are that.
    """
    sent = pieces.contiguous()
    arrived = torch.empty_like(sent)
    dist.all_to_all_single(arrived, sent, group=group)
    return arrived.sum(0, dtype=torch.promote_types(pieces.dtype, torch.float32))
