"""From a checkpoint to a run that goes on, and what of a run goes into one beside the tensors."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from kabrn_dist.backend.engine import Engine
from kabrn_dist.backend.sharded_state import count_updates, list_fragments, sync_working_copy
from kabrn_dist.checkpoint.state import RunState, read_state
from kabrn_dist.checkpoint.store import CheckpointStore
from kabrn_dist.config import Config
from kabrn_dist.data.dataset import DataState
from kabrn_dist.train.datasets import Datasets
from kabrn_dist.utils.errors import UserError


class Progress(NamedTuple):
    """Where a run stands: steps done, the steps' worth of data passed over after bad steps, and its guard's memory."""

    step: int
    skipped_data_steps: int
    guard: dict[str, Any]


START = Progress(0, 0, {})


def choose_checkpoint(store: CheckpointStore, resume: str) -> Path | None:
    """What `--resume` means here; None for a fresh start. Collective.

    Raises:
        UserError: where the checkpoint that must be is not there or damaged, or one that must not be is there.
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


def restore(store: CheckpointStore, path: Path, engine: Engine, data: Datasets, config: Config) -> Progress:
    """Load weights, moments and all else that the run needs to go on as it was. Collective.

    Raises:
        UserError: for a checkpoint of other tensors or other data, or damaged.
    """
    state = read_state(path, store.load(path, list_fragments(engine)))
    cursor = _read_cursor(path, state)
    cursor.check(data.train)
    read = state.step + state.skipped_data_steps
    if cursor.consumed != read * config.training.global_batch_size:
        raise UserError(
            f"{path}: {cursor.consumed} sequences were consumed in {read} steps, which training.global_batch_size "
            f"{config.training.global_batch_size} does not give; set it to {cursor.consumed // max(1, read)}"
        )
    sync_working_copy(engine, state.updates)
    engine.model.routers.step = state.step
    # Another precision has no scale to hand on: fp16 then begins with its own.
    if state.precision == "fp16":
        engine.set_loss_scale(state.loss_scale)
    return Progress(state.step, state.skipped_data_steps, state.guard)


def _read_cursor(path: Path, state: RunState) -> DataState:
    try:
        return DataState(**state.cursor)  # type: ignore[arg-type]
    except TypeError as error:
        raise UserError(f"{path}: its cursor cannot be used ({error}); use a checkpoint of this version") from error


def make_run_state(position: Progress, engine: Engine, data: Datasets, config: Config) -> dict[str, Any]:
    """The state that a checkpoint keeps beside the tensors, JSON types only. Call `list_fragments` first."""
    consumed = (position.step + position.skipped_data_steps) * config.training.global_batch_size
    state = RunState(
        step=position.step,
        updates=count_updates(engine),
        cursor=asdict(data.train.state(consumed)),
        skipped_data_steps=position.skipped_data_steps,
        precision=config.training.precision,
        loss_scale=engine.loss_scale,
        guard=position.guard,
        config=config.model_dump(mode="json"),
        tokenizer_sha256=data.train.corpus.tokenizer_sha256,
    )
    return state.model_dump()
