"""Adapters on a model in memory: checked against its codes, attached, exchanged and detached."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kabrn_dist.adapters.adapter import Adapter
from kabrn_dist.adapters.codes_hash import CodesHash
from kabrn_dist.adapters.identity import refuse_base
from kabrn_dist.inference.checkpoint_weights import distinct_scales
from kabrn_dist.inference.code_patches import attach_patches, detach_patches, list_matrices
from kabrn_dist.model.adapter import set_initial_states, set_low_ranks
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.ops.low_rank import LowRank, join_low_ranks
from kabrn_dist.ops.weight_quant import TernaryMatrices
from kabrn_dist.utils.errors import UserError

# As in the runtime in C; what is beyond gives numbers that are not finite.
LARGEST_WEIGHT = 1e6


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
        self._detach()
        with torch.no_grad():
            matrices = list_matrices(model)
            self.base_sha256 = hash_matrices(matrices, model.config.scale_group_size)
        # Two bits a weight are all that is kept.
        self._bases = {name: each._replace(int8_codes=None, wide_codes=None) for name, each in matrices.items()}

    def set(self, adapters: Sequence[tuple[Adapter, float]]) -> None:
        """Attach adapters in place of those that are attached now; see `set_adapters`."""
        self._check(adapters)
        self._detach()
        try:
            for adapter, _ in adapters:
                attach_patches(self._model, self._bases, adapter.patches)
            set_low_ranks(self._model, _sum_low_ranks(adapters))
            set_initial_states(self._model, _sum_states(adapters))
        except UserError:
            self._detach()
            raise

    def _detach(self) -> None:
        detach_patches(self._model)
        set_low_ranks(self._model, {})
        set_initial_states(self._model, {})

    def _check(self, adapters: Sequence[tuple[Adapter, float]]) -> None:
        for adapter, weight in adapters:
            if not abs(weight) <= LARGEST_WEIGHT:
                raise UserError(f"adapter {adapter.info.name!r}: weight {weight:g} is no weight; use one such as 0.5")
            if adapter.info.base_sha256 != self.base_sha256:
                raise refuse_base("this model", adapter.info, self.base_sha256)
        patched = [(adapter, weight) for adapter, weight in adapters if adapter.info.method == "ternary_lora"]
        if len(patched) > 1 or any(weight != 1 for _, weight in patched):
            names = ", ".join(repr(adapter.info.name) for adapter, _ in patched)
            raise UserError(
                f"{names}: change codes, and of such adapters a model takes one, with weight 1; leave out the rest"
            )


def _sum_low_ranks(adapters: Sequence[tuple[Adapter, float]]) -> dict[str, LowRank]:
    parts: dict[str, list[LowRank]] = defaultdict(list)
    for adapter, weight in adapters:
        for name, (a, b) in adapter.low_ranks.items():
            parts[name].append(LowRank(torch.from_numpy(a), torch.from_numpy(b) * weight))
    summed = {}
    for name, factors in parts.items():
        if len({(f.a.shape[0], f.a.shape[2], *f.b.shape[:2]) for f in factors}) > 1:
            raise UserError(f"{name!r}: is of different sizes in these adapters; use those of one model")
        summed[name] = join_low_ranks(factors)
    return summed


def _sum_states(adapters: Sequence[tuple[Adapter, float]]) -> dict[int, Tensor]:
    summed: dict[int, Tensor] = {}
    for adapter, weight in adapters:
        for layer, state in adapter.states.items():
            matrix = torch.from_numpy(state.matrix()) * weight
            if layer in summed and summed[layer].shape != matrix.shape:
                raise UserError(
                    f"layer {layer}: has states of different sizes in these adapters; use those of one model"
                )
            summed[layer] = summed[layer] + matrix if layer in summed else matrix
    return summed


def set_adapters(model: MixKABRN, adapters: Sequence[tuple[Adapter, float]]) -> None:
    """Attach adapters to a model, in place of those that it has; none restores the model to the last bit.

    Args:
        model: A full model in this process.
        adapters: Each with its weight. Factors and states are added up; of patches there is at most one, with weight 1.

    Raises:
        UserError: for an adapter of another base, which is known by the hash of its codes, or that does not fit: then
            the model has none.
    """
    ModelAdapters(model).set(adapters)
