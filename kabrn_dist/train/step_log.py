"""The log entries of one finished step: what is written to log.jsonl, TensorBoard and the console."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kabrn_dist.backend.engine import Engine, StepResult
from kabrn_dist.backend.losses import StepTotals
from kabrn_dist.backend.ternary_weights import counted_parts
from kabrn_dist.distributed.all_to_all import Traffic
from kabrn_dist.metrics.logger import MetricsLogger, memory_gib
from kabrn_dist.metrics.moe import expert_lists, expert_values, gather_moe_stats
from kabrn_dist.metrics.ternary import sum_layers, weight_values
from kabrn_dist.model.mixkabrn import BatchStats
from kabrn_dist.train.console import format_step
from kabrn_dist.train.guard import LossGuard, StepSync


class StepLog(NamedTuple):
    """A finished step, made by keyword.

    Attributes:
        step: number of the step; the first is 1.
        sync: what the ranks have exchanged about it.
        result: outcome of the optimizer step.
        learning_rate: learning rate of the step.
        weight_decay: weight decay of the step.
        totals: what the step held over all ranks.
        stats: this rank's statistics, one entry per micro-batch.
        codes: this rank's ternary codes before the update.
        traffic: this rank's exchange of tokens, one entry per layer.
        sources: values to log of the data's sources.
        seconds: duration of the step.
        phase_seconds: mean seconds per step of each phase since the last logged step.
        mfu: model FLOPs utilization: FLOP/s of the model over the measured rate of matrix products.
        seconds_left: estimated time to the end of the run; not a number if it is not known yet.
    """

    step: int
    sync: StepSync
    result: StepResult
    learning_rate: float
    weight_decay: float
    totals: StepTotals
    stats: list[BatchStats]
    codes: list[Tensor]
    traffic: list[Traffic]
    sources: dict[str, float]
    seconds: float
    phase_seconds: dict[str, float]
    mfu: float
    seconds_left: float


def log_step(log: StepLog, metrics: MetricsLogger, engine: Engine, guard: LossGuard) -> Tensor:
    """Write the log of a step, without values that are not finite. Collective.

    Returns:
        [L,E] tokens routed to each expert, on all ranks.
    """
    model, mesh = engine.config.model, engine.mesh
    bias = engine.model.routers.bias
    stats = gather_moe_stats(mesh, model.moe_layers, log.totals.tokens, log.stats, bias, log.traffic)
    values = _values(log, engine, guard) | log.sources | expert_values(stats)
    if model.quantize:
        values |= weight_values(sum_layers(counted_parts(engine), log.codes, len(model.layers), mesh))
    metrics.write(log.step, values, format_step(log.step, values, log.result.applied), expert_lists(stats))
    return stats.tokens_per_expert


def _values(log: StepLog, engine: Engine, guard: LossGuard) -> dict[str, float]:
    phases = log.phase_seconds
    training_seconds = sum(seconds for phase, seconds in phases.items() if phase != "log")
    values = {f"loss/{name}": value for name, value in log.sync.losses.items()} | {
        "optimizer/learning_rate": log.learning_rate,
        "optimizer/weight_decay": log.weight_decay,
        "optimizer/gradient_norm": log.result.gradient_norm,
        "optimizer/loss_scale": engine.loss_scale,
        "optimizer/quantization_lambda": engine.model.quant.lam,
        "guard/skipped": float(guard.skipped),
        "guard/spikes": float(guard.spikes),
        "guard/rollbacks": float(guard.rollbacks),
        "speed/tokens_per_second": log.totals.tokens / log.seconds,
        "speed/seconds_per_step": log.seconds,
        "speed/data_wait_share": phases["data"] / training_seconds,
        "speed/memory_gib": memory_gib(engine.mesh.device),
        "speed/mfu": log.mfu,
        "progress/tokens": float(log.step * log.totals.tokens),
        "progress/seconds_left": log.seconds_left,
    }
    return values | {f"time/{phase}": seconds for phase, seconds in phases.items()}
