"""A run's folder, opened: configuration, newest intact checkpoint, tokenizer and model, in one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from kabrn_dist.checkpoint.manifest import Manifest
from kabrn_dist.config import Config
from kabrn_dist.data.index import TOKENIZER_NAME
from kabrn_dist.data.remote import is_url, open_shard_set
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.inference.base import load_adapted_model
from kabrn_dist.inference.folder import check_run_folder, is_export
from kabrn_dist.inference.generate import GenerativeModel
from kabrn_dist.inference.load import build_full_model, load_export, load_weights
from kabrn_dist.inference.run_checkpoint import configure_as_trained, find_checkpoint
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
        path, manifest = find_checkpoint(folder, step)
        return cls(folder, configure_as_trained(folder, path, manifest), path, manifest)

    @property
    def step(self) -> int:
        """Number of optimizer steps before the checkpoint."""
        return self.manifest.step

    @property
    def is_merged(self) -> bool:
        """Whether its model is that of a base with flipped codes, of which the checkpoint holds the factors alone."""
        return self.config.finetune is not None and self.config.finetune.method == "ternary_lora"

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

        In half precision those are the rounded working copies, whose ternary codes are not those of the masters. The
        run of an adapter has its base's model, with the adapter.

        Args:
            device: The device of its parameters.

        Raises:
            UserError: for a checkpoint that cannot be read or does not fit config.yaml.
        """
        if self.config.finetune is not None and self.config.finetune.trains_adapter:
            return load_adapted_model(self.config, self.checkpoint, self.manifest, device)
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
