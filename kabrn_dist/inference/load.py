"""A trained model in one process, whatever layout trained it: from a run's checkpoint or from an export.

An export is a folder of safetensors files (one, or several with an index), config.yaml and tokenizer.json: see
kabrn_dist/inference/export.py, which writes them.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import torch

from kabrn_dist.checkpoint.fragment import Fragment
from kabrn_dist.checkpoint.header import TensorEntry, read_header
from kabrn_dist.checkpoint.manifest import Manifest
from kabrn_dist.checkpoint.reader import read_entries
from kabrn_dist.checkpoint.safe_open import read_plain
from kabrn_dist.checkpoint.store import CheckpointStore
from kabrn_dist.config import Config
from kabrn_dist.distributed.expert_placement import ExpertPlacement
from kabrn_dist.distributed.mesh import single_process_mesh
from kabrn_dist.model.mixkabrn import MixKABRN, build_model
from kabrn_dist.utils.errors import UserError

WEIGHTS_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
INDEX_BYTES_LIMIT = 16 * 2**20


def build_whole(config: Config, device: torch.device | str = "cpu") -> MixKABRN:
    """The model of a run with its initial weights, all experts here, for evaluation."""
    layout = {"expert_parallel": 1, "experts_per_rank": None, "sequence_parallel": 1, "ranks_per_node": None}
    parallel = config.parallel.model_copy(update=layout)
    return build_model(config.model_copy(update={"parallel": parallel}), single_process_mesh(device)).eval()


def list_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a whole model's parameters and routers' states; takes no memory for their values."""
    with torch.device("meta"):
        model = MixKABRN(config.model, ExpertPlacement.single(config.model.experts.num_experts), single_process_mesh())
    named = dict(model.named_parameters()) | model.routers.named()
    return {name: tuple(values.shape) for name, values in named.items()}


def load_weights(model: MixKABRN, path: Path) -> Manifest:
    """Fill a whole model with a checkpoint's masters and routers' states; returns its manifest.

    Raises:
        UserError: for a checkpoint that cannot be read or is of another shape.
    """
    named = {f"{name}/master": parameter.detach() for name, parameter in model.named_parameters()}
    named |= model.routers.named()
    fragments = [Fragment(name, tuple(v.shape), 0, v.view(-1), owned=True) for name, v in named.items()]
    manifest = CheckpointStore(path.parent).load(path, fragments)
    model.routers.step = manifest.step
    model.quant.lam = model.config.quantization_lambda(manifest.step)
    return manifest


def load_exported(config: Config, folder: Path, device: torch.device | str = "cpu") -> MixKABRN:
    """A whole model with the weights of an export, which `config` describes.

    Raises:
        UserError: for files that are damaged, or are not of this model; before memory is taken for it.
    """
    entries = _list_entries(folder)
    expected = list_shapes(config)
    for name, shape in expected.items():
        found = entries[name][1].shape if name in entries else "missing"
        if found != shape:
            raise UserError(f"{folder}: tensor {name!r} is {found}, config.yaml asks for {shape}; export the run again")
    model = build_whole(config, device)
    for name, values in (dict(model.named_parameters()) | model.routers.named()).items():
        file, entry = entries[name]
        read_entries(file, [(entry, 0, prod(entry.shape), values.detach().view(-1))])
    return model


def _list_entries(folder: Path) -> dict[str, tuple[Path, TensorEntry]]:
    """Where each tensor of an export lies."""
    if (folder / WEIGHTS_NAME).exists() or not (folder / INDEX_NAME).exists():
        names = {WEIGHTS_NAME}
    else:
        try:
            names = set(json.loads(read_plain(folder / INDEX_NAME, INDEX_BYTES_LIMIT))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{folder / INDEX_NAME}: no index of tensors ({type(error).__name__}); copy it again"
            ) from None
    entries: dict[str, tuple[Path, TensorEntry]] = {}
    for name in sorted(names, key=str):
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{folder / INDEX_NAME}: {str(name)[:80]!r} is no plain file name; use another export")
        entries |= {key: (folder / name, entry) for key, entry in read_header(folder / name).items()}
    return entries
