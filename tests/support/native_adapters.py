"""Adapters with random contents for model files of the C runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kabrn_dist.adapters.adapter import Adapter, AdapterInfo, AdapterMethod, LowRankFactors, StateFactors
from kabrn_dist.adapters.code_patch import make_patch
from kabrn_dist.runtime.adapter_file import name_matrices, write_adapter_file
from kabrn_dist.runtime.file_format import find_role
from kabrn_dist.runtime.model_file import ModelFile, read_model_file


def make_native_info(model: ModelFile, method: AdapterMethod, rank: int = 3) -> AdapterInfo:
    """Return what an adapter of a model file says about itself."""
    result = "e" * 64 if method == "ternary_lora" else ""
    return AdapterInfo("café", method, rank, 6.0, ("mixer", "routed"), model.header["codes_sha256"].hex(), result, 12)


def draw_low_ranks(
    model: ModelFile, seed: int = 0, rank: int = 3, leave_out: tuple[str, ...] = (), size: float = 0.2
) -> Adapter:
    """Return factors beside every matrix of a model file whose name has none of `leave_out` in it.

    Args:
        model: The file.
        seed: Of the random numbers.
        rank: R, or less for smaller matrices.
        leave_out: Parts of names.
        size: What B·(A·x) has for an x of unit size.
    """
    random = np.random.default_rng(seed)
    low_ranks = {}
    for name, tensor in name_matrices(model).items():
        if any(part in name for part in leave_out):
            continue
        used = min(rank, tensor.rows, tensor.columns)
        a = random.normal(size=(tensor.matrices, used, tensor.columns)) / tensor.columns**0.5
        b = random.normal(size=(tensor.matrices, tensor.rows, used)) * size / used**0.5
        low_ranks[name] = LowRankFactors(a.astype(np.float32), b.astype(np.float32))
    return Adapter(make_native_info(model, "lora", rank), low_ranks=low_ranks)


def draw_states(model: ModelFile, seed: int = 0, rank: int = 3) -> Adapter:
    """Return initial states of every layer of retention of a model file."""
    random = np.random.default_rng(seed)
    heads, key, value = (model.header[field] for field in ("num_heads", "key_dim", "value_dim"))
    states = {
        layer: StateFactors(
            random.normal(size=(heads, rank, key)).astype(np.float32),
            random.normal(size=(heads, rank, value)).astype(np.float32),
        )
        for layer, kind in enumerate(model.layers)
        if kind == "R"
    }
    return Adapter(make_native_info(model, "state", rank), states=states)


def patch_between(model: ModelFile, other: ModelFile) -> Adapter:
    """Return the patch that makes the ternary codes and scales of a model file those of another one."""
    patches = {}
    for name, tensor in name_matrices(model).items():
        role = find_role(tensor.role) or ""
        before, after = model.read(role, tensor.layer), other.read(role, tensor.layer)
        if tensor.role >= 16 and before.codes is not None and after.codes is not None:
            assert before.scales is not None and after.scales is not None
            patches[name] = make_patch(before.codes, before.scales, after.codes, after.scales)
    return Adapter(make_native_info(model, "ternary_lora"), patches=patches)


def flip_codes(model: ModelFile, seed: int = 0, share: float = 0.05) -> Adapter:
    """Return a patch of a share of all ternary codes of a model file, with other scales; empty for a plain model."""
    random = np.random.default_rng(seed)
    patch = patch_between(model, model)
    for name, each in patch.patches.items():
        places = np.flatnonzero(random.random(np.prod(each.shape)) < share)
        steps = random.integers(1, 3, len(places)).astype(np.uint8)
        scales = each.base_scales * np.float32(1.1)
        patch.patches[name] = each._replace(places=places, steps=steps, scales=scales)
    return patch


def write_adapters(path: Path) -> None:
    """Write an adapter of each method for a model file, with names that follow its own."""
    model = read_model_file(path)
    for adapter in (draw_low_ranks(model), draw_states(model), flip_codes(model)):
        write_adapter_file(adapter, model, path.with_name(f"{path.name}.{adapter.info.method}.mka"))
