"""The adapter of an earlier run that a fine-tuning goes on with, read by each rank for its part of the model."""

from __future__ import annotations

from pathlib import Path

import torch

from kabrn_dist.checkpoint.fragment import Fragment
from kabrn_dist.checkpoint.manifest import Manifest
from kabrn_dist.checkpoint.reader import CheckpointReader, plan_reads
from kabrn_dist.checkpoint.state import read_state
from kabrn_dist.config import Config
from kabrn_dist.distributed.collectives import Group, run_on_all
from kabrn_dist.inference.load import check_finite
from kabrn_dist.inference.run_checkpoint import configure_as_trained, find_checkpoint
from kabrn_dist.model.adapter import adapter_parameters
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.utils.errors import UserError

_SAME_KEYS = ("method", "rank", "alpha", "targets")


def load_init_adapter(model: MixKABRN, config: Config, base_sha256: str, group: Group = None) -> str:
    """Fill a new adapter with that of `finetune.init_adapter`. Collective over `group` with torch.distributed.

    Args:
        model: A rank's part of the base with a new adapter, in fp32; not yet under ZeRO.
        config: The configuration of the fine-tuning.
        base_sha256: Hash of the base's codes.
        group: The ranks that call this.

    Returns:
        A line for the console.

    Raises:
        UserError: on every rank, for a folder that is no run of an adapter, one of another base, or an adapter of
            other parameters.
    """
    assert config.finetune is not None and config.finetune.init_adapter is not None
    folder = config.finetune.init_adapter
    try:
        path, manifest = find_checkpoint(folder, group=group)
    except UserError as error:
        raise UserError(f"finetune.init_adapter: {error}") from error
    run_on_all(group, _check_fit, folder, path, manifest, config, base_sha256)
    run_on_all(group, _read_into, model, path, manifest)
    return f"goes on with the adapter of {folder} (step {manifest.step})"


def _check_fit(folder: Path, path: Path, manifest: Manifest, config: Config, base_sha256: str) -> None:
    earlier, now, told = configure_as_trained(folder, path, manifest).finetune, config.finetune, "finetune.init_adapter"
    assert now is not None
    base = read_state(path, manifest).base
    if earlier is None or base is None or not earlier.trains_adapter:
        raise UserError(f"{told} {folder}: trained a whole model, no adapter; set finetune.base to it instead")
    if base.sha256 != base_sha256:
        raise UserError(
            f"{told} {folder}: its adapter is of another base ({base.sha256[:12]}…) than {now.base} "
            f"({base_sha256[:12]}…); set finetune.base to {earlier.base}"
        )
    for key in _SAME_KEYS:
        was, wanted = getattr(earlier, key), getattr(now, key)
        if was != wanted:
            raise UserError(f"{told} {folder}: has {key} {was}, and finetune.{key} is {wanted}; set it to {was}")


@torch.no_grad()
def _read_into(model: MixKABRN, path: Path, manifest: Manifest) -> None:
    local, fragments = model.placement.local, []
    for info, parameter in adapter_parameters(model):
        values, shape = parameter.detach().view(-1), tuple(parameter.shape)
        first = local.start * (values.numel() // len(local)) if info.routed else 0
        whole = (model.config.experts.num_experts, *shape[1:]) if info.routed else shape
        fragments.append(Fragment(f"{info.name}/master", whole, first, values, owned=True))
    CheckpointReader(path).read(plan_reads(path, manifest, fragments))
    for fragment in fragments:
        check_finite(path, fragment.name, fragment.values)
