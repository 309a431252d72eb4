"""The training loop: shards → batch → model → losses → guard → optimizer step → metrics and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from kabrn_dist.backend.engine import Engine
from kabrn_dist.backend.losses import Losses
from kabrn_dist.backend.sharded_state import sharded_state
from kabrn_dist.backend.ternary_weights import current_codes
from kabrn_dist.checkpoint.layout import checkpoint_path
from kabrn_dist.checkpoint.store import CheckpointStore
from kabrn_dist.config import Config
from kabrn_dist.config.file import dump_config
from kabrn_dist.distributed.collectives import run_on_all, run_on_main
from kabrn_dist.distributed.launch_env import LaunchEnv
from kabrn_dist.distributed.mesh import Mesh, make_mesh
from kabrn_dist.distributed.process_group import DEFAULT_TIMEOUT_S, init_distributed
from kabrn_dist.grow.run import grow
from kabrn_dist.metrics.logger import MetricsLogger
from kabrn_dist.model.mixkabrn import build_model
from kabrn_dist.planner.memory import check_memory, process_memory
from kabrn_dist.train.console import format_text
from kabrn_dist.train.datasets import (
    Datasets,
    describe_cut_documents,
    describe_repetition,
    open_datasets,
    wait_for_verification,
)
from kabrn_dist.train.expert_balance import resolve_placement
from kabrn_dist.train.figures import TrainingFigures
from kabrn_dist.train.finetune import FinetuneStart, describe_finished, start_from_base
from kabrn_dist.train.forgetting import describe_forgetting, forgetting_values, measure_base_bits
from kabrn_dist.train.guard import Decision, LossGuard, StepSync, sync_step
from kabrn_dist.train.phase_timer import PhaseTimer
from kabrn_dist.train.precision import resolve_precision
from kabrn_dist.train.resume import (
    START,
    Progress,
    check_state,
    choose_checkpoint,
    describe_resume,
    make_run_state,
    read_earlier_base,
    restore,
)
from kabrn_dist.train.run_folder import keep_log, write_config, write_description
from kabrn_dist.train.run_summary import describe_run
from kabrn_dist.train.sample import generate_sample
from kabrn_dist.train.saver import Saver
from kabrn_dist.train.schedule import learning_rate, weight_decay
from kabrn_dist.train.step_batches import next_step_batches
from kabrn_dist.train.step_log import StepLog, StepLogger
from kabrn_dist.train.stop_requests import StopRequests
from kabrn_dist.train.target_share import TargetShare
from kabrn_dist.train.task_scores import describe_task_scores, score_tasks
from kabrn_dist.train.throughput import measure_speed
from kabrn_dist.train.validation import score
from kabrn_dist.train.watchdog import Watchdog
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.fault_injection import inject_fault
from kabrn_dist.utils.launch_time import launch_time
from kabrn_dist.utils.lock import acquire_lock


def train(config: Config, env: LaunchEnv, resume: str = "auto", stop_after: int | None = None) -> bool:
    """Train to `training.steps`, or until a stop request; then save.

    Args:
        config: the whole configuration.
        env: rank and world size of this process, from the launcher.
        resume: "auto" continues from the newest intact checkpoint of the run's folder if there is one, "must" fails
            without one, "never" refuses a folder that has one; or a checkpoint's path.
        stop_after: stop after this many steps of this session; None for no limit.

    Returns:
        True if the run is finished, False if it was stopped before its last step.

    Raises:
        UserError: for impossible settings and unusable data or checkpoints, on all ranks.
    """
    config.check_world_size(env.world_size)
    datasets = open_datasets(config)
    # The watchdog of a rank that hangs must act before the other ranks' collectives time out.
    with init_distributed(env, max(DEFAULT_TIMEOUT_S, 2 * config.guard.hang_timeout_s)) as device:
        config = resolve_precision(config, device)
        available = process_memory(device, env.local_world_size)
        run_on_all(None, check_memory, config, env.world_size, available, "its part of this machine")
        parallel = config.parallel
        mesh = make_mesh(env, device, parallel.expert_parallel, parallel.sequence_parallel, parallel.ranks_per_node)
        with Trainer.create(resolve_placement(config, mesh), mesh, datasets, resume) as trainer:
            finished = trainer.run(stop_after)
        # If one process exits with a code that is not 0, its launcher ends the others: none may still be writing.
        mesh.any_rank(False)
        return finished


class Trainer:
    """One session of a run: from its checkpoint, if any, to its end or a stop request.

    `Trainer.create` builds one, and a `with` block around `run` owns what must be released whatever happens: the lock
    on the run's folder, the watchdog, the signal handlers and the log files.

    Attributes:
        config: the whole configuration, with a number of experts for each rank.
        mesh: this process among the others.
        datasets: both splits of the data.
        engine: the model in training.
        store: checkpoints of the run.
        stop_requests: signals, the file STOP and the time limit.
        resumed_from: checkpoint that the session started from; None for a fresh start.
        start_lines: what the console says of that checkpoint.
        first_step: steps done before this session.
        step: steps done, those that changed nothing included.
        skipped_data_steps: steps' worth of data that rollbacks have skipped.
        guard: decides whether steps are applied.
        finetune_start: how a fine-tuning has started in this session; None in training from the start.
        base: what checkpoints say of the model that is fine-tuned; None in training from the start.
        stopping: True once the ranks have agreed to stop.
        timer: seconds of each phase of a step.
        metrics: console, log.jsonl and TensorBoard; within the `with` block only.
        saver: writes checkpoints; within the `with` block only.
        watchdog: ends this process if it makes no progress.
    """

    metrics: MetricsLogger
    saver: Saver

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        datasets: Datasets,
        engine: Engine,
        store: CheckpointStore,
        stop_requests: StopRequests,
        watchdog: Watchdog,
        resources: ExitStack,
        progress: Progress = START,
        resumed_from: Path | None = None,
        start_lines: Sequence[str] = (),
        finetune_start: FinetuneStart | None = None,
    ) -> None:
        self.config, self.mesh, self.datasets, self.engine, self.store = config, mesh, datasets, engine, store
        self.stop_requests, self.watchdog, self.resumed_from = stop_requests, watchdog, resumed_from
        self.start_lines = start_lines
        self._resources = resources
        self.first_step = self.step = progress.step
        self.skipped_data_steps = progress.skipped_data_steps
        self.guard = LossGuard(config.guard)
        self.guard.restore(progress.guard)
        self.finetune_start = finetune_start
        self.base = None if finetune_start is None else finetune_start.state
        self.stopping = False
        self.timer = PhaseTimer()
        self._target_share = TargetShare()

    @classmethod
    def create(cls, config: Config, mesh: Mesh, datasets: Datasets, resume: str = "auto") -> Trainer:
        """Build a trainer: lock the run's folder, build the model and its optimizer, and load a checkpoint. Collective.

        A run with `run.init_from` and without a checkpoint gets one, grown from the other run's. The trainer holds the
        lock and a running watchdog from here on; a `with` block releases them, as a failure in here does.

        Args:
            config: the whole configuration, as `resolve_placement` returns it.
            mesh: this process among the others.
            datasets: both splits of the data.
            resume: see `train`.

        Raises:
            UserError: on all ranks, if another process runs in the folder or the checkpoint cannot be used.
        """
        folder = config.run.folder
        with ExitStack() as resources:
            stop_requests = StopRequests(folder, mesh.is_main, config.run.max_minutes, launch_time())
            watchdog = resources.enter_context(Watchdog(mesh.rank, config.guard.hang_timeout_s))
            lock = run_on_main(None, acquire_lock, folder)
            if lock is not None:
                resources.enter_context(lock)
            store = CheckpointStore(
                folder / "checkpoints",
                config.checkpoint.keep_last,
                config.checkpoint.keep_every,
                background_group=mesh.checkpoint_group,
            )
            checkpoint = choose_checkpoint(store, resume)
            start_lines: list[str] = []
            if checkpoint is not None:
                # Before anything slow: a change that the checkpoint does not allow ends the session here.
                start_lines = run_on_all(None, describe_resume, checkpoint, config)
            elif config.run.init_from is not None:
                checkpoint = grow(config.run.init_from, config)
                start_lines = [f"grown from the run in {config.run.init_from}, as step 0 of this run"]
            model, start = build_model(config, mesh), None
            if config.finetune is not None:
                start = start_from_base(model, config, run_on_all(None, read_earlier_base, checkpoint))
            engine = Engine(model, config, mesh)
            progress = restore(store, checkpoint, engine, datasets, config) if checkpoint else START
            return cls(
                config,
                mesh,
                datasets,
                engine,
                store,
                stop_requests,
                watchdog,
                resources.pop_all(),
                progress,
                checkpoint,
                start_lines,
                start,
            )
        raise AssertionError("ExitStack suppresses nothing")

    def __enter__(self) -> Trainer:
        """Open the log, print what runs, and listen for signals. Collective."""
        try:
            self._open()
        except BaseException:
            self._resources.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the signal handlers, the log files, the lock and the watchdog."""
        self._resources.close()

    def _open(self) -> None:
        config, mesh, folder = self.config, self.mesh, self.config.run.folder
        run_on_main(None, write_description, config, self.datasets.tokenizer, self.resumed_from is None)
        log_lines = run_on_main(None, keep_log, folder, self.step)
        self.metrics = run_on_all(None, MetricsLogger, folder, mesh.is_main, self.step, config.training.steps)
        self._resources.callback(self.metrics.close)
        self.metrics.write_text(0, "config", dump_config(config))
        speed = measure_speed(config, mesh)
        finetune_lines = () if self.finetune_start is None else self.finetune_start.lines
        shown = *describe_run(config, mesh, speed, self.step), *self.start_lines, *finetune_lines, *(log_lines or ())
        for line in shown:
            self.metrics.print_line(line)
        if warning := describe_repetition(config, self.datasets.train):
            self.metrics.print_line(warning)
        for line in [*describe_cut_documents(self.datasets.train), *self.datasets.warnings]:
            self.metrics.print_line(line)
        if self.datasets.validation is None:
            self.metrics.print_line("warning: no text is held out in this data, so nothing validates this run")
        saved_step = self.step if self.resumed_from else None
        self.saver = Saver(
            self.store, config.checkpoint.async_save, saved_step, self.metrics.print_line, self._try_write_config
        )
        self._figures = TrainingFigures(self.engine, self.metrics, self.step)
        self._step_logger = StepLogger(
            self.engine, self.guard, self.metrics, self.timer, self.datasets.train, speed, self.step
        )
        self._resources.enter_context(self.stop_requests.listening())

    def _try_write_config(self) -> None:
        """Put this session's configuration in the place of that of an earlier one; not collective."""
        try:
            if self.mesh.is_main:
                write_config(self.config)
        except (OSError, UserError) as error:
            self.metrics.print_line(f"config.yaml still holds the last session's configuration: {error}")

    def run(self, stop_after: int | None = None) -> bool:
        """Train, validate and save at their intervals. Collective.

        Args:
            stop_after: stop after this many steps; None for no limit.

        Returns:
            True if the run is finished.
        """
        steps, config = self.config.training.steps, self.config
        last = steps if stop_after is None else min(steps, self.first_step + stop_after)
        if self.step == 0 < last:
            self._measure_base()
        while self.step < last and not self.stopping and self._has_data():
            self.train_step()
            self.saver.check()
            if self.guard.exhausted:
                self._roll_back()
                continue
            if _is_due(self.step, config.validation.eval_interval):
                self._validate()
                self._measure_forgetting()
            if _is_due(self.step, config.validation.task_interval) and not self.stopping:
                self._score_tasks()
            if _is_due(self.step, config.checkpoint.save_interval) and self.step < last and not self.stopping:
                self._save(wait=False)
        return self.finish()

    def train_step(self) -> None:
        """Take one optimizer step, or skip it if the guard says so, and log it. Collective."""
        config, engine, mesh = self.config, self.engine, self.mesh
        self.watchdog.report_progress(f"in step {self.step + 1}")
        inject_fault("step.begin")
        begin = time.perf_counter()
        first_sequence = self.sequences_consumed
        lr = learning_rate(self.step, config.training.steps, config.optimizer)
        decay = weight_decay(self.step, config.training.steps, config.optimizer)
        with self.timer.span("data"):
            batches, totals = next_step_batches(config, mesh, self.datasets.train, first_sequence)
        with self.timer.span("forward_backward"):
            passes = [engine.forward_backward(batch.to(mesh.device), totals) for batch in batches]
        with self.timer.span("sync"):
            losses, grad_norm = _sum_losses([losses for losses, _ in passes]), engine.local_grad_norm()
            sync = sync_step(mesh, losses, grad_norm, self.stop_requests.requested(), self.saver.done())
        decision = self.guard.decide(sync, has_targets=totals.valid_tokens > 0)
        is_logged = _is_due(self.step + 1, config.training.log_interval) or self.step + 1 == config.training.steps
        with self.timer.span("log"):
            codes = current_codes(engine) if is_logged and not engine.is_adapter else []
        with self.timer.span("optimizer"):
            result = engine.skip_step() if decision.skip else engine.optimizer_step(lr, decay)
        self.guard.record(decision, sync, result.applied)
        self._end_step(sync, decision, first_sequence)
        if warning := self._target_share.add(totals):
            self.metrics.print_line(f"step {self.step:6d}  {warning}")
        traffic = [layer.take() for layer in engine.model.traffic]
        if not is_logged:
            return
        log = StepLog(
            step=self.step,
            sync=sync,
            result=result,
            learning_rate=lr,
            weight_decay=decay,
            totals=totals,
            batches=batches,
            stats=[stats for _, stats in passes],
            codes=codes,
            traffic=traffic,
            consumed=self.sequences_consumed,
            seconds=time.perf_counter() - begin,
        )
        self._step_logger.write(log)

    @property
    def sequences_consumed(self) -> int:
        """Sequences that the run has drawn or skipped: the position of the next one."""
        return (self.step + self.skipped_data_steps) * self.config.training.global_batch_size

    def finish(self) -> bool:
        """Validate if the run is finished, and save. Collective.

        Returns:
            True if the run is finished.

        Raises:
            UserError: on all ranks, if the last checkpoint cannot be written.
        """
        finished = self.step >= self.config.training.steps or not self._has_data()
        outcome = "finished" if finished else "stopped"
        # Before the save, which takes a while: time may run out in it.
        cause = "" if finished else f" by {self._find_stop_cause()}"
        if not self._weights_are_finite():
            raise UserError(
                f"the weights are not finite after step {self.step}, and nothing was saved of them; lower "
                f"optimizer.learning_rate {self.config.optimizer.learning_rate:g}, and start again"
            )
        if finished and self.step > self.first_step and not _is_due(self.step, self.config.validation.eval_interval):
            self._validate()
            self._measure_forgetting()
        if finished and self.step > self.first_step and not _is_due(self.step, self.config.validation.task_interval):
            self._score_tasks()
        self._save(wait=True)
        if self.saver.saved_step != self.step:
            raise UserError(f"{self.store.folder}: step {self.step} could not be saved; make room, then resume")
        if self.guard.bad:
            self.metrics.print_line(
                f"warning: the last {self.guard.bad} steps were bad ones and changed nothing; lower "
                f"optimizer.learning_rate {self.config.optimizer.learning_rate:g}, or check the data"
            )
        self.metrics.print_line(f"{outcome} at step {self.step}{cause}")
        if finished and self.finetune_start is not None:
            checkpoint = checkpoint_path(self.store.folder, self.step)
            for line in run_on_main(None, describe_finished, self.config, self.finetune_start.base, checkpoint) or ():
                self.metrics.print_line(line)
        return finished

    def _find_stop_cause(self) -> str:
        if not self.stopping:
            return "--stop-after"
        # Other ranks listen for signals only.
        return self.stop_requests.cause() or "a signal to another process"

    def _end_step(self, sync: StepSync, decision: Decision, first_sequence: int) -> None:
        self.step += 1
        self.stopping = sync.stop
        if sync.save_done:
            self.saver.wait()
        if decision.reason:
            positions = f"data positions [{first_sequence}, {first_sequence + self.config.training.global_batch_size})"
            outcome = "skipped: " if decision.skip else ""
            self.metrics.print_line(f"step {self.step:6d}  {outcome}{decision.reason}, {positions}")
        self.metrics.advance(self.step)

    def _validate(self) -> None:
        """Score the validation split and write a sample, unless a stop request arrives: then nothing is logged."""
        if self.datasets.validation is None:
            return
        scores = score(self.engine, self.datasets, self.config, self._is_interrupted)
        if scores is None:
            self.stopping = True
            return
        self.metrics.write(self.step, scores.values(), f"step {self.step:6d}  {scores.line()}")
        if self.config.validation.sample_tokens:
            text = generate_sample(self.engine, self.datasets.tokenizer, self.config.validation.sample_tokens)
            self.metrics.print_line(f"step {self.step:6d}  sample: {format_text(text)}")
            self.metrics.write_text(self.step, "sample", text)
        if self.config.validation.eval_interval:
            self._figures.draw(self.step, self._step_logger.tokens_per_expert)

    def _measure_base(self) -> None:
        """Measure the base on its own validation data before the first step, unless a stop request arrives."""
        if self.base is None or self.datasets.base is None:
            return
        bits = measure_base_bits(self.engine, self.datasets, self.config, self._is_interrupted)
        if bits is None:
            self.stopping = True
            return
        self.base = self.base.model_copy(update={"bits_per_byte": bits})
        told = ", ".join(f"{name} {value:.3f}" for name, value in bits.items())
        line = f"step {self.step:6d}  before the first step, on the base's data: {told} bits per byte"
        self.metrics.write(self.step, forgetting_values({}, bits), line)

    def _measure_forgetting(self) -> None:
        """Measure what of the base is forgotten, unless a stop request arrives: then nothing is logged."""
        if self.base is None or not self.base.bits_per_byte or self.datasets.base is None or self.stopping:
            return
        before = self.base.bits_per_byte
        bits = measure_base_bits(self.engine, self.datasets, self.config, self._is_interrupted)
        if bits is None:
            self.stopping = True
            return
        self.metrics.write(
            self.step, forgetting_values(before, bits), f"step {self.step:6d}  {describe_forgetting(before, bits)}"
        )

    def _score_tasks(self) -> None:
        """Score `validation.tasks`, unless a stop request arrives: then nothing is logged."""
        if not self.datasets.tasks:
            return
        values = score_tasks(self.engine, self.datasets.tokenizer, self.datasets.tasks, self._is_interrupted)
        if values is None:
            self.stopping = True
            return
        described = describe_task_scores(values, self.datasets.tasks)
        self.metrics.write(self.step, values, f"step {self.step:6d}  {described}")

    def _is_interrupted(self) -> bool:
        self.watchdog.report_progress(f"validating after step {self.step}")
        return self.mesh.any_rank(self.stop_requests.requested())

    def _weights_are_finite(self) -> bool:
        """Return whether all weights are finite, the same on all ranks. Collective."""
        weights = [part.values for part in sharded_state(self.engine).fragments if part.name.endswith("/master")]
        return not self.mesh.any_rank(not all(bool(each.isfinite().all()) for each in weights))

    def _save(self, wait: bool) -> None:
        wait_for_verification(self.datasets, self.mesh, self.watchdog.report_progress, self.metrics.print_line)
        self.watchdog.report_progress(f"saving step {self.step}")
        if not wait and not self._weights_are_finite():
            # The steps that follow will be bad ones, and must find an older checkpoint to go back to.
            self.metrics.print_line(f"step {self.step:6d}  the weights are not finite: no checkpoint of this step")
            return
        fragments, updates = sharded_state(self.engine)
        progress = Progress(self.step, self.skipped_data_steps, self.guard.state(), self.base)
        state = make_run_state(progress, updates, self.engine, self.datasets, self.config)
        self.saver.save(self.step, fragments, state, wait)

    def _roll_back(self) -> None:
        """Return to the newest checkpoint, and skip all data that was read since."""
        self.saver.wait()
        self.watchdog.report_progress("returning to the last checkpoint")
        path = self.store.survey(accept=check_state).path or self.resumed_from
        bad = f"{self.guard.bad} bad steps in a row, up to step {self.step}"
        if path is None:
            raise UserError(f"{bad}, and no checkpoint to go back to; lower optimizer.learning_rate, or check the data")
        progress = restore(self.store, path, self.engine, self.datasets, self.config)
        if progress.step == self.guard.returned_to:
            raise UserError(
                f"{bad}, and the run has gone back to step {progress.step} before; lower optimizer.learning_rate, or "
                "remove its newest checkpoints to go back further; nothing was saved"
            )
        self.guard.roll_back(progress.step, progress.guard)
        self.skipped_data_steps += self.step - progress.step
        self.step = self._step_logger.step = self.saver.saved_step = progress.step
        for line in run_on_main(None, keep_log, self.config.run.folder, self.step) or ():
            self.metrics.print_line(line)
        self.metrics.truncate_after(self.step)
        self.metrics.print_line(f"{bad}: back to {path.name}; data up to position {self.sequences_consumed} is skipped")

    def _has_data(self) -> bool:
        """False if skipped data is now missing at the end of data with a limited number of epochs."""
        length = self.datasets.train.num_positions
        return length is None or self.sequences_consumed + self.config.training.global_batch_size <= length


def _sum_losses(losses: list[Losses]) -> Tensor:
    return torch.stack([torch.stack(each) for each in losses]).sum(0)


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
