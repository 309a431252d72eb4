"""Ranks and process groups: who shares what with whom. The only file that makes process groups.

Layout: ranks that hold slices of the same sequences are contiguous, and so are ranks of one expert group, folded over
them; ranks that hold the same experts are `expert` apart. ZeRO's data-parallel world is the whole world: a rank with
another slice is one more holder of other tokens.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from kabrn_dist.distributed.launch_env import LaunchEnv, free_port
from kabrn_dist.utils.errors import UserError

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@dataclass(frozen=True)
class NodeGroups:
    """An expert group that spans several machines with the same number of its ranks on each.

    Attributes:
        size: ranks on one machine; rank r of the expert group is number r % size on machine r // size.
        count: machines.
        inner: the group's ranks on this machine.
        outer: the ranks with this one's number on all machines.
        background: the one thread that exchanges in these two groups, so that all ranks do it in the same order.
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
        sequence: ranks that share each sequence, a contiguous slice each.
        expert: ranks that share one set of routed experts (they exchange tokens by all-to-all).
        sequence_group, expert_group: the groups of those ranks; None where the degree is 1.
        expert_data_group: ranks that hold the same experts as this one (they average expert gradients).
        own_group: this rank alone, for what is averaged over nobody.
        expert_nodes: the expert group by machines; None where it lies in one, or does not fill each alike.
        background_group: all ranks once more, over the CPU, for a thread that writes checkpoints beside the training.
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
        """Which slice of its sequences this rank holds."""
        return self.rank % self.sequence_parallel

    @property
    def data_rank(self) -> int:
        """Which sequences this rank holds a slice of."""
        return self.rank // self.sequence_parallel

    @property
    def data_world_size(self) -> int:
        """How many ranks, or groups of them, read different sequences."""
        return self.world_size // self.sequence_parallel

    @property
    def expert_rank(self) -> int:
        """This rank's place in its expert group."""
        return self.rank % self.expert_parallel

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes logs."""
        return self.rank == 0

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks; `values` is left as it is."""
        total = values.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def any_rank(self, flag: bool) -> bool:
        """True on all ranks where it is true on one: the way to decide anything together."""
        if self.world_size == 1:
            return flag
        return bool(self.all_reduce_sum(torch.tensor(float(flag), device=self.device)).item() > 0)


def single_process_mesh(device: torch.device | str = "cpu") -> Mesh:
    """The mesh of a single process that needs no process group (generation, export, tests)."""
    return Mesh(0, 1, 1, 1, torch.device(device), None, None, None)


# Shortest time that a rank waits for another in a collective before it gives up.
DEFAULT_TIMEOUT_S = 600.0


@contextmanager
def init_distributed(env: LaunchEnv, timeout_s: float = DEFAULT_TIMEOUT_S) -> Iterator[torch.device]:
    """Meet the other processes, and leave them at the end. Yields this process's device.

    Args:
        patience: seconds that a rank waits for another in a collective before it gives up.
    """
    device = _choose_device(env)
    if env.world_size == 1:
        # A process that was started plainly; DeepSpeed reads these variables too.
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
        os.environ.setdefault("LOCAL_RANK", "0")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=env.rank, world_size=env.world_size, timeout=timedelta(seconds=timeout_s))
    try:
        yield device
    except UserError:
        # All ranks raise it, so all leave.
        dist.destroy_process_group()
        raise
    # After any other exception this rank leaves alone: taking groups apart could wait for the others for ever, and
    # would tell them of a closed connection before this rank has told what happened.
    dist.destroy_process_group()


# How a rank learns that another one has gone, in the words of gloo and NCCL.
_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Socket closed",
    "recvValue failed",
    "Timed out waiting",
    "remote process exited",
    "NCCL error",
    "NCCL communicator was aborted",
)


def is_peer_failure(error: BaseException) -> bool:
    """True for an exception that only says that another rank is gone."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, dist.DistBackendError | dist.DistNetworkError):
            return True
        # Not OSError: a connection that this process made itself, for its data, is no other rank.
        if isinstance(seen, RuntimeError) and any(text in str(seen) for text in _GONE):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def make_mesh(
    env: LaunchEnv,
    device: torch.device,
    expert_parallel: int,
    sequence_parallel: int = 1,
    ranks_per_node: int | None = None,
) -> Mesh:
    """Make the groups. Collective.

    Args:
        expert, sequence: degrees of parallelism; each divides `place.world` (checked by `Config.check_world`).
        node: ranks of one machine; default: as the launcher says.
    """
    slices = _runs(env.world_size, sequence_parallel)
    data_ranks = [list(range(e, env.world_size, expert_parallel)) for e in range(expert_parallel)]
    expert_data_group = _own_group(data_ranks, env.rank)
    own_group = (
        expert_data_group if expert_parallel == env.world_size else _own_group(_runs(env.world_size, 1), env.rank)
    )
    return Mesh(
        env.rank,
        env.world_size,
        sequence_parallel,
        expert_parallel,
        device,
        sequence_group=_own_group(slices, env.rank) if sequence_parallel > 1 else None,
        expert_group=_own_group(_runs(env.world_size, expert_parallel), env.rank) if expert_parallel > 1 else None,
        expert_data_group=expert_data_group,
        self_group=own_group,
        expert_nodes=_make_nodes(env, device, expert_parallel, ranks_per_node),
        checkpoint_group=dist.new_group(backend="gloo"),
    )


def _runs(world: int, length: int) -> list[list[int]]:
    return [list(range(a, a + length)) for a in range(0, world, length)]


def _make_nodes(place: LaunchEnv, device: torch.device, expert: int, node: int | None) -> NodeGroups | None:
    if place.world_size == 1 or expert == 1:
        return None
    # Machines may differ in ranks: then no rank must make groups.
    size = node or place.local_world_size
    ends = torch.tensor([size, -size], device=device)
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    largest, smallest = ends.tolist()
    if largest != -smallest or size == 1 or size >= expert or expert % size:
        return None
    inner = _own_group(_runs(place.world_size, size), place.rank)
    groups = _runs(place.world_size, expert)
    outer = _own_group([ranks[number::size] for ranks in groups for number in range(size)], place.rank)
    assert inner is not None and outer is not None
    return NodeGroups(size, expert // size, inner, outer)


def _own_group(partition: list[list[int]], rank: int) -> dist.ProcessGroup | None:
    # Every rank must take part in making every group, also those it is not in.
    groups = [(ranks, dist.new_group(ranks)) for ranks in partition]
    return next(group for ranks, group in groups if rank in ranks)


def _choose_device(place: LaunchEnv) -> torch.device:
    if torch.cuda.is_available():
        device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // place.local_world_size))
    keep_freed_memory()
    return torch.device("cpu")


def keep_freed_memory() -> None:
    """Have glibc reuse freed memory instead of returning it: each page would be faulted in again at every operation.

    Measured on retention at 65,536 tokens: half of the time in bf16. Without effect where the C library has no mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
