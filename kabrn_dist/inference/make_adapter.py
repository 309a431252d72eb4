"""The adapter of a model that was fine-tuned beside its frozen weights."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kabrn_dist.adapters.adapter import Adapter, AdapterInfo, CodePatch, LowRankFactors, StateFactors
from kabrn_dist.adapters.code_patch import make_patch
from kabrn_dist.adapters.parse import clean_text
from kabrn_dist.inference.adapters import hash_matrices
from kabrn_dist.inference.checkpoint_weights import distinct_scales
from kabrn_dist.inference.code_patches import list_matrices
from kabrn_dist.inference.run import Run
from kabrn_dist.model.adapter import AdapterSpec, trained_low_ranks, trained_states
from kabrn_dist.model.fixed_codes import MergedCodes
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.ops.packing import pack
from kabrn_dist.ops.weight_quant import TernaryMatrices, TernaryModule, round_latents
from kabrn_dist.utils.errors import UserError


def make_adapter(run: Run) -> Adapter:
    """Return the adapter of a fine-tuned run's checkpoint.

    Args:
        run: Of `finetune.method` lora, ternary_lora or state.

    Raises:
        UserError: for another run, a checkpoint that cannot be read, or a base that is gone.
    """
    finetune = run.config.finetune
    if finetune is None or finetune.method == "full":
        raise UserError(
            f"{run.folder}: trained all weights of its model, so there is no adapter; use the run itself, or: mixkabrn "
            f"export {run.folder} --out FOLDER"
        )
    spec = AdapterSpec(finetune.method, finetune.rank, finetune.alpha, finetune.targets)
    name = run.folder.resolve().name
    return collect_adapter(run.model(), spec, name, run.step, str(finetune.base))


@torch.no_grad()
def collect_adapter(model: MixKABRN, spec: AdapterSpec, name: str, steps: int, base_name: str = "") -> Adapter:
    """Return what was trained beside a model's frozen weights.

    Args:
        model: A full model in this process, with the parameters of `add_adapter`.
        spec: What they were added by.
        name: Of the adapter.
        steps: Optimizer steps.
        base_name: Name or folder of the base, for people.
    """
    group, matrices = model.config.scale_group_size, list_matrices(model)
    bases = _list_bases(model, matrices)
    info = AdapterInfo(
        name=clean_text(name),
        method=spec.method,
        rank=spec.rank,
        alpha=spec.alpha,
        targets=spec.targets,
        base_sha256=hash_matrices(bases, group),
        result_sha256=hash_matrices(matrices, group) if spec.method == "ternary_lora" else "",
        steps=steps,
        base_name=clean_text(base_name),
    )
    patches = {name: _diff(base, matrices[name], group) for name, base in bases.items() if base is not matrices[name]}
    factors = {name: LowRankFactors(*_to_numpy(*each)) for name, each in trained_low_ranks(model).items()}
    states = {layer: StateFactors(*_to_numpy(*each)) for layer, each in trained_states(model).items()}
    return Adapter(info, factors, patches, states)


def _list_bases(model: MixKABRN, matrices: dict[str, TernaryMatrices]) -> dict[str, TernaryMatrices]:
    """The matrices of the base: those of the model but where codes are merged with factors."""
    bases = dict(matrices)
    for prefix, module in model.named_modules():
        for leaf, source in module.sources.items() if isinstance(module, TernaryModule) else ():
            if isinstance(source, MergedCodes):
                codes = round_latents(source.latents, source.base_scales)
                bases[f"{prefix}.{leaf}"] = TernaryMatrices(source.latents, pack(codes), source.base_scales, codes)
    return bases


def _diff(base: TernaryMatrices, trained: TernaryMatrices, group: int | None) -> CodePatch:
    codes = [each.codes(torch.int8).cpu().numpy() for each in (base, trained)]
    scales = [distinct_scales(each.gamma, group).float().cpu().numpy() for each in (base, trained)]
    return make_patch(codes[0], scales[0], codes[1], scales[1])


def _to_numpy(*parts: Tensor) -> list[NDArray[np.float32]]:
    return [part.cpu().numpy() for part in parts]
