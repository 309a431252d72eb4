"""Patches of ternary codes on a model in memory: attached beside its weights, which stay as they are, and detached."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kabrn_dist.adapters.adapter import CodePatch
from kabrn_dist.inference.checkpoint_weights import distinct_scales
from kabrn_dist.inference.frozen_codes import FrozenCodes
from kabrn_dist.inference.stored_codes import StoredCodes
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.ops.packing import pack, unpack
from kabrn_dist.ops.weight_quant import TernaryMatrices, TernaryModule, TernarySource
from kabrn_dist.utils.errors import UserError


class PatchedCodes(StoredCodes):
    """The codes of a parameter with a patch.

    Args:
        parameter: The latents, which do not change.
        packed: uint8, the patched codes (`pack`).
        scales: fp32 [E,S], the patched scales.
        scale_group_size: Outputs that share a scale; None for all of a matrix.
        source: Where the codes without the patch come from; None if they are rounded from the parameter.

    Attributes:
        source: As given.
    """

    def __init__(
        self,
        parameter: nn.Parameter,
        packed: Tensor,
        scales: Tensor,
        scale_group_size: int | None,
        source: TernarySource | None,
    ) -> None:
        super().__init__(parameter, packed, scales, scale_group_size)
        self.source = source


def list_matrices(model: MixKABRN) -> dict[str, TernaryMatrices]:
    """Return what a model multiplies by, by the names of the parameters of its mixers and experts.

    Args:
        model: A full model in this process.
    """
    table = model.parameter_table()
    return {name: read_matrices(model, name) for name, info in table.items() if info.role == "matrix"}


def read_matrices(model: MixKABRN, name: str) -> TernaryMatrices:
    """Return what a model multiplies by in place of a parameter, without the low-rank factors beside it."""
    module, leaf = _find_module(model, name)
    return module.matrices(leaf)._replace(low_rank=None)


@torch.no_grad()
def attach_patches(model: MixKABRN, bases: Mapping[str, TernaryMatrices], patches: Mapping[str, CodePatch]) -> None:
    """Make a model compute with patched codes and scales.

    Args:
        model: A model without patches, of which all parameters are in this process.
        bases: Its own codes and scales (`list_matrices`).
        patches: By the names of parameters.

    Raises:
        UserError: for a patch that does not fit, before anything is attached.
    """
    group = model.config.scale_group_size
    for name, patch in patches.items():
        if name not in bases:
            raise UserError(f"{name!r}: no parameter of this model, which the adapter changes; copy the adapter again")
        _check_fit(name, patch, bases[name], group)
    for name, patch in patches.items():
        module, leaf = _find_module(model, name)
        parameter, source = module.get_parameter(leaf), module.sources.get(leaf)
        packed = bases[name].packed
        assert packed is not None
        patched: TernarySource = PatchedCodes(
            parameter,
            patch_packed(packed, patch.places, patch.steps),
            torch.from_numpy(patch.scales).to(parameter.device),
            group,
            source,
        )
        module.sources[leaf] = FrozenCodes(module, patched) if isinstance(source, FrozenCodes) else patched


def patch_packed(packed: Tensor, places: NDArray[np.int64], steps: NDArray[np.uint8]) -> Tensor:
    """Apply a patch to packed codes where they lie, without unpacking those that stay.

    Args:
        packed: uint8 (`pack`), which is not changed.
        places: int64 [n], ascending.
        steps: uint8 [n], 1 or 2.
    """
    patched = np.array(packed.cpu().numpy())
    # A block of 64 codes has 16 bytes: code i is the field i // 16 of byte i % 16.
    shifts, bytes_ = (places >> 4 & 3).astype(np.uint8) * 2, (places >> 6 << 4) + (places & 15)
    codes = patched[bytes_] >> shifts & 3
    # Fields of one byte change apart from each other.
    np.bitwise_xor.at(patched, bytes_, (codes ^ (codes + steps) % 3) << shifts)
    return torch.from_numpy(patched).to(packed.device)


def patch_packed_naive(packed: Tensor, places: NDArray[np.int64], steps: NDArray[np.uint8]) -> Tensor:
    """Apply a patch as `patch_packed` does, by unpacking all codes."""
    codes = unpack(packed, (4 * len(packed),), torch.int8)
    for place, step in zip(places.tolist(), steps.tolist(), strict=True):
        codes[place] = (codes[place] + 1 + step) % 3 - 1
    return pack(codes)


def detach_patches(model: MixKABRN) -> None:
    """Make a model compute with its own codes again. What `freeze_codes` froze stays frozen."""
    for module in model.modules():
        if isinstance(module, TernaryModule):
            for leaf, source in list(module.sources.items()):
                base = _without_patch(module, source)
                if base is None:
                    del module.sources[leaf]
                else:
                    module.sources[leaf] = base


def _without_patch(module: TernaryModule, source: TernarySource) -> TernarySource | None:
    """The source that a patch was attached to; the same source if there is none."""
    if isinstance(source, PatchedCodes):
        return source.source
    if not (isinstance(source, FrozenCodes) and isinstance(source.source, PatchedCodes)):
        return source
    base = source.source.source
    return base if isinstance(base, FrozenCodes) else FrozenCodes(module, base)


def _find_module(model: MixKABRN, name: str) -> tuple[TernaryModule, str]:
    prefix, _, leaf = name.rpartition(".")
    module = model.get_submodule(prefix)
    assert isinstance(module, TernaryModule)
    return module, leaf


def _check_fit(name: str, patch: CodePatch, base: TernaryMatrices, group: int | None) -> None:
    if base.packed is None:
        raise UserError(f"{name!r}: is not ternary here, and the adapter changes codes; name another model")
    scales = distinct_scales(base.gamma, group).cpu().numpy()
    if patch.shape != tuple(base.latents.shape) or patch.scales.shape != scales.shape:
        raise UserError(
            f"{name!r}: is {tuple(base.latents.shape)} with {scales.shape} scales, in the adapter {patch.shape} with "
            f"{patch.scales.shape}; copy the adapter again"
        )
    if not np.array_equal(scales, patch.base_scales):
        raise UserError(f"{name!r}: has other scales than the adapter says; copy the adapter again")
