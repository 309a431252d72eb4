"""The run: shards → batch → model → losses → guard → step → metrics and checkpoint, until done or told to stop."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from kabrn_dist.backend.engine import Engine
from kabrn_dist.backend.sharded_state import list_fragments
from kabrn_dist.checkpoint.store import CheckpointStore
from kabrn_dist.config import Config
from kabrn_dist.config.file import dump_config
from kabrn_dist.distributed.collectives import run_on_all, run_on_main
from kabrn_dist.distributed.launch_env import LaunchEnv
from kabrn_dist.distributed.mesh import DEFAULT_TIMEOUT_S, Mesh, init_distributed, make_mesh
from kabrn_dist.grow.run import grow
from kabrn_dist.kernels.selection import select_kernels, int8_matmul_is_faster, matmul_dtype
from kabrn_dist.metrics.figures import TrainingFigures
from kabrn_dist.metrics.logger import MetricsLogger
from kabrn_dist.metrics.sources import measure_step
from kabrn_dist.metrics.ternary import current_codes
from kabrn_dist.model.mixkabrn import build_model
from kabrn_dist.train.datasets import Datasets, open_datasets
from kabrn_dist.train.expert_balance import resolve_placement
from kabrn_dist.train.guard import Decision, LossGuard, sync_step
from kabrn_dist.train.resume import START, Progress, choose_checkpoint, make_run_state, restore
from kabrn_dist.train.saver import Saver
from kabrn_dist.train.schedule import learning_rate, weight_decay
from kabrn_dist.train.step_batches import next_step_batches
from kabrn_dist.train.step_log import StepLog, log_step
from kabrn_dist.train.stop_requests import StopRequests
from kabrn_dist.train.validation import score
from kabrn_dist.train.watchdog import Watchdog
from kabrn_dist.utils.atomic_io import atomic_write
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.fault_injection import inject_fault
from kabrn_dist.utils.lock import acquire_lock
from kabrn_dist.utils.precision import TORCH_DTYPES


def train(config: Config, place: LaunchEnv, resume: str = "auto", stop_after: int | None = None) -> bool:
    """Train to `training.steps`, or until told to stop; then save. Returns whether the run is finished.

    Args:
        place: this process among those that the launcher started.
        resume: "auto" continues from the newest intact checkpoint of the run's folder if there is one, "must"
            fails without one, "never" refuses a folder that has one; else a checkpoint's path.
        stop_after: steps to train in this session, as if it were told to stop then.

    Raises:
        UserError: for impossible settings and unusable data or checkpoints, on all ranks.
    """
    config.check_world_size(place.world_size)
    splits = open_datasets(config)
    # The watchdog of a rank that hangs must speak before the others lose patience with it.
    with init_distributed(place, max(DEFAULT_TIMEOUT_S, 2 * config.guard.hang_timeout_s)) as device:
        parallel = config.parallel
        mesh = make_mesh(place, device, parallel.expert_parallel, parallel.sequence_parallel, parallel.ranks_per_node)
        config = resolve_placement(config, mesh)
        finished = Trainer(config, mesh, splits, resume).run(stop_after)
        # Where one process ends with a code that is not 0, its launcher ends the others: none may still be writing.
        mesh.any_rank(False)
        return finished


class Trainer:
    """One start of a run: from its checkpoint, if any, to its end or a wish to stop."""

    def __init__(self, config: Config, mesh: Mesh, splits: Datasets, resume: str) -> None:
        self.config, self.mesh, self.splits = config, mesh, splits
        self.folder = config.run.folder
        self.wishes = StopRequests(self.folder, mesh.is_main, config.run.max_minutes)
        self.watchdog = Watchdog(mesh.rank, config.guard.hang_timeout_s)
        self.watchdog.start()
        self.lock = run_on_main(None, acquire_lock, self.folder)
        checkpoint = config.checkpoint
        self.store = CheckpointStore(
            self.folder / "checkpoints",
            checkpoint.keep_last,
            checkpoint.keep_every,
            background_group=mesh.checkpoint_group,
        )
        chosen = choose_checkpoint(self.store, resume)
        if chosen is None and config.run.init_from is not None:
            chosen = grow(config.run.init_from, config)
        self.engine = Engine(build_model(config, mesh), config, mesh)
        position = restore(self.store, chosen, self.engine, splits, config) if chosen else START
        self.came_from = chosen
        self.step, self.skipped_data_steps = position.step, position.skipped_data_steps
        self.guard = LossGuard(config.guard)
        self.guard.restore(position.guard)
        run_on_main(None, atomic_write, self.folder / "config.yaml", dump_config(config).encode())
        self.metrics = run_on_all(None, MetricsLogger, self.folder, mesh.is_main, self.step, config.training.steps)
        self.metrics.write_text("config", dump_config(config))
        self.metrics.print_line(
            f"functions and products: {select_kernels(mesh.device.type).reason}; {_say_products(config, mesh)}"
        )
        if mesh.expert_parallel > 1:
            self.metrics.print_line(f"experts on the ranks of a group: {list(config.expert_counts())}")
        self.saver = Saver(self.store, checkpoint.async_save, self.step if chosen else None, self.metrics.print_line)
        self.pictures = TrainingFigures(self.engine, self.metrics, config, self.step)
        self.load: Tensor | None = None
        self.stopping = False
        if chosen:
            self.metrics.print_line(f"resumed from {chosen} at step {self.step}")

    def run(self, stop_after: int | None) -> bool:
        """Train, validate and save at their intervals. Returns whether the run is finished."""
        steps, first = self.config.training.steps, self.step
        last = steps if stop_after is None else min(steps, first + stop_after)
        try:
            with self.wishes.listening():
                while self.step < last and not self.stopping and self._has_data():
                    self._train_step()
                    self.saver.check()
                    if self.guard.exhausted:
                        self._roll_back()
                        continue
                    if _due(self.step, self.config.validation.eval_interval):
                        self._validate()
                    if _due(self.step, self.config.checkpoint.save_interval) and self.step < last and not self.stopping:
                        self._save(wait=False)
                return self._finish(first)
        finally:
            self.watchdog.stop()
            self.metrics.close()
            if self.lock is not None:
                self.lock.release()

    def _train_step(self) -> None:
        config, engine, mesh = self.config, self.engine, self.mesh
        self.watchdog.beat(f"in step {self.step + 1}")
        inject_fault("step.begin")
        began = time.perf_counter()
        start = self._consumed()
        batches, totals = next_step_batches(config, mesh, self.splits.train, start)
        waited = time.perf_counter() - began
        rate, decay = (
            part(self.step, config.training.steps, config.optimizer) for part in (learning_rate, weight_decay)
        )
        parts = [engine.forward_backward(batch.to(mesh.device), totals) for batch in batches]
        losses = torch.stack([torch.stack(loss) for loss, _ in parts]).sum(0)
        agreed = sync_step(mesh, losses, engine.local_grad_norm(), self.wishes.requested(), self.saver.done())
        verdict = self.guard.decide(agreed)
        logged = _due(self.step + 1, config.training.log_interval) or self.step + 1 == config.training.steps
        codes = current_codes(engine) if logged else []
        update = engine.skip_step() if verdict.skip else engine.optimizer_step(rate, decay)
        self.guard.record(verdict, agreed, update.applied)
        self.step += 1
        self.stopping = agreed.stop
        if agreed.ended:
            self.saver.wait()
        self._say_verdict(verdict, start)
        self.metrics.advance(self.step)
        traffic = [layer.take() for layer in engine.model.traffic]
        if logged:
            sums, seconds = [sums for _, sums in parts], time.perf_counter() - began
            sources = measure_step(mesh, self.splits.train, batches, sums, start + config.training.global_batch_size)
            done = StepLog(
                self.step, agreed, update, rate, decay, codes, totals, sums, traffic, sources, seconds, waited
            )
            self.load = log_step(done, self.metrics, engine, self.guard)

    def _say_verdict(self, verdict: Decision, start: int) -> None:
        if verdict.reason:
            positions = f"data positions [{start}, {start + self.config.training.global_batch_size})"
            outcome = "skipped: " if verdict.skip else ""
            self.metrics.print_line(f"step {self.step:6d}  {outcome}{verdict.reason}, {positions}")

    def _validate(self) -> None:
        """Score the validation split, unless someone wishes to stop meanwhile: then nothing of it is written."""
        scores = score(self.engine, self.splits, self.config, self._interrupted)
        if scores is None:
            self.stopping = True
            return
        self.metrics.write(self.step, scores.values(), f"step {self.step:6d}  {scores.line()}")
        if self.config.validation.eval_interval:
            self.pictures.draw(self.step, self.load)

    def _interrupted(self) -> bool:
        self.watchdog.beat(f"validating after step {self.step}")
        return self.mesh.any_rank(self.wishes.requested())

    def _save(self, wait: bool) -> None:
        self.watchdog.beat(f"saving step {self.step}")
        fragments = list_fragments(self.engine)
        position = Progress(self.step, self.skipped_data_steps, self.guard.state())
        self.saver.save(self.step, fragments, make_run_state(position, self.engine, self.splits, self.config), wait)

    def _roll_back(self) -> None:
        """Go back to the newest checkpoint, and from there on pass over all data that was read since."""
        self.saver.wait()
        self.watchdog.beat("going back to the last checkpoint")
        path, bad = (
            self.store.find_latest() or self.came_from,
            f"{self.guard.bad} bad steps in a row, up to step {self.step}",
        )
        if path is None:
            raise UserError(f"{bad}, and no checkpoint to go back to; lower optimizer.learning_rate, or check the data")
        position = restore(self.store, path, self.engine, self.splits, self.config)
        if position.step == self.guard.returned_to:
            raise UserError(
                f"{bad}, and the run has gone back to step {position.step} before; lower optimizer.learning_rate, or "
                "remove its newest checkpoints to go back further; nothing was saved"
            )
        self.guard.roll_back(position.step, position.guard)
        self.skipped_data_steps += self.step - position.step
        self.step = self.saver.saved_step = position.step
        self.metrics.truncate_after(self.step)
        self.metrics.print_line(f"{bad}: back to {path.name}; data up to position {self._consumed()} is passed over")

    def _has_data(self) -> bool:
        """False where what was passed over is now missing at the end of data that are drawn from only so often."""
        length = self.splits.train.num_positions
        return length is None or self._consumed() + self.config.training.global_batch_size <= length

    def _consumed(self) -> int:
        return (self.step + self.skipped_data_steps) * self.config.training.global_batch_size

    def _finish(self, first: int) -> bool:
        """The last validation and the last save. Returns whether the run is finished."""
        finished = self.step == self.config.training.steps or not self._has_data()
        if finished and self.step > first and not _due(self.step, self.config.validation.eval_interval):
            self._validate()
        self._save(wait=True)
        if self.saver.saved_step != self.step:
            raise UserError(f"{self.store.folder}: step {self.step} could not be saved; make room, then resume")
        self.metrics.print_line(f"{'finished' if finished else 'stopped'} at step {self.step}")
        return finished


def _say_products(config: Config, mesh: Mesh) -> str:
    if not config.model.quantize:
        return "matrices are plain"
    dtype = TORCH_DTYPES[config.training.precision]
    forward = "int8" if int8_matmul_is_faster(mesh.device.type, dtype) else "fp32"
    backward = "fp32" if matmul_dtype(mesh.device.type, dtype) == torch.float32 else config.training.precision
    return f"products forward in {forward}, backward in {backward}, measured faster here"


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
