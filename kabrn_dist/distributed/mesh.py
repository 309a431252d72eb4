"""Ranks and process groups. The only file that makes process groups.

Layout: the ranks of a sequence group, which hold slices of the same sequences, are contiguous. So are the ranks of an
expert group, independently of these; ranks that hold the same experts are `expert_parallel` apart. ZeRO's data-parallel
world is all ranks: one with another slice of the same sequences holds other tokens.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from kabrn_dist.distributed.launch_env import LaunchEnv


@dataclass(frozen=True)
class NodeGroups:
    """Groups of an expert group that spans several nodes, with the same number of its ranks on each.

    Attributes:
        ranks_per_node: rank r of the expert group has local index r % ranks_per_node on node r // ranks_per_node.
        num_nodes: nodes of the expert group.
        intra_node: its ranks on this node.
        inter_node: its ranks with this one's local index, on all nodes.
        executor: the one thread that communicates in these two groups, so that all ranks do it in the same order.
    """

    ranks_per_node: int
    num_nodes: int
    intra_node: dist.ProcessGroup
    inter_node: dist.ProcessGroup
    executor: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))


@dataclass(frozen=True)
class Mesh:
    """This process's rank, device and groups.

    Attributes:
        rank: this process among all.
        world_size: number of processes.
        sequence_parallel: ranks that share each sequence, a contiguous slice each.
        expert_parallel: ranks that share one set of routed experts and exchange tokens by all-to-all.
        device: where this rank computes.
        sequence_group: the ranks that share this one's sequences; None where `sequence_parallel` is 1.
        expert_group: the ranks that share experts with this one; None where `expert_parallel` is 1.
        expert_data_group: the ranks that hold the same experts as this one; they average expert gradients.
        self_group: a group of this rank only, for parameters that are not averaged.
        expert_nodes: the expert group by nodes; None where it lies on one, or does not fill all nodes alike.
        checkpoint_group: all ranks over gloo, for the thread that writes checkpoints during training.
    """

    rank: int
    world_size: int
    sequence_parallel: int
    expert_parallel: int
    device: torch.device
    sequence_group: dist.ProcessGroup | None
    expert_group: dist.ProcessGroup | None
    expert_data_group: dist.ProcessGroup | None
    self_group: dist.ProcessGroup | None = None
    expert_nodes: NodeGroups | None = None
    checkpoint_group: dist.ProcessGroup | None = None

    @property
    def sequence_rank(self) -> int:
        """Index of the slice of its sequences that this rank holds."""
        return self.rank % self.sequence_parallel

    @property
    def data_rank(self) -> int:
        """Index of this rank's sequence group: which sequences it reads."""
        return self.rank // self.sequence_parallel

    @property
    def data_world_size(self) -> int:
        """Number of sequence groups, which read different sequences."""
        return self.world_size // self.sequence_parallel

    @property
    def expert_rank(self) -> int:
        """This rank's index in its expert group."""
        return self.rank % self.expert_parallel

    @property
    def is_main(self) -> bool:
        """Whether this is the one rank that writes logs."""
        return self.rank == 0

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Return the sum over all ranks; `values` does not change. Collective."""
        total = values.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def any_rank(self, flag: bool) -> bool:
        """Return, on all ranks, whether the flag is true on any: the way to decide anything together. Collective."""
        if self.world_size == 1:
            return flag
        return bool(self.all_reduce_sum(torch.tensor(float(flag), device=self.device)).item() > 0)


def single_process_mesh(device: torch.device | str = "cpu") -> Mesh:
    """Return the mesh of a single process without process groups, for generation, export and tests."""
    return Mesh(0, 1, 1, 1, torch.device(device), None, None, None)


def make_mesh(
    env: LaunchEnv,
    device: torch.device,
    expert_parallel: int,
    sequence_parallel: int = 1,
    ranks_per_node: int | None = None,
) -> Mesh:
    """Make this process's mesh and all its groups. Collective.

    Args:
        env: this process's rank and the number of processes.
        device: where this rank computes.
        expert_parallel: ranks of an expert group; divides the number of processes (see `Config.check_world_size`).
        sequence_parallel: ranks of a sequence group; divides the number of processes.
        ranks_per_node: ranks of one node; None for the launcher's number.
    """
    world = env.world_size
    data_ranks = [list(range(e, world, expert_parallel)) for e in range(expert_parallel)]
    expert_data_group = _make_groups(data_ranks, env.rank)
    self_group = expert_data_group if expert_parallel == world else _make_groups(_contiguous(world, 1), env.rank)
    return Mesh(
        env.rank,
        world,
        sequence_parallel,
        expert_parallel,
        device,
        sequence_group=(
            _make_groups(_contiguous(world, sequence_parallel), env.rank) if sequence_parallel > 1 else None
        ),
        expert_group=_make_groups(_contiguous(world, expert_parallel), env.rank) if expert_parallel > 1 else None,
        expert_data_group=expert_data_group,
        self_group=self_group,
        expert_nodes=_make_node_groups(env, device, expert_parallel, ranks_per_node),
        checkpoint_group=dist.new_group(backend="gloo"),
    )


def _contiguous(world: int, size: int) -> list[list[int]]:
    return [list(range(first, first + size)) for first in range(0, world, size)]


def _make_node_groups(
    env: LaunchEnv, device: torch.device, expert_parallel: int, ranks_per_node: int | None
) -> NodeGroups | None:
    if env.world_size == 1 or expert_parallel == 1:
        return None
    # Nodes may differ in their number of ranks: then no rank must make groups.
    size = ranks_per_node or env.local_world_size
    bounds = torch.tensor([size, -size], device=device)
    dist.all_reduce(bounds, dist.ReduceOp.MAX)
    largest, smallest = bounds.tolist()
    if largest != -smallest or size == 1 or size >= expert_parallel or expert_parallel % size:
        return None
    intra_node = _make_groups(_contiguous(env.world_size, size), env.rank)
    expert_groups = _contiguous(env.world_size, expert_parallel)
    inter_node = _make_groups([ranks[index::size] for ranks in expert_groups for index in range(size)], env.rank)
    return NodeGroups(size, expert_parallel // size, intra_node, inter_node)


def _make_groups(partition: list[list[int]], rank: int) -> dist.ProcessGroup:
    """Make a group of each list of ranks, and return the one with `rank`."""
    # Every rank must take part in making every group, also those it is not in.
    groups = [(ranks, dist.new_group(ranks)) for ranks in partition]
    return next(group for ranks, group in groups if rank in ranks)
