"""Sums over ranks of which each rank needs one piece."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def reduce_scatter_sum(pieces: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Piece r of all ranks, summed on rank r of the group: what a reduce-scatter returns. Collective.

    Pieces travel in their dtype and are summed where they belong, in fp32 and in the order of ranks, so the bits do not
    depend on who comes first. gloo's own reduce-scatter is an all-reduce, which sends twice the bytes.

    Args:
        pieces: [P,...], P ranks of the group.

    Returns:
        [...] in fp32, or fp64 where the pieces are that.
    """
    return start_reduce_scatter(pieces, group)()


def start_reduce_scatter(pieces: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """`sum_at_owners` that does not wait: what it returns does, when it is called, once."""
    sent = pieces.contiguous()
    arrived = torch.empty_like(sent)
    work = dist.all_to_all_single(arrived, sent, group=group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        total = arrived[0].to(torch.promote_types(arrived.dtype, torch.float32))
        for piece in arrived[1:]:
            total += piece
        return total

    return finish
