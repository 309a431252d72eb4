"""Number of experts for each rank by its speed and memory: `experts_per_rank: auto` becomes numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from kabrn_dist.config import Config
from kabrn_dist.distributed.expert_placement import allocate_experts, plan_expert_counts
from kabrn_dist.distributed.launch_env import read_launch_env
from kabrn_dist.distributed.mesh import Mesh
from kabrn_dist.planner.count import count_parameters
from kabrn_dist.planner.memory import bytes_per_parameter, format_bytes
from kabrn_dist.train.throughput import time_matmul
from kabrn_dist.utils.precision import TORCH_DTYPES

# Fraction of the free memory for training state; the rest is left to activations, buckets and other processes.
STATE_FRACTION = 0.5
# Speeds within 20 % are treated as equal: that is the noise of a 0.1 s measurement.
EQUAL_SPEED = 0.8
SECONDS = 0.1
ROWS = 256


def resolve_placement(config: Config, mesh: Mesh) -> Config:
    """Return the configuration with a number of experts for each rank of an expert group. Collective.

    Without `rank_weights`, every rank times a matrix product of an expert's shape and reads its free memory. For each
    rank of an expert group the slowest one, and the one with the least memory, of all groups counts.

    Args:
        config: the whole configuration.
        mesh: all ranks.

    Raises:
        UserError: on all ranks, if the experts do not fit.
    """
    if config.parallel.experts_per_rank != "auto" or config.parallel.expert_parallel == 1:
        return config
    counts = plan_expert_counts(config)
    if counts is None:
        measured = torch.zeros(mesh.world_size, 2, dtype=torch.float64, device=mesh.device)
        measured[mesh.rank] = torch.tensor([_measure_speed(config, mesh.device), _free_bytes(mesh.device)])
        # Zeros add nothing to the one rank that wrote a row: all ranks read the same numbers.
        speeds, free = mesh.all_reduce_sum(measured).view(-1, mesh.expert_parallel, 2).amin(0).T.tolist()
        room = count_room(config, mesh.world_size, free)
        counts = allocate_experts(config.model.experts.num_experts, level(speeds), room)
        if mesh.is_main:
            print(describe_placement(speeds, free, room, counts), flush=True)
    parallel = config.parallel.model_copy(update={"experts_per_rank": counts, "rank_weights": None})
    return config.model_copy(update={"parallel": parallel})


def describe_placement(
    speeds: Sequence[float], free: Sequence[float], room: Sequence[int], counts: Sequence[int]
) -> str:
    """Return a line about what was measured, and the placement that follows from it.

    Args:
        speeds: FLOP/s of each rank of an expert group.
        free: free bytes of each.
        room: experts that fit into these.
        counts: experts that each is given.
    """
    ranks = "; ".join(
        f"{speed / 1e9:.1f} GFLOP/s, {format_bytes(each)} free, room for {most}"
        for speed, each, most in zip(speeds, free, room, strict=True)
    )
    return f"experts_per_rank auto: measured for the ranks of an expert group: {ranks}: experts {list(counts)}"


def level(speeds: Sequence[float]) -> list[float]:
    """Round each speed up to the fastest one that is equal within noise, so that equal cards get as many experts."""
    levels: list[float] = []
    for speed in sorted(speeds, reverse=True):
        if not levels or speed < EQUAL_SPEED * levels[-1]:
            levels.append(speed)
    return [min(top for top in levels if top >= speed) for speed in speeds]


def count_room(config: Config, world_size: int, free: Sequence[float]) -> list[int]:
    """Return how many experts (of all layers) fit into each rank's memory next to its dense parameters.

    Args:
        config: the whole configuration.
        world_size: number of ranks.
        free: free bytes of each rank of an expert group.
    """
    counts = count_parameters(config.model)
    dense = counts.replicated * bytes_per_parameter(config, world_size)
    expert = (
        counts.per_expert
        * len(config.model.moe_layers)
        * bytes_per_parameter(config, world_size // config.parallel.expert_parallel)
    )
    if not expert:
        return [config.model.experts.num_experts] * len(free)
    return [max(0, int((STATE_FRACTION * room - dense) / expert)) for room in free]


def _measure_speed(config: Config, device: torch.device) -> float:
    """FLOP/s of products of rows with an expert's matrix."""
    shape = (ROWS, config.model.hidden_size, config.model.experts.expert_hidden_size)
    return time_matmul(device, TORCH_DTYPES[config.training.precision], shape, SECONDS)


def _free_bytes(device: torch.device) -> float:
    """Free memory of this process's card, or its part of the machine's; practically infinite if it cannot be read."""
    neighbors = read_launch_env().local_world_size
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / -(-neighbors // torch.cuda.device_count())
    memory = Path("/proc/meminfo")
    lines = memory.read_text(encoding="ascii").splitlines() if memory.exists() else []
    available = next((int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable")), 2.0**62)
    return available / neighbors
