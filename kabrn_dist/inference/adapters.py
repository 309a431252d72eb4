"""Adapters on a model in memory: checked against its codes, attached, exchanged and detached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from kabrn_dist.adapters.adapter import Adapter
from kabrn_dist.adapters.codes_hash import CodesHash
from kabrn_dist.adapters.identity import refuse_base
from kabrn_dist.inference.checkpoint_weights import distinct_scales
from kabrn_dist.inference.code_patches import attach_patches, detach_patches, list_matrices
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.ops.weight_quant import TernaryMatrices
from kabrn_dist.utils.errors import UserError


@torch.no_grad()
def hash_model_codes(model: MixKABRN) -> str:
    """Return the hash of the matrices that a model computes with, by which adapters know their base.

    Args:
        model: A full model in this process.
    """
    return hash_matrices(list_matrices(model), model.config.scale_group_size)


def hash_matrices(matrices: Mapping[str, TernaryMatrices], scale_group_size: int | None) -> str:
    """Return the hash of matrices, by their names.

    Args:
        matrices: Of a model; see `list_matrices`.
        scale_group_size: Outputs that share a scale; None for all of a matrix.
    """
    total = CodesHash()
    for name, found in matrices.items():
        if found.packed is None:
            total.add_plain(name, found.latents.detach().float().cpu().numpy())
        else:
            scales = distinct_scales(found.gamma, scale_group_size)
            total.add_ternary(name, found.codes(torch.int8).cpu().numpy(), scales.float().cpu().numpy())
    return total.hexdigest()


class ModelAdapters:
    """The adapters of one model, which can be exchanged often: its hash is taken once.

    Args:
        model: A full model in this process, whose weights no longer change; adapters that it has are detached.

    Attributes:
        base_sha256: `hash_model_codes` of the model without adapters.
    """

    def __init__(self, model: MixKABRN) -> None:
        self._model = model
        detach_patches(model)
        with torch.no_grad():
            matrices = list_matrices(model)
            self.base_sha256 = hash_matrices(matrices, model.config.scale_group_size)
        # Two bits a weight are all that is kept.
        self._bases = {name: each._replace(int8_codes=None, wide_codes=None) for name, each in matrices.items()}

    def set(self, adapters: Sequence[tuple[Adapter, float]]) -> None:
        """Attach adapters in place of those that are attached now; see `set_adapters`."""
        for adapter, _ in adapters:
            if adapter.info.base_sha256 != self.base_sha256:
                raise refuse_base("this model", adapter.info, self.base_sha256)
        patched = [(adapter, weight) for adapter, weight in adapters if adapter.info.method == "ternary_lora"]
        if len(patched) > 1 or any(weight != 1 for _, weight in patched):
            names = ", ".join(repr(adapter.info.name) for adapter, _ in patched)
            raise UserError(
                f"{names}: of adapters that change codes, a model takes one, with weight 1; leave out the rest"
            )
        detach_patches(self._model)
        for adapter, _ in patched:
            attach_patches(self._model, self._bases, adapter.patches)


def set_adapters(model: MixKABRN, adapters: Sequence[tuple[Adapter, float]]) -> None:
    """Attach adapters to a model, in place of those that it has; none restores the model to the last bit.

    Args:
        model: A full model in this process.
        adapters: Each with its weight. Factors and states are added up; of patches there is at most one, with weight 1.

    Raises:
        UserError: for an adapter of another base, which is known by the hash of its codes, or that does not fit.
    """
    ModelAdapters(model).set(adapters)
