"""Speed of training relative to the device: measured matmul rate and model FLOPs utilization (MFU)."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
import torch.distributed as dist

from kabrn_dist.config import Config
from kabrn_dist.distributed.mesh import Mesh
from kabrn_dist.kernels.selection import matmul_dtype
from kabrn_dist.planner.count import count_parameters
from kabrn_dist.planner.flops import flops_per_token
from kabrn_dist.utils.precision import TORCH_DTYPES

# Rows, inner and outer size of the product that stands for the device's speed.
MATMUL_SHAPE = (512, 512, 512)
CUDA_MATMUL_SHAPE = (4096, 4096, 4096)
MATMUL_SECONDS = 0.25
LONG_RUN_SECONDS = 86_400.0
# Measurements of the rate in a run, the first included.
MAX_MEASUREMENTS = 4


def time_matmul(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], seconds: float) -> float:
    """Return the FLOP/s of a matrix product on this rank: the best of several runs, while all ranks try. Collective.

    Ranks that share cores or a card slow each other down as they do in training.

    Args:
        device: where to multiply.
        dtype: of both matrices.
        shape: rows, inner and outer size.
        seconds: how long to try.
    """
    rows, inner, outer = shape
    left = torch.ones(rows, inner, device=device, dtype=dtype)
    right = torch.ones(inner, outer, device=device, dtype=dtype)
    left @ right
    if dist.is_initialized():
        dist.barrier()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        _wait_for(device)
        begin = time.perf_counter()
        for _ in range(8):
            left @ right
        _wait_for(device)
        best = min(best, time.perf_counter() - begin)
    return 8 * 2.0 * rows * inner * outer / best


def measure_matmul_rate(mesh: Mesh, dtype: torch.dtype) -> float:
    """Return the FLOP/s of matrix products on all ranks together. Collective; takes `MATMUL_SECONDS`."""
    shape = CUDA_MATMUL_SHAPE if mesh.device.type == "cuda" else MATMUL_SHAPE
    rate = torch.tensor(time_matmul(mesh.device, dtype, shape, MATMUL_SECONDS), dtype=torch.float64)
    return float(mesh.all_reduce_sum(rate.to(mesh.device)))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Speed(NamedTuple):
    """What this machine can do.

    Attributes:
        matmul_rate: FLOP/s of matrix products on all ranks together.
        mfu_per_token_rate: model FLOPs utilization at one token a second.
    """

    matmul_rate: float
    mfu_per_token_rate: float


def measure_speed(config: Config, mesh: Mesh) -> Speed:
    """Measure the rate of matrix products in the precision of a run. Collective; takes `MATMUL_SECONDS`."""
    rate = measure_matmul_rate(mesh, matmul_dtype(mesh.device.type, TORCH_DTYPES[config.training.precision]))
    flops = flops_per_token(config.model, config.data.sequence_length, count_parameters(config.model).active)
    return Speed(rate, flops / rate)


class Utilization:
    """Tells the model FLOPs utilization of steps.

    No step is faster than its products: a rate that steps exceed was measured while the machine was busy with other
    work, and is measured again.

    Args:
        config: the whole configuration.
        mesh: all ranks.
        speed: what was measured at the start.
    """

    def __init__(self, config: Config, mesh: Mesh, speed: Speed) -> None:
        self.config, self.mesh, self.speed = config, mesh, speed
        self._measurements = 1

    def measure(self, tokens_per_second: float) -> tuple[float, str]:
        """Return the utilization at this speed, and a line that says so where the rate was measured again. Collective.

        Args:
            tokens_per_second: over all ranks.
        """
        utilization = self.speed.mfu_per_token_rate * tokens_per_second
        if self._measurements == MAX_MEASUREMENTS or not self.mesh.any_rank(utilization > 1):
            return utilization, ""
        self._measurements += 1
        again = measure_speed(self.config, self.mesh)
        if again.matmul_rate <= self.speed.matmul_rate:
            return utilization, ""
        before, self.speed = self.speed, again
        line = (
            f"matrix products were measured while the machine was busy: {again.matmul_rate / 1e9:,.1f} GFLOP/s, not "
            f"{before.matmul_rate / 1e9:,.1f}"
        )
        return again.mfu_per_token_rate * tokens_per_second, line


def describe_long_run(seconds: float, basis: str) -> str:
    """Return a warning of a run that takes longer than a day; empty for a shorter one.

    Args:
        seconds: estimate of the time to its end; may be no number.
        basis: what the estimate rests on, as the message begins.
    """
    if not seconds > LONG_RUN_SECONDS:
        return ""
    days = f"{seconds / LONG_RUN_SECONDS:,.1f} days"
    return (
        f"warning: {basis} {days} to its last step; lower training.steps or training.global_batch_size, take a smaller "
        "model, or use more processes or a faster machine"
    )


class TimeLeft:
    """Estimates the time to the end of a run from the steps of this session, validations and saves included.

    Args:
        last_step: last step of the run.
        done: steps done before this session.
    """

    def __init__(self, last_step: int, done: int) -> None:
        self.last_step, self.done = last_step, done
        # The first step that was asked about, and when that was.
        self._first: tuple[int, float] | None = None

    def seconds(self, step: int, duration: float) -> float:
        """Return the estimate after `step`; not a number after the first step of a session, slower than all others.

        Args:
            step: number of the step.
            duration: its seconds, which the first estimate rests on.
        """
        now = time.monotonic()
        if self._first is None or step <= self._first[0]:
            self._first = (step, now)
            return duration * (self.last_step - step) if step > self.done + 1 else float("nan")
        first, begin = self._first
        return (now - begin) / (step - first) * (self.last_step - step)
