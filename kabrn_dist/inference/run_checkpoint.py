"""Checkpoints of a run as a model in one process: the newest intact one, and the configuration it was trained with."""

from __future__ import annotations

from pathlib import Path

from kabrn_dist.checkpoint.layout import checkpoint_path, list_checkpoints, step_of
from kabrn_dist.checkpoint.manifest import Manifest
from kabrn_dist.checkpoint.state import read_model, read_state
from kabrn_dist.checkpoint.store import CheckpointStore
from kabrn_dist.config import Config
from kabrn_dist.config.file import load_config
from kabrn_dist.config.model_changes import describe_other_model
from kabrn_dist.distributed.collectives import Group, run_on_all
from kabrn_dist.inference.folder import check_run_folder
from kabrn_dist.utils.errors import UserError


def configure_as_trained(folder: Path, path: Path, manifest: Manifest) -> Config:
    """Return a run's configuration, from its config.yaml, with the model that a checkpoint was trained as.

    Args:
        folder: The run's folder.
        path: Folder of the checkpoint.
        manifest: Its manifest.

    Raises:
        UserError: if config.yaml asks for another one, or the checkpoint's state cannot be used.
    """
    config, state = load_config(folder / "config.yaml"), read_state(path, manifest)
    model = read_model(path, state)
    if differences := describe_other_model(model, config.model):
        raise UserError(f"{folder}/config.yaml: {differences} ({path}); restore the value that was trained")
    precision = state.precision if config.training.precision == "auto" else config.training.precision
    training = config.training.model_copy(update={"precision": precision})
    return config.model_copy(update={"model": model, "training": training})


def find_checkpoint(folder: Path, step: int | None = None, group: Group = None) -> tuple[Path, Manifest]:
    """Return the folder and the manifest of a run's checkpoint after verifying the hashes of its files.

    Collective over `group` where torch.distributed is initialized.

    Args:
        folder: The run's folder.
        step: Step of the checkpoint; None takes the newest intact one.
        group: The ranks that call this.

    Raises:
        UserError: on every rank, for a folder that does not exist or has no intact checkpoint (of that step).
    """
    run_on_all(group, check_run_folder, folder)
    store = CheckpointStore(folder / "checkpoints", group=group)
    if step is not None:
        run_on_all(group, _check_step, store.folder, step)
        path = checkpoint_path(store.folder, step)
        return path, store.check(path)
    survey = store.survey()
    if survey.path is None:
        if survey.faults:
            raise UserError(
                f"{store.folder}: no intact checkpoint: {survey.explain()}; restore one of them, or train on"
            )
        raise UserError(f"{store.folder}: no intact checkpoint; train until the first one is saved")
    return survey.path, store.check(survey.path, verify=False)


def _check_step(checkpoints: Path, step: int) -> None:
    if not checkpoint_path(checkpoints, step).exists():
        steps = sorted({step_of(path) for path in list_checkpoints(checkpoints)})
        there = f"there are those of {', '.join(map(str, steps))}" if steps else "there is none"
        raise UserError(f"{checkpoints}: no checkpoint of step {step}; {there}")
