"""Resuming from a checkpoint, and the state that a checkpoint holds besides tensors."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from kabrn_dist.backend.engine import Engine
from kabrn_dist.backend.sharded_state import sharded_state, sync_working_copy
from kabrn_dist.checkpoint.layout import list_checkpoints, list_links
from kabrn_dist.checkpoint.manifest import Manifest, read_manifest
from kabrn_dist.checkpoint.state import BaseState, CursorState, GuardState, RunState, read_model, read_state
from kabrn_dist.checkpoint.store import CheckpointStore
from kabrn_dist.config import Config
from kabrn_dist.data.dataset import DataState
from kabrn_dist.distributed.collectives import broadcast_json, run_on_all, run_on_main
from kabrn_dist.inference.folder import list_neighbors
from kabrn_dist.train.datasets import Datasets
from kabrn_dist.train.resume_changes import describe_changes
from kabrn_dist.utils.errors import UserError


class Progress(NamedTuple):
    """Progress of a run.

    Attributes:
        step: steps done.
        skipped_data_steps: steps' worth of data that rollbacks have skipped.
        guard: state of the loss guard.
        base: model that the run fine-tunes; None if there is none.
    """

    step: int
    skipped_data_steps: int
    guard: dict[str, Any]
    base: BaseState | None = None


START = Progress(0, 0, {})


def choose_checkpoint(store: CheckpointStore, resume: str) -> Path | None:
    """Return the checkpoint to resume from; None for a fresh start. Collective.

    A checkpoint whose state cannot be used counts as damaged, as one whose files are.

    Args:
        store: checkpoints of the run.
        resume: "auto", "must", "never", or a path: see `find_given`.

    Raises:
        UserError: if a required checkpoint is missing or damaged, one exists that must not, or all are damaged.
    """
    if resume not in ("auto", "must", "never"):
        return find_given(store, resume)
    survey = store.survey(accept=check_state)
    found, faults = survey
    if resume == "never" and (found is not None or faults):
        name = found.name if found is not None else next(iter(faults))
        raise UserError(
            f"--resume never: {store.folder} holds {name}; choose another run.folder, "
            "move it away, or use --resume auto"
        )
    if found is None and faults:
        raise UserError(
            f"{store.folder}: none of its checkpoints can be used, and a fresh start would replace them: "
            f"{survey.explain()}; restore one of them, or set run.folder to another folder to start anew"
        )
    if resume == "must" and found is None:
        raise UserError(f"--resume must: {store.folder} holds no intact checkpoint; use --resume auto")
    return found


def find_given(store: CheckpointStore, resume: str) -> Path:
    """Return the checkpoint that `--resume PATH` means. Collective.

    Args:
        store: checkpoints of the run.
        resume: a checkpoint's folder; or the folder of a run, its `checkpoints` or `latest`, for the newest intact one.

    Raises:
        UserError: if there is none, or it cannot be used.
    """
    path = Path(resume).expanduser()
    folders = [path / "checkpoints", path]
    if path.name == "latest":
        folders += [path.parent / "checkpoints", path.parent]
    folder = broadcast_json(run_on_main(None, _first_with_checkpoints, folders), None)
    if folder is None:
        run_on_all(None, _check_exists, path, resume)
        check_state(path, store.check(path))
        return path
    survey = CheckpointStore(Path(folder)).survey(accept=check_state)
    if survey.path is None:
        raise UserError(f"--resume {resume}: no checkpoint in {folder} can be used: {survey.explain()}")
    return survey.path


def describe_resume(path: Path, config: Config) -> list[str]:
    """Return lines about the checkpoint that a session resumes, and what it changes.

    Args:
        path: the checkpoint.
        config: the configuration of the session.

    Raises:
        UserError: for changes that would make another model of the checkpoint's weights.
    """
    state = read_state(path, read_manifest(path))
    return [f"resumed from {path} at step {state.step}", *describe_changes(path, state, config)]


def read_earlier_base(path: Path | None) -> BaseState | None:
    """Return what a checkpoint says of the model that its run fine-tunes; None without a checkpoint or a base.

    Raises:
        UserError: for a state that cannot be used.
    """
    return None if path is None else read_state(path, read_manifest(path)).base


def check_state(path: Path, manifest: Manifest) -> None:
    """Check that training can go on from the state of a checkpoint, which may come from a stranger.

    Raises:
        UserError: if not.
    """
    read_model(path, read_state(path, manifest))


def _check_exists(path: Path, resume: str) -> None:
    if path.is_dir():
        return
    names = [each.name for each in reversed(list_checkpoints(path.parent))]
    there = f"{path.parent} contains {', '.join(names)}" if names else list_neighbors(path)
    raise UserError(
        f"--resume {resume}: no such checkpoint; use auto, must or never, or a folder of a run or a checkpoint; {there}"
    )


def _first_with_checkpoints(folders: list[Path]) -> str | None:
    there = (folder for folder in folders if folder.is_dir())
    return next((str(folder) for folder in there if list_checkpoints(folder) or list_links(folder)), None)


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
    data_state = DataState(**state.cursor.model_dump())
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
    return Progress(state.step, state.skipped_data_steps, state.guard.model_dump(), state.base)


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
        cursor=CursorState(**asdict(datasets.train.state(consumed))),
        skipped_data_steps=progress.skipped_data_steps,
        precision=config.training.chosen_precision,
        loss_scale=engine.loss_scale,
        guard=GuardState(**progress.guard),
        config=config.model_dump(mode="json"),
        tokenizer_sha256=datasets.train.corpus.tokenizer_sha256,
        base=progress.base,
    )
    return state.model_dump()
