"""Experts for each rank by what it can do: `experts_per_rank: auto` becomes numbers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from kabrn_dist.config import Config
from kabrn_dist.distributed.expert_placement import allocate_experts, plan_expert_counts
from kabrn_dist.distributed.launch_env import read_launch_env
from kabrn_dist.distributed.mesh import Mesh
from kabrn_dist.planner.count import count_parameters
from kabrn_dist.utils.precision import TORCH_DTYPES

# The rest is left to activations, buckets and whatever else runs there.
STATE_SHARE = 0.5
# Chance makes such differences in a measurement of a tenth of a second.
ALIKE = 0.8
SECONDS = 0.1
ROWS = 256


def resolve_placement(config: Config, mesh: Mesh) -> Config:
    """The configuration with a number of experts for each rank of an expert group, the same on all ranks. Collective.

    Without rank_weights, every rank times a product of an expert's shape and reads its free memory. What counts for a
    place in the expert group is the slowest, and the fullest, rank that has it in any group.

    Raises:
        UserError: on all ranks, where the experts do not fit.
    """
    if config.parallel.experts_per_rank != "auto":
        return config
    counts = plan_expert_counts(config)
    if counts is None:
        measured = torch.zeros(mesh.world_size, 2, dtype=torch.float64, device=mesh.device)
        measured[mesh.rank] = torch.tensor([_measure_speed(config, mesh.device), _free_bytes(mesh.device)])
        # Zeros add nothing to the one rank that wrote a row: all ranks read the same numbers.
        speeds, free = mesh.all_reduce_sum(measured).view(-1, mesh.expert_parallel, 2).amin(0).T.tolist()
        counts = allocate_experts(
            config.model.experts.num_experts, level(speeds), count_room(config, mesh.world_size, free)
        )
    parallel = config.parallel.model_copy(update={"experts_per_rank": counts, "rank_weights": None})
    return config.model_copy(update={"parallel": parallel})


def level(speeds: Sequence[float]) -> list[float]:
    """Each speed as that of the fastest rank it cannot be told from, so that like cards get like shares."""
    levels: list[float] = []
    for speed in sorted(speeds, reverse=True):
        if not levels or speed < ALIKE * levels[-1]:
            levels.append(speed)
    return [min(top for top in levels if top >= speed) for speed in speeds]


def count_room(config: Config, world: int, free: Sequence[float]) -> list[int]:
    """Experts (of all layers) whose training state fits into a rank's free bytes, beside its dense parameters."""
    counts = count_parameters(config.model)
    dense = counts.replicated * _bytes_a_parameter(config, world)
    expert = (
        counts.per_expert
        * len(config.model.moe_layers)
        * _bytes_a_parameter(config, world // config.parallel.expert_parallel)
    )
    if not expert:
        return [config.model.experts.num_experts] * len(free)
    return [max(0, int((STATE_SHARE * room - dense) / expert)) for room in free]


def _bytes_a_parameter(config: Config, copies: int) -> float:
    """Of a parameter that `copies` ranks hold: master and moments, gradient, weight, which ZeRO 1, 2, 3 share out."""
    working = 4 if config.training.precision == "fp32" else 2
    return sum(
        part / copies if config.parallel.zero_stage >= stage else part
        for stage, part in ((1, 12), (2, working), (3, working))
    )


def _measure_speed(config: Config, device: torch.device) -> float:
    """Products a second of rows with an expert's matrix: the best of several, while all ranks try."""
    dtype = TORCH_DTYPES[config.training.precision]
    rows = torch.ones(ROWS, config.model.hidden_size, device=device, dtype=dtype)
    matrix = torch.ones(config.model.hidden_size, config.model.experts.expert_hidden_size, device=device, dtype=dtype)
    rows @ matrix
    if dist.is_initialized():
        dist.barrier()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        _wait(device)
        began = time.perf_counter()
        for _ in range(8):
            rows @ matrix
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 8 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free_bytes(device: torch.device) -> float:
    """Free memory of this process's card, or its share of the machine's; without bound where that cannot be read."""
    neighbors = read_launch_env().local_world_size
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / -(-neighbors // torch.cuda.device_count())
    memory = Path("/proc/meminfo")
    lines = memory.read_text(encoding="ascii").splitlines() if memory.exists() else []
    available = next((int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable")), 2.0**62)
    return available / neighbors
