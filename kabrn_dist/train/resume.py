"""Resuming from a checkpoint, and the state that a checkpoint holds besides tensors."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from kabrn_dist.backend.engine import Engine
from kabrn_dist.backend.sharded_state import sharded_state, sync_working_copy
from kabrn_dist.checkpoint.state import RunState, read_state
from kabrn_dist.checkpoint.store import CheckpointStore
from kabrn_dist.config import Config
from kabrn_dist.data.dataset import DataState
from kabrn_dist.train.datasets import Datasets
from kabrn_dist.utils.errors import UserError


class Progress(NamedTuple):
    """Progress of a run.

    Attributes:
        step: steps done.
        skipped_data_steps: steps' worth of data that rollbacks have skipped.
        guard: state of the loss guard.
    """

    step: int
    skipped_data_steps: int
    guard: dict[str, Any]


START = Progress(0, 0, {})


def choose_checkpoint(store: CheckpointStore, resume: str) -> Path | None:
    """Return the checkpoint to resume from; None for a fresh start. Collective.

    Args:
        store: checkpoints of the run.
        resume: "auto", "must", "never", or a checkpoint's path.

    Raises:
        UserError: if a required checkpoint is missing or damaged, or one exists that must not.
    """
    if resume not in ("auto", "must", "never"):
        store.check(Path(resume))
        return Path(resume)
    found = store.find_latest()
    if resume == "must" and found is None:
        raise UserError(f"--resume must: {store.folder} holds no intact checkpoint; use --resume auto")
    if resume == "never" and found is not None:
        raise UserError(
            f"--resume never: {store.folder} holds {found.name}; choose another run.folder, "
            "move it away, or use --resume auto"
        )
    return found


def restore(store: CheckpointStore, path: Path, engine: Engine, datasets: Datasets, config: Config) -> Progress:
    """Load weights, moments and everything else that the run needs to continue as it was. Collective.

    Args:
        store: checkpoints of the run.
        path: the checkpoint.
        engine: receives the tensors.
        datasets: must be those that the checkpoint was trained on.
        config: the whole configuration.

    Raises:
        UserError: for a checkpoint of other tensors or other data, or a damaged one.
    """
    state = read_state(path, store.load(path, sharded_state(engine).fragments))
    data_state = _read_data_state(path, state)
    data_state.check(datasets.train)
    read = state.step + state.skipped_data_steps
    if data_state.consumed != read * config.training.global_batch_size:
        raise UserError(
            f"{path}: {data_state.consumed} sequences were consumed in {read} steps, which training.global_batch_size "
            f"{config.training.global_batch_size} does not give; set it to {data_state.consumed // max(1, read)}"
        )
    sync_working_copy(engine, state.updates)
    engine.model.routers.step = state.step
    # A checkpoint of another precision has no scale: fp16 then begins with its own.
    if state.precision == "fp16":
        engine.set_loss_scale(state.loss_scale)
    return Progress(state.step, state.skipped_data_steps, state.guard)


def _read_data_state(path: Path, state: RunState) -> DataState:
    try:
        return DataState(**state.cursor)  # type: ignore[arg-type]
    except TypeError as error:
        raise UserError(f"{path}: its cursor cannot be used ({error}); use a checkpoint of this version") from error


def make_run_state(
    progress: Progress, updates: int, engine: Engine, datasets: Datasets, config: Config
) -> dict[str, Any]:
    """Return the state that a checkpoint holds besides tensors, JSON types only.

    Args:
        progress: progress of the run.
        updates: optimizer steps without those that were skipped.
        engine: knows the loss scale.
        datasets: the run's data.
        config: the whole configuration.
    """
    consumed = (progress.step + progress.skipped_data_steps) * config.training.global_batch_size
    state = RunState(
        step=progress.step,
        updates=updates,
        cursor=asdict(datasets.train.state(consumed)),
        skipped_data_steps=progress.skipped_data_steps,
        precision=config.training.precision,
        loss_scale=engine.loss_scale,
        guard=progress.guard,
        config=config.model_dump(mode="json"),
        tokenizer_sha256=datasets.train.corpus.tokenizer_sha256,
    )
    return state.model_dump()
