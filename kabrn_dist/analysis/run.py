"""A run's model as it started and as it is now, in one process, whatever layout trained it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from kabrn_dist.checkpoint.store import CheckpointStore
from kabrn_dist.config import Config
from kabrn_dist.config.file import load_config
from kabrn_dist.inference.load import build_whole
from kabrn_dist.model.experts.base import Experts
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.model.moe import MixtureOfExperts
from kabrn_dist.utils.errors import UserError


class Network(NamedTuple):
    """The stacked experts of one layer: `kind` is routed, shared or dense."""

    layer: int
    kind: str
    experts: Experts


def open_run(folder: Path) -> tuple[Config, MixKABRN, Path]:
    """Configuration, model with its *initial* weights, and the newest intact checkpoint of a run.

    Raises:
        UserError: where the folder holds no run or no intact checkpoint.
    """
    if not folder.is_dir():
        raise UserError(f"--run {folder}: no such folder; name the run.folder of a run's configuration")
    if not (folder / "config.yaml").exists():
        raise UserError(f"{folder}/config.yaml: no such file; --run must name the folder of a run that has trained")
    config = load_config(folder / "config.yaml")
    path = CheckpointStore(folder / "checkpoints").find_latest()
    if path is None:
        raise UserError(f"{folder}/checkpoints: no intact checkpoint; train until the first one is saved")
    return config, build_whole(config), path


def list_networks(model: MixKABRN) -> list[Network]:
    """All stacked experts, layer by layer."""
    found = []
    for layer, block in enumerate(model.blocks):
        mixture = isinstance(block.mixture, MixtureOfExperts)
        for name in ("routed", "shared"):
            part = getattr(block.mixture, name, None)
            if isinstance(part, Experts):
                found.append(Network(layer, name if mixture else "dense", part))
    return found
