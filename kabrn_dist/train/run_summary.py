"""The block of lines that a run prints before its first step."""

from __future__ import annotations

import torch

from kabrn_dist.config import Config
from kabrn_dist.config.idle import list_idle_settings
from kabrn_dist.distributed.expert_placement import plan_expert_counts
from kabrn_dist.distributed.mesh import Mesh
from kabrn_dist.kernels.selection import int8_matmul_is_faster, matmul_dtype, select_kernels
from kabrn_dist.planner.count import count_parameters
from kabrn_dist.train.throughput import Speed, describe_long_run
from kabrn_dist.utils.precision import TORCH_DTYPES

_WIDTH = 80
_MASTERS = {
    "fp32": "fp32 weights and activations",
    "bf16": "bf16 copies of fp32 weights",
    "fp16": "fp16 copies of fp32 weights, scaled loss",
}


def describe_run(config: Config, mesh: Mesh, speed: Speed, step: int) -> list[str]:
    """Return the lines: device, precision, layout, parameters, step and kernels, at most 80 columns each; warnings.

    Args:
        config: the whole configuration.
        mesh: all ranks.
        speed: what the machines can do.
        step: steps done before this session.
    """
    training, parallel = config.training, config.parallel
    counts = count_parameters(config.model)
    accumulation = config.gradient_accumulation_steps(mesh.world_size)
    tokens = training.global_batch_size * config.data.sequence_length
    rest = 4 if training.precision == "fp32" else 2
    entries = [
        ("device", f"{_describe_device(mesh)}; {speed.matmul_rate / 1e9:,.1f} GFLOP/s measured on all ranks"),
        ("precision", f"training.precision {training.precision}: {_MASTERS[training.precision]}"),
        (
            "layout",
            f"{_count(mesh.world_size, 'process', 'es')}: expert parallel {parallel.expert_parallel}, "
            f"sequence parallel {parallel.sequence_parallel}, ZeRO {parallel.zero_stage}",
        ),
    ]
    if mesh.expert_parallel > 1:
        entries.append(("", f"experts per rank: {list(plan_expert_counts(config) or ())}"))
    entries += [
        ("parameters", f"{counts.total:,} in total, {counts.active:,} active per token"),
        (
            "weights",
            f"{counts.ternary:,} ternary in {_bytes(counts.ternary / 4)}, others in "
            f"{_bytes(rest * (counts.total - counts.ternary))}",
        ),
        (
            "step",
            f"{tokens:,} tokens = {training.global_batch_size} sequences: "
            f"{_count(mesh.data_world_size, 'data rank')} × "
            f"micro-batch of {training.micro_batch_size} × {_count(accumulation, 'accumulation step')}",
        ),
        ("kernels", select_kernels(mesh.device.type).reason),
        ("", _describe_products(config, mesh.device)),
    ]
    lines = [line for name, text in entries for line in _fold(name, text)]
    lines += [f"warning: {line}" for line in list_idle_settings(config, mesh.world_size)]
    least_seconds = speed.mfu_per_token_rate * tokens * (training.steps - step)
    warning = describe_long_run(least_seconds, "even at the measured rate of matrix products this run takes")
    return [*lines, warning] if warning else lines


def _describe_device(mesh: Mesh) -> str:
    if mesh.device.type == "cuda":
        return torch.cuda.get_device_name(mesh.device)
    return f"cpu, {_count(torch.get_num_threads(), 'thread')} per process"


def _describe_products(config: Config, device: torch.device) -> str:
    dtype = TORCH_DTYPES[config.training.precision]
    backward = "fp32" if matmul_dtype(device.type, dtype) == torch.float32 else config.training.precision
    if not config.model.quantize:
        return f"matrices are not quantized; products in {backward}"
    forward = "int8" if int8_matmul_is_faster(device.type, dtype) else "fp32"
    return f"products forward in {forward}, backward in {backward}, measured faster here"


def _bytes(count: float) -> str:
    return f"{count / 2**20:.2f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{plural if number != 1 else ''}"


def _fold(name: str, text: str) -> list[str]:
    """Lines with the name in a column of its own, broken between words where they are longer than a terminal."""
    lines = [f"{name:<12}"]
    for word in text.split(" "):
        if len(lines[-1]) + len(word) > _WIDTH:
            lines.append(" " * 12)
        lines[-1] += f"{word} "
    return [line.rstrip() for line in lines]
