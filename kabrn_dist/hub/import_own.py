"""A model that `mixkabrn export --format hf` wrote, turned back into a run: exactly, or refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from kabrn_dist.checkpoint.manifest import SAFETENSORS_DTYPES
from kabrn_dist.checkpoint.reader import read_entries
from kabrn_dist.config import Config, ModelConfig
from kabrn_dist.config.file import EXAMPLE_OVERRIDE, parse_config
from kabrn_dist.config.model_changes import describe_other_model
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.hub.import_own_config import read_model_section, read_step
from kabrn_dist.hub.import_own_tokenizer import read_own_tokenizer
from kabrn_dist.hub.import_run import write_start
from kabrn_dist.hub.import_source import CONFIG_NAME, ForeignModel, read_json
from kabrn_dist.hub.tensors import ROUTER_BIAS, Flavor, HubTensor, list_hub_tensors
from kabrn_dist.inference.load import build_full_model, list_shapes, verify_data
from kabrn_dist.inference.stored_codes import has_wrong_codes
from kabrn_dist.inference.working_copy import working_dtypes
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.ops.codes_latents import make_latents
from kabrn_dist.ops.packing import unpack
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.precision import TORCH_DTYPES
from kabrn_dist.utils.safetensors_header import read_metadata
from kabrn_dist.utils.yaml_section import set_value

MODEL_TYPE = "mixkabrn"
_STEPS, _SEQUENCE_LENGTH = 1000, 2048


@dataclass(frozen=True)
class OwnImport:
    """An import of a model of this package that can be carried out.

    Attributes:
        source: The exported model.
        flavor: Of its weights.
        step: Optimizer steps of its weights.
        lam: How far they are quantized.
        config: Configuration of the run.
        tokenizer: Of the model, with its chat template.
        tensors: All of its tensors.
    """

    source: ForeignModel
    flavor: Flavor
    step: int
    lam: float
    config: Config
    tokenizer: Tokenizer
    tensors: list[HubTensor]


def is_own_model(folder: Path) -> bool:
    """Return whether a folder of Hugging Face says that it holds a model of this package."""
    try:
        return read_json(folder / CONFIG_NAME, "give a model folder").get("model_type") == MODEL_TYPE
    except UserError:
        return False


def plan_own_import(folder: Path, out: Path, data: str | None = None, overrides: Sequence[str] = ()) -> OwnImport:
    """Read and check everything but the values of the weights. Nothing is written.

    Args:
        folder: Folder that `mixkabrn export --format hf` wrote, or `save_pretrained` of the model from there.
        out: Folder of the run.
        data: Shard set to train on; None if there is none yet.
        overrides: Changes `a.b=c` of the run's configuration.

    Raises:
        UserError: for a folder that is damaged or describes no model, and for changes that make another model.
    """
    source = ForeignModel.of_folder(folder)
    flavor, step = _read_flavor(source), read_step(source)
    model, lam = read_model_section(source), float(source.config["quantization"]) * bool(source.config["quantize"])
    tree: dict[str, Any] = {
        "version": 2,
        "run": {"folder": str(out)},
        "data": {"path": data or "data/none", "sequence_length": _SEQUENCE_LENGTH},
        "model": model.model_dump(mode="json"),
        "optimizer": {"learning_rate": 3e-4, "warmup_steps": _STEPS // 20},
        "training": {"steps": step + _STEPS, "global_batch_size": 8, "micro_batch_size": 1},
    }
    tensors = _list_tensors(source, parse_config(tree, str(folder / CONFIG_NAME)), flavor)
    tree["training"]["precision"] = _find_precision(source, parse_config(tree, str(folder)), tensors, flavor)
    for override in overrides:
        set_value(tree, override, EXAMPLE_OVERRIDE, Config)
    config = parse_config(tree, "configuration of the run")
    _check_overrides(model, config, step, lam)
    return OwnImport(source, flavor, step, lam, config, _read_tokenizer(source, model), tensors)


def describe_own_import(plan: OwnImport) -> str:
    """Return what is carried over, in words."""
    template = " and its chat template" if plan.tokenizer.chat_template else ""
    quantized = f", quantized to {plan.lam:.4g} of 1" if plan.config.model.quantize else ""
    return (
        f"{plan.source.folder} ({MODEL_TYPE}) → {plan.config.run.folder}: all {len(plan.tensors)} tensors exactly "
        f"({plan.flavor} weights of step {plan.step}{quantized}), tokenizer "
        f"({plan.tokenizer.vocab_size:,} ids){template}"
    )


def run_own_import(plan: OwnImport, has_data: bool = False) -> Path:
    """Write the run.

    Args:
        plan: From `plan_own_import`.
        has_data: Whether the plan's configuration names a shard set that is there.

    Returns:
        The checkpoint.

    Raises:
        UserError: as `write_start`; for damaged weights; for codes and scales that no latent weights round to.
    """
    model = build_own(plan)
    return write_start(plan.config, model, plan.tokenizer, has_data, plan.step)


def build_own(plan: OwnImport) -> MixKABRN:
    """Return the model.

    Raises:
        UserError: as `run_own_import`.
    """
    for file in sorted({file for file, _ in plan.source.tensors.values()}):
        verify_data(file)
    model = build_full_model(plan.config)
    targets = {name: values.detach() for name, values in model.named_parameters()} | model.routers.named()
    for tensor in plan.tensors:
        if tensor.kind == "values":
            values = plan.source.read(tensor.name, tensor.shape).reshape(-1)
            targets[tensor.source].view(-1)[tensor.start : tensor.start + len(values)] = values
        elif tensor.kind == "codes":
            target = targets[tensor.source]
            target.copy_(_read_latents(plan, tensor.name.removesuffix(".codes"), target).view(target.shape))
    model.routers.step = plan.step
    model.set_quantization(plan.lam)
    return model


def _read_flavor(source: ForeignModel) -> Flavor:
    flavor = source.get("weights")
    if flavor not in ("latent", "ternary"):
        raise UserError(
            f"{source.folder / CONFIG_NAME}: weights is {str(flavor)[:40]!r}, not latent or ternary; get it again"
        )
    if flavor == "ternary" and (source.get("quantize") is not True or source.get("quantization") != 1):
        raise UserError(
            f"{source.folder / CONFIG_NAME}: weights is 'ternary', but the model is not wholly quantized; import the "
            "model with latent weights"
        )
    return cast(Literal["latent", "ternary"], flavor)


def _list_tensors(source: ForeignModel, config: Config, flavor: Flavor) -> list[HubTensor]:
    """The tensors that the configuration asks for, after a check that the files have these and no others."""
    try:
        shapes = list_shapes(config)
        tensors = list_hub_tensors(config, shapes, dict.fromkeys(shapes, torch.float32), flavor)
    except (RuntimeError, OverflowError, MemoryError, TypeError) as error:
        raise UserError(
            f"{source.folder / CONFIG_NAME}: its sizes are of no model ({type(error).__name__}); get the folder again"
        ) from None
    for tensor in tensors:
        if tensor.name not in source.tensors:
            raise UserError(f"{source.folder}: has no tensor {tensor.name!r}; the files are not whole, get them again")
        file, entry = source.tensors[tensor.name]
        if entry.shape != tensor.shape:
            raise UserError(
                f"{file}: tensor {tensor.name!r} is {list(entry.shape)}, config.json asks for {list(tensor.shape)}; "
                "get the folder again"
            )
        is_floating = SAFETENSORS_DTYPES[entry.dtype].is_floating_point
        if (entry.dtype == "U8") != (tensor.kind == "codes") or is_floating == (tensor.kind == "codes"):
            raise UserError(f"{file}: tensor {tensor.name!r} is {entry.dtype}, no {tensor.kind}; get the folder again")
        if tensor.kind == "scales" and entry.dtype != "F32":
            raise UserError(f"{file}: tensor {tensor.name!r} is {entry.dtype}, not F32; import the latent weights")
    if unknown := sorted(set(source.tensors) - {tensor.name for tensor in tensors}):
        raise UserError(
            f"{source.folder}: has a tensor {unknown[0][:80]!r}, which a model of this configuration has not; get the "
            "folder again"
        )
    return tensors


def _find_precision(source: ForeignModel, config: Config, tensors: list[HubTensor], flavor: Flavor) -> str:
    """The precision whose working copies hold these weights exactly, as the trainer computed with them."""
    # Latents of codes need all bits of fp32.
    for precision in ("bf16", "fp16") if flavor == "latent" else ():
        training = config.training.model_copy(update={"precision": precision})
        dtypes = working_dtypes(config.model_copy(update={"training": training}), 1)
        wanted = TORCH_DTYPES[precision]
        halves = [t for t in tensors if t.source != ROUTER_BIAS and dtypes[t.source] == wanted]
        if all(SAFETENSORS_DTYPES[source.tensors[tensor.name][1].dtype] == wanted for tensor in halves):
            return precision
    return "fp32"


def _check_overrides(model: ModelConfig, config: Config, step: int, lam: float) -> None:
    if differences := describe_other_model(model, config.model):
        raise UserError(f"--set: {differences}; leave it out, and grow the imported run (run.init_from) instead")
    if (found := config.model.quantization_lambda(step)) != lam:
        raise UserError(
            f"--set: with this schedule step {step} is quantized to {found:.6g} of 1, and the weights are to "
            f"{lam:.6g}; leave it out"
        )


def _read_tokenizer(source: ForeignModel, model: ModelConfig) -> Tokenizer:
    file = min(file for file, _ in source.tensors.values())
    tokenizer = read_own_tokenizer(source.folder, read_metadata(file).get("tokenizer_sha256"))
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{source.folder / 'tokenizer.json'}: has {tokenizer.vocab_size} ids, vocab_size in config.json is "
            f"{model.vocab_size}: they are not of one model; get the folder again"
        )
    if (document := source.get("bos_token_id", default=tokenizer.document_token)) != tokenizer.document_token:
        raise UserError(
            f"{source.folder / 'tokenizer.json'}: documents begin with id {tokenizer.document_token}, bos_token_id in "
            f"config.json is {str(document)[:40]}: they are not of one model; get the folder again"
        )
    return tokenizer


def _read_latents(plan: OwnImport, base: str, target: Tensor) -> Tensor:
    file, entry = plan.source.tensors[f"{base}.codes"]
    packed = torch.empty(entry.shape, dtype=torch.uint8)
    read_entries(file, [(entry, 0, prod(entry.shape), packed)])
    scales = plan.source.read(f"{base}.scales")
    if has_wrong_codes(packed, scales):
        raise UserError(f"{file}: the codes or scales of {base!r} are none; get the folder again")
    shape = tuple(target.shape if target.ndim == 3 else (1, *target.shape))
    latents = make_latents(unpack(packed, shape, torch.int8), scales, plan.config.model.scale_group_size)
    if latents is None:
        raise UserError(
            f"{file}: no latent weights round to exactly the codes and scales of {base!r}; import the model "
            "with latent weights (export --weights latent)"
        )
    return latents
