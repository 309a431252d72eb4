"""Memory that a process needs at least, from counts alone, and the memory that it has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from kabrn_dist.config import Config, ModelConfig
from kabrn_dist.planner.count import count_adapter_parameters, count_parameters
from kabrn_dist.utils.errors import UserError

# Beyond this many parameters a lower bound will do: torch cannot even describe tensors of some such sizes.
MAX_COUNTED = 2**48
# More than any process has: a plan for other machines need not go further.
MAX_PLANNED_BYTES = 2**50


class MemoryNeed(NamedTuple):
    """Bytes that one process needs at least, by what they are for.

    Attributes:
        state: weights, gradients and moments.
        activations: hidden states and logits of one micro-batch.
        batch: tokens of one optimizer step, on the host.
    """

    state: float
    activations: float
    batch: float


def bytes_per_parameter(config: Config, copies: int) -> float:
    """Return the bytes of a parameter that `copies` ranks hold: master and moments, gradient, weight.

    ZeRO 1, 2 and 3 shard one after the other of them.
    """
    working = working_bytes(config)
    return sum(
        part / max(1, copies) if config.parallel.zero_stage >= stage else part
        for stage, part in ((1, 12), (2, working), (3, working))
    )


def working_bytes(config: Config) -> int:
    """Return the bytes of a weight that is computed with."""
    return 4 if config.training.precision == "fp32" else 2


def estimate_memory(config: Config, world_size: int) -> MemoryNeed:
    """Return the least memory of one of `world_size` processes, in bytes.

    Args:
        config: the whole configuration.
        world_size: number of processes.
    """
    model, training, parallel = config.model, config.training, config.parallel
    dense, routed = map(float, _split_parameters(model))
    holders = world_size // parallel.expert_parallel
    routed /= parallel.expert_parallel
    if config.finetune is not None and config.finetune.trains_adapter:
        # Beside what is trained, the base needs its weights alone.
        sharers = (world_size, holders) if parallel.zero_stage == 3 else (1, 1)
        state = working_bytes(config) * (dense / sharers[0] + routed / max(1, sharers[1]))
        state += count_adapter_parameters(config) * bytes_per_parameter(config, world_size)
    else:
        state = dense * bytes_per_parameter(config, world_size) + routed * bytes_per_parameter(config, holders)
    tokens = training.micro_batch_size * config.data.sequence_length / parallel.sequence_parallel
    working = working_bytes(config)
    kept = len(model.layers) if model.activation_checkpointing == "keep" else 1
    activations = tokens * (model.hidden_size * kept * working + 4 * model.vocab_size)
    data_ranks = max(1, world_size // parallel.sequence_parallel)
    # Tokens, targets, positions and documents, 8 bytes each.
    batch = 32 * training.global_batch_size * config.data.sequence_length / data_ranks
    return MemoryNeed(state, activations, batch)


def check_memory(config: Config, world_size: int, available: float, where: str) -> None:
    """Refuse a run that cannot fit, before anything is built.

    Args:
        config: the whole configuration.
        world_size: number of processes.
        available: bytes that one process can have.
        where: what has them, for the message.

    Raises:
        UserError: with the figures and the keys that decide.
    """
    need = estimate_memory(config, world_size)
    total = sum(need)
    if total <= available:
        return
    model, training = config.model, config.training
    causes = {
        need.state: f"model.vocab_size {model.vocab_size}, hidden_size {model.hidden_size}, layers {len(model.layers)} "
        f"or experts (num_experts {model.experts.num_experts}, expert_hidden_size {model.experts.expert_hidden_size})",
        need.activations: f"training.micro_batch_size {training.micro_batch_size}, data.sequence_length "
        f"{config.data.sequence_length} or model.vocab_size {model.vocab_size}",
        need.batch: f"training.global_batch_size {training.global_batch_size} or data.sequence_length "
        f"{config.data.sequence_length}",
    }
    raise UserError(
        f"a process needs at least {format_bytes(total)} of memory ({format_bytes(need.state)} for weights, gradients "
        f"and moments, {format_bytes(need.activations + need.batch)} for activations and data), and {where} has "
        f"{format_bytes(available)}; lower {causes[max(need)]}, or use more processes with parallel.zero_stage 3"
    )


def process_memory(device: torch.device, local_world_size: int) -> float:
    """Return the bytes that this process can have at most: its part of its card, or of the machine with its swap
    and of what its control groups may take.

    Args:
        device: the device of the process.
        local_world_size: number of processes on this machine.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1] / -(-local_world_size // torch.cuda.device_count())
    lines = _read_lines(Path("/proc/meminfo"))
    kib = [int(line.split()[1]) for line in lines if line.startswith(("MemTotal:", "SwapTotal:"))]
    machine = 1024.0 * sum(kib) if kib else float("inf")
    container = cgroup_memory(_read_lines(Path("/proc/self/cgroup")), Path("/sys/fs/cgroup"))
    return min(machine, container) / local_world_size


def cgroup_memory(groups: Sequence[str], root: Path) -> float:
    """Return the bytes that a container or a batch system leaves its processes: the least of their control groups.

    Args:
        groups: lines of /proc/self/cgroup; groups of both versions.
        root: where control groups are mounted.
    """
    least = float("inf")
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        own = top / path.lstrip("/")
        # Inside a container the path is often that of the host; the limit is then in the top folder.
        for folder in [own, *own.parents]:
            if folder.is_relative_to(top) and (text := "".join(_read_lines(folder / name))).isdecimal():
                least = min(least, float(text))
    return least


def _read_lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def format_bytes(count: float) -> str:
    """Return a number of bytes for a message, as 1.50 GiB.

    >>> [format_bytes(2.0**power) for power in (20, 33, 45, 90)]
    ['0.00 GiB', '8.00 GiB', '32.00 TiB', '1.1e+12 PiB']
    """
    for power, name in ((40, "GiB"), (50, "TiB")):
        if count < 2.0**power:
            return f"{count / 2.0 ** (power - 10):,.2f} {name}"
    return f"{count / 2.0**50:.2g} PiB"


def parameter_floor(model: ModelConfig) -> tuple[int, int]:
    """Return numbers of parameters that a model has at least: outside the routed experts, and of these.

    Embedding, head, the four projections of each mixer, and two matrices of each feed-forward.
    """
    width, layers, moe_layers = model.hidden_size, len(model.layers), len(model.moe_layers)
    heads = model.retention
    mixer = width * heads.num_heads * 2 * (heads.key_dim + heads.value_dim)
    experts = model.experts
    shared = moe_layers * experts.num_shared_experts * 2 * width * experts.expert_hidden_size
    dense = (layers - moe_layers) * 2 * width * model.dense_hidden_size
    conv = layers * 2 * width * model.short_conv_size
    outside = 2 * model.vocab_size * width + layers * mixer + shared + dense + conv
    edge = experts.grid_size if experts.type in ("hat", "bspline") else 1
    return outside, moe_layers * experts.num_experts * width * (2 * experts.expert_hidden_size * edge + 1)


def _split_parameters(model: ModelConfig) -> tuple[int, int]:
    """Numbers of parameters outside the routed experts, and of these; lower bounds where they are beyond all sense."""
    floor = parameter_floor(model)
    if sum(floor) > MAX_COUNTED:
        return floor
    counts = count_parameters(model)
    return counts.replicated, counts.total - counts.replicated
