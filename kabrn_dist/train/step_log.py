"""The log entries of one finished step: what is written to log.jsonl, TensorBoard and the console."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kabrn_dist.backend.engine import Engine, StepResult
from kabrn_dist.backend.losses import StepTotals
from kabrn_dist.backend.ternary_weights import counted_parts
from kabrn_dist.data.dataset import Batch, TokenDataset
from kabrn_dist.distributed.all_to_all import Traffic
from kabrn_dist.metrics.logger import MetricsLogger, memory_gib
from kabrn_dist.metrics.moe import MoEStepStats, expert_lists, expert_values, gather_moe_stats
from kabrn_dist.metrics.sources import measure_step
from kabrn_dist.metrics.ternary import sum_layers, weight_values
from kabrn_dist.model.mixkabrn import BatchStats
from kabrn_dist.train.console import format_step
from kabrn_dist.train.guard import LossGuard, StepSync
from kabrn_dist.train.phase_timer import PhaseTimer
from kabrn_dist.train.throughput import Speed, TimeLeft, Utilization, describe_long_run


class StepLog(NamedTuple):
    """A finished step, made by keyword.

    Attributes:
        step: number of the step; the first is 1.
        sync: what the ranks have exchanged about it.
        result: outcome of the optimizer step.
        learning_rate: learning rate of the step.
        weight_decay: weight decay of the step.
        totals: what the step held over all ranks.
        batches: this rank's micro-batches, on the host.
        stats: this rank's statistics, one entry per micro-batch.
        codes: this rank's ternary codes before the update.
        traffic: this rank's exchange of tokens, one entry per layer.
        consumed: sequences that the run has drawn, this step included.
        seconds: duration of the step.
    """

    step: int
    sync: StepSync
    result: StepResult
    learning_rate: float
    weight_decay: float
    totals: StepTotals
    batches: list[Batch]
    stats: list[BatchStats]
    codes: list[Tensor]
    traffic: list[Traffic]
    consumed: int
    seconds: float


class StepLogger:
    """Writes the log of steps, and keeps what one log entry needs from the one before.

    Args:
        engine: the model in training.
        guard: decides whether steps are applied.
        metrics: console, log.jsonl and TensorBoard.
        timer: seconds of each phase of a step.
        data: the training split.
        speed: what the machines can do, as measured at the start.
        step: steps done before this session.

    Attributes:
        step: the last logged step; set it where a run goes back.
        tokens_per_expert: [L,E] tokens routed to each expert in the last logged step; None before the first.
    """

    def __init__(
        self,
        engine: Engine,
        guard: LossGuard,
        metrics: MetricsLogger,
        timer: PhaseTimer,
        data: TokenDataset,
        speed: Speed,
        step: int,
    ) -> None:
        self.engine, self.guard, self.metrics, self.timer, self.data = engine, guard, metrics, timer, data
        self.step = step
        self.tokens_per_expert: Tensor | None = None
        self._utilization = Utilization(engine.config, engine.mesh, speed)
        self._long_run_is_told = False
        self._time_left = TimeLeft(engine.config.training.steps, step)

    def write(self, log: StepLog) -> None:
        """Write the log of a step, without values that are not finite. Collective."""
        phase_seconds = self._take_phase_seconds(log.step)
        with self.timer.span("log"):
            stats = self._gather_moe_stats(log)
            values = (
                self._values(log, phase_seconds)
                | self._measure_utilization(log)
                | self._measure_sources(log)
                | expert_values(stats)
            )
            # Those that an adapter is trained beside do not change.
            if self.engine.config.model.quantize and not self.engine.is_adapter:
                values |= self._weight_values(log)
            self.metrics.write(log.step, values, format_step(log.step, values, log.result.applied), expert_lists(stats))
        self._warn_of_long_run(values["progress/seconds_left"])
        self.tokens_per_expert = stats.tokens_per_expert

    def _warn_of_long_run(self, seconds_left: float) -> None:
        warning = describe_long_run(seconds_left, "at the speed of the first steps this run takes")
        if warning and not self._long_run_is_told:
            self.metrics.print_line(warning)
            self._long_run_is_told = True

    def _take_phase_seconds(self, step: int) -> dict[str, float]:
        """Mean seconds per step of each phase since the last logged step, the writing of that one included."""
        steps, self.step = max(1, step - self.step), step
        return {phase: seconds / steps for phase, seconds in self.timer.take().items()}

    def _gather_moe_stats(self, log: StepLog) -> MoEStepStats:
        engine = self.engine
        layers, bias = engine.config.model.moe_layers, engine.model.routers.bias
        return gather_moe_stats(engine.mesh, layers, log.totals.tokens, log.stats, bias, log.traffic)

    def _measure_utilization(self, log: StepLog) -> dict[str, float]:
        utilization, line = self._utilization.measure(log.totals.tokens / log.seconds)
        if line:
            self.metrics.print_line(line)
        return {"speed/mfu": utilization}

    def _measure_sources(self, log: StepLog) -> dict[str, float]:
        return measure_step(self.engine.mesh, self.data, log.batches, log.stats, log.consumed)

    def _weight_values(self, log: StepLog) -> dict[str, float]:
        engine = self.engine
        parts, layers = counted_parts(engine), len(engine.config.model.layers)
        return weight_values(sum_layers(parts, log.codes, layers, engine.mesh))

    def _values(self, log: StepLog, phase_seconds: dict[str, float]) -> dict[str, float]:
        engine, guard = self.engine, self.guard
        tokens_per_second = log.totals.tokens / log.seconds
        training_seconds = sum(seconds for phase, seconds in phase_seconds.items() if phase != "log")
        unknown = () if log.totals.valid_tokens else ("total", "language")
        values = {f"loss/{name}": value for name, value in log.sync.losses.items() if name not in unknown} | {
            "optimizer/learning_rate": log.learning_rate,
            "optimizer/weight_decay": log.weight_decay,
            "optimizer/gradient_norm": log.result.gradient_norm,
            "optimizer/loss_scale": engine.loss_scale,
            "optimizer/quantization_lambda": engine.model.quant.lam,
            "guard/skipped": float(guard.skipped),
            "guard/spikes": float(guard.spikes),
            "guard/rollbacks": float(guard.rollbacks),
            "speed/tokens_per_second": tokens_per_second,
            "speed/seconds_per_step": log.seconds,
            "speed/data_wait_share": phase_seconds["data"] / training_seconds,
            "speed/memory_gib": memory_gib(engine.mesh.device),
            "progress/tokens": float(log.step * log.totals.tokens),
            "progress/seconds_left": self._time_left.seconds(log.step, log.seconds),
        }
        return values | {f"time/{phase}": seconds for phase, seconds in phase_seconds.items()}
