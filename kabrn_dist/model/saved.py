"""A trained model in one process, whatever layout trained it."""

from __future__ import annotations

from pathlib import Path

import torch

from kabrn_dist.checkpoint.fragment import Fragment
from kabrn_dist.checkpoint.manifest import Manifest
from kabrn_dist.checkpoint.store import CheckpointStore
from kabrn_dist.config import Config
from kabrn_dist.mesh import alone
from kabrn_dist.model.mixkabrn import MixKABRN, build_model


def build_whole(config: Config, device: torch.device | str = "cpu") -> MixKABRN:
    """The model of a run with its initial weights, all experts here, for evaluation."""
    layout = {"expert": 1, "experts_per_rank": None, "sequence": 1, "node": None}
    parallel = config.parallel.model_copy(update=layout)
    return build_model(config.model_copy(update={"parallel": parallel}), alone(device)).eval()


def load_weights(model: MixKABRN, path: Path) -> Manifest:
    """Fill a whole model with a checkpoint's masters and routers' states; returns its manifest.

    Raises:
        UserError: for a checkpoint that cannot be read or is of another shape.
    """
    named = {f"{name}/master": parameter.detach() for name, parameter in model.named_parameters()}
    named |= model.routers.named()
    fragments = [Fragment(name, tuple(v.shape), 0, v.view(-1), owned=True) for name, v in named.items()]
    manifest = CheckpointStore(path.parent).load(path, fragments)
    model.routers.step = int(str(manifest.state["step"]))
    return manifest
