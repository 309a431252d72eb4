"""A base model, one that was trained on from it, and the adapter between them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kabrn_dist.adapters.adapter import Adapter, AdapterInfo
from kabrn_dist.adapters.code_patch import make_patch
from kabrn_dist.config import Config
from kabrn_dist.inference.adapters import hash_model_codes
from kabrn_dist.inference.code_patches import list_matrices
from kabrn_dist.inference.generate import GenerativeModel
from kabrn_dist.runtime.weights import QuantizedStack
from tests.support.models import make_model, make_model_config


class PatchedModels(NamedTuple):
    """Two models and the adapter that makes the second from the first.

    Attributes:
        config: Of both.
        base: The first.
        trained: The second.
        adapter: Of method "ternary_lora", of all matrices.
    """

    config: Config
    base: GenerativeModel
    trained: GenerativeModel
    adapter: Adapter


def make_patched_models(*overrides: str) -> PatchedModels:
    config = make_model_config(*overrides)
    base, trained = make_model(config), make_model(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name in list_matrices(trained):
            parameter = trained.get_parameter(name)
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1 * float(parameter.std()))
    return PatchedModels(config, base, trained, make_patch_between(base, trained))


@torch.no_grad()
def make_patch_between(base: GenerativeModel, trained: GenerativeModel) -> Adapter:
    group, after = base.config.scale_group_size, list_matrices(trained)
    patches = {}
    for name, matrices in list_matrices(base).items():
        left, right = QuantizedStack(matrices, group), QuantizedStack(after[name], group)
        patches[name] = make_patch(left.codes, left.scales, right.codes, right.scales)
    info = AdapterInfo(
        "between", "ternary_lora", 4, 8.0, ("mixer",), hash_model_codes(base), hash_model_codes(trained), 10, "base"
    )
    return Adapter(info, patches=patches)
