"""The run: shards → batch → model → losses → step → metrics and checkpoint, until done or told to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kabrn_dist.checkpoint.exchange import together
from kabrn_dist.checkpoint.store import CheckpointStore
from kabrn_dist.config import Config
from kabrn_dist.config_file import dump_config
from kabrn_dist.data.batches import Batch, Cursor, sequence_slice
from kabrn_dist.data.files import write_whole
from kabrn_dist.errors import UserError
from kabrn_dist.grow.run import grow
from kabrn_dist.kernels.choice import choose
from kabrn_dist.mesh import Mesh, Place, join_processes, make_mesh
from kabrn_dist.model.mixkabrn import build_model
from kabrn_dist.train.engine import Engine
from kabrn_dist.train.fragments import count_updates, list_fragments, publish
from kabrn_dist.train.guard import Guard
from kabrn_dist.train.losses import Losses, Totals
from kabrn_dist.train.metrics import Metrics, memory_gib
from kabrn_dist.train.pictures import Pictures
from kabrn_dist.train.schedule import learning_rate
from kabrn_dist.train.shares import resolve_placement
from kabrn_dist.train.splits import Splits, open_splits
from kabrn_dist.train.watch import ExpertWatch, expert_lists, expert_values, ternary_values, watch_experts


def train(config: Config, place: Place, resume: str = "auto", stop_after: int | None = None) -> None:
    """Train to `training.steps`, or until told to stop; then save.

    Args:
        place: this process among those that the launcher started.
        resume: "auto" continues from the newest intact checkpoint of the run's folder if there is one, "must"
            fails without one, "never" refuses a folder that has one; else a checkpoint's path.
        stop_after: steps to train in this session, as if it were told to stop then.

    Raises:
        UserError: for impossible settings and unusable data or checkpoints, on all ranks.
    """
    config.check_world(place.world)
    splits = open_splits(config)
    with join_processes(place) as device:
        parallel = config.parallel
        mesh = make_mesh(place, device, parallel.expert, parallel.sequence, parallel.node)
        config = resolve_placement(config, mesh)
        Session(config, mesh, splits, resume).run(stop_after)


class Session:
    """One start of a run: from its checkpoint, if any, to its end or a wish to stop."""

    def __init__(self, config: Config, mesh: Mesh, splits: Splits, resume: str) -> None:
        self.config, self.mesh, self.splits = config, mesh, splits
        self.folder = config.run.folder
        self.store = CheckpointStore(self.folder / "checkpoints", config.checkpoint.keep, config.checkpoint.keep_every)
        chosen = self._choose_checkpoint(resume)
        if chosen is None and config.run.start_from is not None:
            chosen = grow(config.run.start_from, config)
        self.engine = Engine(build_model(config, mesh), config, mesh)
        self.step = self._restore(chosen) if chosen else 0
        self.saved = self.step if chosen else None
        if mesh.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / "config.yaml", dump_config(config).encode())
        self.guard = Guard(self.folder, mesh)
        self.metrics = Metrics(self.folder, mesh.first, self.step, config.training.steps)
        self.metrics.write_text("config", dump_config(config))
        self.metrics.say(f"functions and products: {choose(mesh.device.type).reason}")
        if mesh.expert > 1:
            self.metrics.say(f"experts on the ranks of a group: {list(config.placement())}")
        self.pictures = Pictures(self.engine, self.metrics, config, self.step)
        self.load: Tensor | None = None
        if chosen:
            self.metrics.say(f"resumed from {chosen} at step {self.step}")

    def run(self, stop_after: int | None) -> None:
        """Train, validate and save at their intervals."""
        config, first = self.config, self.step
        try:
            with self.guard.listening():
                while self.step < config.training.steps:
                    self._train_step()
                    if _due(self.step, config.validation.every):
                        self._validate()
                    if _due(self.step, config.checkpoint.every):
                        self._save()
                    if self.guard.should_stop() or self.step - first == stop_after:
                        break
                done = self.step == config.training.steps
                if done and self.step > first and not _due(self.step, config.validation.every):
                    self._validate()
                self._save()
                if self.saved != self.step:
                    raise UserError(f"{self.store.folder}: step {self.step} could not be saved; make room, then resume")
                self.metrics.say(f"{'finished' if done else 'stopped'} at step {self.step}")
        finally:
            self.metrics.close()

    def _train_step(self) -> None:
        config, engine = self.config, self.engine
        began = time.perf_counter()
        batches, totals = self._read_step()
        waited = time.perf_counter() - began
        rate = learning_rate(self.step, config.training.steps, config.optimizer)
        parts = []
        for batch in batches:
            parts.append(engine.accumulate(batch.to(self.mesh.device), totals))
            update = engine.step(rate)
        assert update is not None, "the last micro-batch ends the step"
        self.step += 1
        self.metrics.advance(self.step)
        traffic = [layer.take() for layer in engine.model.traffic]
        if _due(self.step, config.training.log_every) or self.step == config.training.steps:
            losses = self.mesh.sum(torch.stack([torch.stack(loss) for loss, _ in parts]).sum(0)) / self.mesh.world
            seconds = time.perf_counter() - began
            values = dict(zip((f"loss/{name}" for name in Losses._fields), losses.tolist(), strict=True))
            values |= {
                "optimizer/learning_rate": rate,
                "optimizer/gradient_norm": update.gradient_norm,
                "optimizer/skipped": float(update.skipped),
                "optimizer/loss_scale": engine.loss_scale,
                "speed/tokens_per_second": totals.tokens / seconds,
                "speed/seconds_per_step": seconds,
                "speed/data_wait_share": waited / seconds,
                "speed/memory_gib": memory_gib(self.mesh.device),
                "progress/tokens": float(self.step * totals.tokens),
            }
            layers, routers = config.model.mixture_layers, engine.model.routers
            sums = [sums for _, sums in parts]
            self._log(values, watch_experts(self.mesh, layers, totals.tokens, sums, routers.bias, traffic))

    def _log(self, values: dict[str, float], watch: ExpertWatch) -> None:
        values |= expert_values(watch) | ternary_values(self.engine.ternary_shares())
        self.load = watch.load
        line = (
            f"step {self.step:6d}  loss {values['loss/total']:.4f}  language {values['loss/language']:.4f}  "
            f"balance {values['loss/balance']:.3f}  grad {values['optimizer/gradient_norm']:.3f}  "
            f"lr {values['optimizer/learning_rate']:.2e}  {values['speed/tokens_per_second']:,.0f} tokens/s  "
            f"{values['speed/memory_gib']:.2f} GiB"
        )
        line += "  SKIPPED (overflow)" if values["optimizer/skipped"] else ""
        self.metrics.write(self.step, values, line, expert_lists(watch))

    def _micro_batches(self) -> Iterator[Batch]:
        """This rank's micro-batches of the step: sequence p of the step belongs to data rank p mod their number."""
        training, mesh = self.config.training, self.mesh
        first = self.step * training.batch
        own = range(first + mesh.data_rank, first + training.batch, mesh.data_world)
        for start in range(0, len(own), training.micro_batch):
            rows = self.splits.train.rows(own[start : start + training.micro_batch])
            yield sequence_slice(rows, mesh.sequence_rank, mesh.sequence)

    def _read_step(self) -> tuple[list[Batch], Totals]:
        """This rank's batches and the step's totals; UserError on all ranks where one cannot read."""
        batches: list[Batch] = []
        failure: UserError | None = None
        try:
            batches = list(self._micro_batches())
        except UserError as error:
            failure = error
        counts = torch.tensor([sum(int((b.targets >= 0).sum()) for b in batches), int(failure is not None)])
        targets, failures = self.mesh.sum(counts.to(self.mesh.device)).tolist()
        if failures:
            together(None, _raise, failure)
        sequences = self.config.training.batch
        tokens = sequences * self.config.data.sequence_length
        return batches, Totals(targets, tokens, sequences, self.mesh.world)

    def _validate(self) -> None:
        """Score the first sequences of the validation split. All ranks make the same number of passes."""
        config, mesh, data = self.config, self.mesh, self.splits
        count = min(config.validation.sequences, data.validation.sequences)
        micro = config.training.micro_batch
        totals = torch.zeros(3, dtype=torch.float64)
        for start in range(0, count, micro * mesh.data_world):
            # Ranks without a sequence of their own take part with a copy that does not count.
            rows = [start + mesh.data_rank + i * mesh.data_world for i in range(micro)]
            batch = data.validation.rows([min(row, count - 1) for row in rows])
            batch = sequence_slice(batch, mesh.sequence_rank, mesh.sequence)
            counts = torch.tensor([row < count for row in rows])
            batch = batch._replace(targets=batch.targets.masked_fill(~counts[:, None], -100))
            sums = self.engine.evaluate(batch.to(mesh.device))
            scored = batch.targets[batch.targets >= 0]
            text = int(data.bytes_per_token[scored.numpy()].sum())
            totals += torch.tensor([float(sums.language), len(scored), text], dtype=torch.float64)
        nats, tokens, text_bytes = mesh.sum(totals.to(mesh.device)).tolist()
        values = {
            "validation/loss": nats / tokens,
            "validation/bits_per_byte": nats / math.log(2) / text_bytes,
            "validation/gzip_bits_per_byte": data.gzip_bits_per_byte,
        }
        line = (
            f"step {self.step:6d}  validation {values['validation/loss']:.4f} nats a token, "
            f"{values['validation/bits_per_byte']:.3f} bits per byte (gzip -9: {data.gzip_bits_per_byte:.3f})"
        )
        self.metrics.write(self.step, values, line)
        if config.validation.every:
            self.pictures.draw(self.step, self.load)

    def _save(self) -> None:
        if self.saved == self.step:
            return
        began = time.perf_counter()
        fragments = list_fragments(self.engine)
        cursor = self.splits.train.cursor(self.step * self.config.training.batch)
        state: dict[str, Any] = {
            "step": self.step,
            "updates": count_updates(self.engine),
            "cursor": asdict(cursor),
            "loss_scale": self.engine.loss_scale,
            "config": self.config.model_dump(mode="json"),
            "tokenizer_sha256": self.splits.train.index.tokenizer.sha256,
        }
        if self.store.save(self.step, fragments, state):
            self.saved = self.step
            self.metrics.say(f"step {self.step:6d}  saved in {time.perf_counter() - began:.2f} s")

    def _choose_checkpoint(self, resume: str) -> Path | None:
        if resume not in ("auto", "must", "never"):
            return Path(resume)
        found = self.store.find()
        if resume == "must" and found is None:
            raise UserError(f"--resume must: {self.store.folder} holds no intact checkpoint; use --resume auto")
        if resume == "never" and found is not None:
            raise UserError(
                f"--resume never: {self.store.folder} holds {found.name}; choose another run.folder, "
                "move it away, or use --resume auto"
            )
        return found

    def _restore(self, path: Path) -> int:
        manifest = self.store.load(path, list_fragments(self.engine))
        state: dict[str, Any] = dict(manifest.state)
        cursor = Cursor(**state["cursor"])
        cursor.check(self.splits.train)
        step = int(state["step"])
        if cursor.consumed != step * self.config.training.batch:
            raise UserError(
                f"{path}: {cursor.consumed} sequences were consumed in {step} steps, which training.batch "
                f"{self.config.training.batch} does not give; set it to {cursor.consumed // max(1, step)}"
            )
        publish(self.engine, int(state["updates"]))
        self.engine.model.routers.step = step
        self.engine.set_loss_scale(float(state["loss_scale"]))
        return step


def _raise(failure: UserError | None) -> None:
    if failure is not None:
        raise failure


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
