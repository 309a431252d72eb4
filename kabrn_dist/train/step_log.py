"""What is written down of a step: one object in the log, a scalar a value in TensorBoard, a line for people."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kabrn_dist.backend.engine import Engine, StepResult
from kabrn_dist.backend.losses import StepTotals
from kabrn_dist.distributed.all_to_all import Traffic
from kabrn_dist.metrics.logger import MetricsLogger, memory_gib
from kabrn_dist.metrics.moe import expert_lists, expert_values, gather_moe_stats
from kabrn_dist.metrics.ternary import measure_weights, weight_values
from kabrn_dist.model.mixkabrn import BatchStats
from kabrn_dist.train.guard import LossGuard, StepSync


class StepLog(NamedTuple):
    """A step that was taken.

    Attributes:
        number: of the step, the first is 1.
        agreed: what all ranks know of it. update: what it did. rate, decay: its learning rate and weight decay.
        codes: this rank's ternary codes before it.
        totals: what it held. sums: this rank's, a micro-batch each. traffic: this rank's, a layer each.
        sources: what to log of the data's sources. seconds: how long it took, of which `waited` for data.
    """

    number: int
    agreed: StepSync
    update: StepResult
    rate: float
    decay: float
    codes: list[Tensor]
    totals: StepTotals
    sums: list[BatchStats]
    traffic: list[Traffic]
    sources: dict[str, float]
    seconds: float
    waited: float


def log_step(done: StepLog, metrics: MetricsLogger, engine: Engine, guard: LossGuard) -> Tensor:
    """Write down a step, without what is not finite. Returns [L,E], the copies that chose each expert. Collective."""
    layers, routers = engine.config.model.moe_layers, engine.model.routers
    watch = gather_moe_stats(engine.mesh, layers, done.totals.tokens, done.sums, routers.bias, done.traffic)
    values = _values(done, engine, guard) | done.sources | expert_values(watch)
    values |= weight_values(measure_weights(engine, done.codes))
    metrics.write(done.number, values, _line(done, values), expert_lists(watch))
    return watch.load


def _values(done: StepLog, engine: Engine, guard: LossGuard) -> dict[str, float]:
    return {f"loss/{name}": value for name, value in done.agreed.losses.items()} | {
        "optimizer/learning_rate": done.rate,
        "optimizer/weight_decay": done.decay,
        "optimizer/gradient_norm": done.update.gradient_norm,
        "optimizer/loss_scale": engine.loss_scale,
        "optimizer/quantization_lambda": engine.model.quant.lam,
        "guard/skipped": float(guard.skipped),
        "guard/spikes": float(guard.spikes),
        "guard/rollbacks": float(guard.rollbacks),
        "speed/tokens_per_second": done.totals.tokens / done.seconds,
        "speed/seconds_per_step": done.seconds,
        "speed/data_wait_share": done.waited / done.seconds,
        "speed/memory_gib": memory_gib(engine.mesh.device),
        "progress/tokens": float(done.number * done.totals.tokens),
    }


def _line(done: StepLog, values: dict[str, float]) -> str:
    line = (
        f"step {done.number:6d}  loss {values['loss/total']:.4f}  language {values['loss/language']:.4f}  "
        f"balance {values['loss/balance']:.3f}  grad {values['optimizer/gradient_norm']:.3f}  "
        f"lr {values['optimizer/learning_rate']:.2e}  {values['speed/tokens_per_second']:,.0f} tokens/s  "
        f"{values['speed/memory_gib']:.2f} GiB"
    )
    return line if done.update.applied else f"{line}  SKIPPED"
