"""Reduce-scatter with sums in fp32 and in a fixed order."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def reduce_scatter_sum(shards: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum shard r of all ranks on rank r of the group, as a reduce-scatter does. Collective.

    Shards travel in their dtype and are summed by their owner, in fp32 and in the order of ranks, so that the bits do
    not depend on which arrives first. gloo's own reduce-scatter is an all-reduce, which sends twice the bytes.

    Args:
        shards: [P,...], P ranks of the group.
        group: the ranks.

    Returns:
        [...] in fp32, or fp64 for fp64 shards.
    """
    return start_reduce_scatter(shards, group)()


def start_reduce_scatter(shards: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Start `reduce_scatter_sum` and return a function, to be called once, that waits and returns the sum."""
    sent = shards.contiguous()
    received = torch.empty_like(sent)
    work = dist.all_to_all_single(received, sent, group=group, async_op=True)

    def wait() -> Tensor:
        work.wait()
        total = received[0].to(torch.promote_types(received.dtype, torch.float32))
        for shard in received[1:]:
            total += shard
        return total

    return wait
