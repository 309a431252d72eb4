"""A run's folder, opened: configuration, newest intact checkpoint, tokenizer and model, in one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from kabrn_dist.checkpoint.layout import checkpoint_path, list_checkpoints, step_of
from kabrn_dist.checkpoint.manifest import Manifest, read_manifest
from kabrn_dist.checkpoint.state import read_model, read_state
from kabrn_dist.checkpoint.store import CheckpointStore
from kabrn_dist.config import Config
from kabrn_dist.config.file import load_config
from kabrn_dist.config.model_changes import describe_other_model
from kabrn_dist.data.index import TOKENIZER_NAME
from kabrn_dist.data.remote import is_url, open_shard_set
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.distributed.collectives import Group, run_on_all
from kabrn_dist.inference.folder import check_run_folder, is_export
from kabrn_dist.inference.generate import GenerativeModel
from kabrn_dist.inference.load import build_full_model, load_export, load_weights
from kabrn_dist.inference.working_copy import round_to_working_copies
from kabrn_dist.utils.errors import UserError


@dataclass(frozen=True)
class Run:
    """A trained run, or one that is still training.

    Attributes:
        folder: The run's folder.
        config: Its configuration, from config.yaml in the folder; the section `model` is that of the checkpoint.
        checkpoint: Folder of the chosen checkpoint, whose files match their hashes.
        manifest: The checkpoint's manifest.
    """

    folder: Path
    config: Config
    checkpoint: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path | str, step: int | None = None) -> Run:
        """Open a run's folder and verify a checkpoint.

        Example:
            run = Run.open("runs/small")
            model, tokenizer = run.model(), run.tokenizer()

        Args:
            folder: The run's folder.
            step: Step of the checkpoint; None takes the newest intact one.

        Raises:
            UserError: for a folder that does not exist, is no run, or has no intact checkpoint (of that step).
        """
        folder = Path(folder)
        check_run_folder(folder, "config.yaml")
        path, _ = find_checkpoint(folder, step)
        return cls.at_checkpoint(folder, path)

    @classmethod
    def at_checkpoint(cls, folder: Path, checkpoint: Path) -> Run:
        """Open a run's folder at a checkpoint whose files have been verified, as `find_checkpoint` does.

        Raises:
            UserError: for a configuration that cannot be read, or is not that of the checkpoint's model.
        """
        config, manifest = load_config(folder / "config.yaml"), read_manifest(checkpoint)
        return cls(folder, _as_trained(config, folder, checkpoint, manifest), checkpoint, manifest)

    @property
    def step(self) -> int:
        """Number of optimizer steps before the checkpoint."""
        return self.manifest.step

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the shard set that the run was trained on, which lies in the run's folder.

        Raises:
            UserError: for a tokenizer that is missing, or another one by now.
        """
        own = self.folder / TOKENIZER_NAME
        tokenizer = Tokenizer.load(own) if own.exists() else self._tokenizer_of_shards()
        if tokenizer.sha256 != self.manifest.state.get("tokenizer_sha256"):
            place = own if own.exists() else f"{self.config.data.path}/{TOKENIZER_NAME}"
            raise UserError(
                f"{place} is not the tokenizer that {self.checkpoint} was trained with; restore it, or set data.path "
                f"in {self.folder}/config.yaml to the shards that have it"
            )
        return tokenizer

    def _tokenizer_of_shards(self) -> Tokenizer:
        """Earlier versions left no tokenizer in the run's folder."""
        data = self.config.data
        if not is_url(data.path) and not Path(data.path).is_dir():
            raise UserError(
                f"data.path {data.path}: no such folder here ({Path.cwd()}), where {self.folder} needs its tokenizer; "
                "start the command where training was started, or copy tokenizer.json of the shards to the run's folder"
            )
        return open_shard_set(data.path, data.cache_dir, data.cache_size_gb).tokenizer()

    def model(self, device: torch.device | str = "cpu") -> GenerativeModel:
        """Return the model with the checkpoint's weights as the trainer computes with them, for evaluation.

        In half precision those are the rounded working copies, whose ternary codes are not those of the masters.

        Args:
            device: The device of its parameters.

        Raises:
            UserError: for a checkpoint that cannot be read or does not fit config.yaml.
        """
        model = self.initial_model(device)
        load_weights(model, self.checkpoint)
        round_to_working_copies(model, self.config, self.manifest.world_size)
        return model

    def initial_model(self, device: torch.device | str = "cpu") -> GenerativeModel:
        """Return the model with the weights that training without `run.init_from` starts from."""
        return build_full_model(self.config, device)


def load_model(folder: Path | str, device: torch.device | str = "cpu") -> tuple[GenerativeModel, Tokenizer]:
    """Load a trained model with its tokenizer.

    Example:
        model, tokenizer = load_model("runs/small")
        for piece in model.generate("Once", tokenizer=tokenizer):
            print(piece, end="")

    Args:
        folder: The folder of a run, of which the newest intact checkpoint is used, or of an export.
        device: The device of the model's parameters.

    Raises:
        UserError: for a folder that is neither, or contents that are damaged or do not belong together.
    """
    folder = Path(folder)
    if is_export(folder):
        return load_export(folder, device)
    run = Run.open(folder)
    tokenizer = run.tokenizer()
    return run.model(device), tokenizer


def _as_trained(config: Config, folder: Path, path: Path, manifest: Manifest) -> Config:
    """Return a run's configuration with the model that the checkpoint was trained as.

    Raises:
        UserError: if config.yaml asks for another one, or the checkpoint's state cannot be used.
    """
    state = read_state(path, manifest)
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
