"""Adapters on models in this process."""

from __future__ import annotations

import torch

from kabrn_dist.adapters.codes_hash import CodesHash
from kabrn_dist.inference.checkpoint_weights import distinct_scales
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.ops.weight_quant import TernaryModule


@torch.no_grad()
def hash_model_codes(model: MixKABRN) -> str:
    """Return the identity of a full model."""
    digest, group = CodesHash(), model.config.scale_group_size
    for name, info in model.parameter_table().items():
        if info.role != "matrix":
            continue
        if not info.ternary:
            digest.add_plain(name, model.get_parameter(name).float().cpu().numpy())
            continue
        prefix, _, leaf = name.rpartition(".")
        module = model.get_submodule(prefix)
        assert isinstance(module, TernaryModule)
        found = module.matrices(leaf)
        digest.add_ternary(
            name, found.codes(torch.int8).cpu().numpy(), distinct_scales(found.gamma, group).cpu().numpy()
        )
    return digest.hexdigest()
