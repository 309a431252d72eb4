"""The trained model that a fine-tuning starts from: a run's checkpoint or an export, read part by part."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kabrn_dist.checkpoint.fragment import Fragment
from kabrn_dist.checkpoint.manifest import Manifest
from kabrn_dist.checkpoint.reader import CheckpointReader, plan_reads, read_entries
from kabrn_dist.checkpoint.state import BaseState, read_state
from kabrn_dist.config import Config
from kabrn_dist.config.finetune import FinetuneConfig
from kabrn_dist.data.base import check_base_model, read_base_config
from kabrn_dist.distributed.collectives import Group, run_on_all
from kabrn_dist.inference.adapters import hash_model_codes
from kabrn_dist.inference.checkpoint_weights import CheckpointWeights
from kabrn_dist.inference.folder import is_export
from kabrn_dist.inference.generate import GenerativeModel
from kabrn_dist.inference.load import (
    build_full_model,
    check_export_weights,
    check_finite,
    load_export_weights,
    read_export_description,
    read_export_step,
)
from kabrn_dist.inference.run_checkpoint import configure_as_trained, find_checkpoint
from kabrn_dist.inference.stored_codes import attach_stored_codes
from kabrn_dist.model.adapter import AdapterSpec, adapter_parameters, add_adapter, freeze_base
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safetensors_header import TensorEntry

Entries = dict[str, tuple[Path, TensorEntry]]


@dataclass(frozen=True)
class Base:
    """A trained model whose files match their hashes.

    Attributes:
        folder: Its folder.
        config: Its configuration.
        step: Its step.
        checkpoint: Folder and manifest of the checkpoint of a run; None for an export.
        entries: File and header entry of each tensor of an export; empty for a run.
    """

    folder: Path
    config: Config
    step: int
    checkpoint: tuple[Path, Manifest] | None
    entries: Entries

    def model(self, device: torch.device | str = "cpu") -> GenerativeModel:
        """Return the whole model on a device, as it generates. Not collective."""
        if self.checkpoint is None:
            return load_export_weights(self.config, self.folder, device)
        model = build_full_model(self.config)
        self.fill(model, as_computed=True)
        model.routers.step = self.step
        model.set_quantization(self.config.model.quantization_lambda(self.step))
        return model.to(device)

    def fill(self, model: MixKABRN, as_computed: bool) -> None:
        """Load the weights and the routers' states into a rank's part of the model, before it is cast or sharded.

        Args:
            model: With parameters in fp32; routed experts are those of its placement.
            as_computed: Round weights to what the base's trainer computed with, so that its ternary codes are the
                base's. If not, weights are the fp32 masters where there are any.

        Raises:
            UserError: for a file that cannot be read, or numbers that are not finite.
        """
        table, local = model.parameter_table(), model.placement.local
        weights = None if self.checkpoint is None else CheckpointWeights(*self.checkpoint, self.config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                count = parameter.numel()
                start = local.start * (count // len(local)) if table[name].routed else 0
                dtype = torch.float32 if weights is None or not as_computed else weights.dtypes[name]
                values = self._read(weights, name, start, start + count, dtype)
                parameter.copy_(values.view_as(parameter))
            for name, state in model.routers.named().items():
                state.copy_(self._read(weights, name, 0, state.numel(), torch.float32).view_as(state))
        if as_computed and weights is None and self.config.model.quantize:
            attach_stored_codes(model, self.entries)

    def _read(self, weights: CheckpointWeights | None, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        if weights is not None:
            return weights.read(name, start, stop, dtype)
        file, entry = self.entries[name]
        values = torch.empty(stop - start, dtype=dtype)
        read_entries(file, [(entry, start, stop, values)])
        check_finite(file, name, values)
        return values


def open_base(config: Config, step: int | None = None, group: Group = None) -> Base:
    """Open the base of a fine-tuning. Collective over `group` where torch.distributed is initialized.

    Args:
        config: The configuration of the fine-tuning.
        step: Step of the base's checkpoint; None takes the newest intact one.
        group: The ranks that call this.

    Raises:
        UserError: on every rank, for a folder that is no run or export, is damaged, holds another model than the
            configuration describes, or one that is not wholly quantized yet.
    """
    assert config.finetune is not None
    folder = config.finetune.base
    run_on_all(group, read_base_config, folder)
    if is_export(folder):
        base = run_on_all(group, _open_export, folder)
    else:
        try:
            path, manifest = find_checkpoint(folder, step, group)
        except UserError as error:
            raise UserError(f"finetune.base: {error}") from error
        trained = run_on_all(group, configure_as_trained, folder, path, manifest)
        base = Base(folder, trained, manifest.step, (path, manifest), {})
    run_on_all(group, _check_base, base, config)
    return base


def _open_export(folder: Path) -> Base:
    config, _ = read_export_description(folder)
    entries = check_export_weights(config, folder)
    step = read_export_step(entries)
    # Exports of earlier versions do not say, and are of finished runs.
    return Base(folder, config, config.model.first_quantized_step if step is None else step, None, entries)


def _check_base(base: Base, config: Config) -> None:
    check_base_model(base.folder, base.config.model, config.model)
    model = base.config.model
    if model.quantize and model.quantization_lambda(base.step) != 1:
        raise UserError(
            f"finetune.base {base.folder}: its step {base.step} is before step {model.first_quantized_step}, from "
            "which on it is wholly quantized (model.quantize_start_step + quantize_warmup_steps); train it further"
        )


def load_adapted_model(
    config: Config, checkpoint: Path, manifest: Manifest, device: torch.device | str = "cpu"
) -> GenerativeModel:
    """Return the model of a fine-tuning's base with the adapter of a checkpoint, whose parameters it holds.

    Args:
        config: The configuration of the fine-tuning.
        checkpoint: Folder of its checkpoint.
        manifest: Its manifest.
        device: The device of the parameters.

    Raises:
        UserError: for a checkpoint that cannot be read, and if the base is not there or is another one by now.
    """
    state = read_state(checkpoint, manifest)
    base = open_base(config, None if state.base is None else state.base.step)
    if state.base is not None:
        check_same_base(base, state.base, hash_model_codes(base.model()))
    return adapt_base(base, config, checkpoint, manifest).to(device)


def adapt_base(base: Base, config: Config, checkpoint: Path, manifest: Manifest) -> GenerativeModel:
    """Return the model of a base with the adapter of a fine-tuning's checkpoint. Not collective.

    Args:
        base: The base that the checkpoint says.
        config: The configuration of the fine-tuning.
        checkpoint: Folder of its checkpoint.
        manifest: Its manifest.

    Raises:
        UserError: for a checkpoint that cannot be read.
    """
    model = base.model()
    attach_new_adapter(model, config)
    named = {f"{info.name}/master": parameter.detach() for info, parameter in adapter_parameters(model)}
    fragments = [Fragment(name, tuple(v.shape), 0, v.view(-1), owned=True) for name, v in named.items()]
    CheckpointReader(checkpoint).read(plan_reads(checkpoint, manifest, fragments))
    for name, values in named.items():
        check_finite(checkpoint, name, values)
    return model


def attach_new_adapter(model: MixKABRN, config: Config) -> None:
    """Freeze a model, and register the parameters that are trained beside it, as they are before the first step.

    Args:
        model: A rank's part of the base, or all of it.
        config: The configuration of the fine-tuning.

    Raises:
        UserError: if the section `finetune` does not fit the model.
    """
    finetune = config.finetune
    assert finetune is not None
    freeze_base(model)
    add_adapter(model, adapter_spec(finetune), config.run.seed)


def adapter_spec(finetune: FinetuneConfig) -> AdapterSpec:
    """Return what a fine-tuning of another method than `full` trains."""
    assert finetune.method != "full"
    return AdapterSpec(finetune.method, finetune.rank, finetune.alpha, finetune.targets)


def check_same_base(base: Base, earlier: BaseState, sha256: str) -> None:
    """Check that a base is the one that a run has begun with.

    Args:
        base: The base now.
        earlier: What the run's checkpoint says of it.
        sha256: Hash of its codes.

    Raises:
        UserError: if it is another one.
    """
    if sha256 != earlier.sha256:
        raise UserError(
            f"finetune.base {base.folder}: is another model (sha256 {sha256[:12]}…) than the one that this run has "
            f"begun with, its step {earlier.step} ({earlier.sha256[:12]}…); restore that one, or start a new run"
        )
