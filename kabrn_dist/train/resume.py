"""From a checkpoint to a run that goes on, and what of a run goes into one beside the tensors."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from kabrn_dist.backend.engine import Engine
from kabrn_dist.backend.sharded_state import count_updates, list_fragments, publish
from kabrn_dist.checkpoint.state import RunState, read_state
from kabrn_dist.checkpoint.store import CheckpointStore
from kabrn_dist.config import Config
from kabrn_dist.data.dataset import Cursor
from kabrn_dist.train.datasets import Splits
from kabrn_dist.utils.errors import UserError


class Position(NamedTuple):
    """Where a run stands: steps done, the steps' worth of data passed over after bad steps, and its guard's memory."""

    step: int
    passed_over: int
    guard: dict[str, Any]


START = Position(0, 0, {})


def choose_checkpoint(store: CheckpointStore, resume: str) -> Path | None:
    """What `--resume` means here; None for a fresh start. Collective.

    Raises:
        UserError: where the checkpoint that must be is not there or damaged, or one that must not be is there.
    """
    if resume not in ("auto", "must", "never"):
        store.check(Path(resume))
        return Path(resume)
    found = store.find()
    if resume == "must" and found is None:
        raise UserError(f"--resume must: {store.folder} holds no intact checkpoint; use --resume auto")
    if resume == "never" and found is not None:
        raise UserError(
            f"--resume never: {store.folder} holds {found.name}; choose another run.folder, "
            "move it away, or use --resume auto"
        )
    return found


def restore(store: CheckpointStore, path: Path, engine: Engine, data: Splits, config: Config) -> Position:
    """Load weights, moments and all else that the run needs to go on as it was. Collective.

    Raises:
        UserError: for a checkpoint of other tensors or other data, or damaged.
    """
    state = read_state(path, store.load(path, list_fragments(engine)).state)
    cursor = _read_cursor(path, state)
    cursor.check(data.train)
    read = state.step + state.passed_over
    if cursor.consumed != read * config.training.batch:
        raise UserError(
            f"{path}: {cursor.consumed} sequences were consumed in {read} steps, which training.batch "
            f"{config.training.batch} does not give; set it to {cursor.consumed // max(1, read)}"
        )
    publish(engine, state.updates)
    engine.model.routers.step = state.step
    # Another precision has no scale to hand on: fp16 then begins with its own.
    if state.precision == "fp16":
        engine.set_loss_scale(state.loss_scale)
    return Position(state.step, state.passed_over, state.guard)


def _read_cursor(path: Path, state: RunState) -> Cursor:
    try:
        return Cursor(**state.cursor)  # type: ignore[arg-type]
    except TypeError as error:
        raise UserError(f"{path}: its cursor cannot be used ({error}); use a checkpoint of this version") from error


def describe(position: Position, engine: Engine, data: Splits, config: Config) -> dict[str, Any]:
    """The state that a checkpoint keeps beside the tensors, JSON types only. Call `list_fragments` first."""
    consumed = (position.step + position.passed_over) * config.training.batch
    state = RunState(
        step=position.step,
        updates=count_updates(engine),
        cursor=asdict(data.train.cursor(consumed)),
        passed_over=position.passed_over,
        precision=config.training.precision,
        loss_scale=engine.loss_scale,
        guard=position.guard,
        config=config.model_dump(mode="json"),
        tokenizer_sha256=data.train.corpus.tokenizer_sha256,
    )
    return state.model_dump()
