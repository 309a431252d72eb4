"""Adapters as folders, as PEFT lays them out where it has a name for a thing; docs/adapters.md describes them.

Shapes: as in adapter.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kabrn_dist.adapters.adapter import Adapter, AdapterInfo
from kabrn_dist.adapters.code_patch import pack_places
from kabrn_dist.adapters.parse import parse_info, parse_tensors
from kabrn_dist.adapters.tensor_file import read_tensors, write_tensors
from kabrn_dist.utils.atomic_io import atomic_write, make_folder
from kabrn_dist.utils.errors import UserError

ADAPTER_NAME, ADAPTER_CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"
ADAPTER_FORMAT = 1
# PEFT's name for the model that it wraps.
TENSOR_PREFIX = "base_model.model."
MATRIX_SUFFIX = ".weight"


def read_adapter(path: Path | str) -> Adapter:
    """Read an adapter of a stranger: everything in it is checked.

    Args:
        path: Its folder, or the .safetensors file, which is all that is needed.

    Raises:
        UserError: for one that is missing or damaged, or says what no adapter can be.
    """
    path = Path(path)
    # Unlike `Path.exists`, these take names that no file can have.
    file = path / ADAPTER_NAME if os.path.isdir(path) else path
    if not os.path.exists(file):
        raise UserError(f"{file}: no such file; name the folder of an adapter, or its {ADAPTER_NAME}")
    tensors, metadata = read_tensors(file)
    try:
        info = parse_info(metadata)
        return parse_tensors(info, tensors)
    except ValueError as error:
        raise UserError(f"{file}: not an adapter to trust: {error}; use another one") from None


def write_adapter(adapter: Adapter, folder: Path, dtype: Literal["fp32", "fp16"] = "fp32") -> None:
    """Write an adapter's folder; each of its two files appears whole or not at all.

    Args:
        adapter: The adapter.
        folder: Made if it is not there; an adapter in it is replaced.
        dtype: Of the factors; patches are the same bits in either.

    Raises:
        UserError: for factors beyond fp16, and if the disk refuses.
    """
    kind = np.dtype("<f2" if dtype == "fp16" else "<f4")
    tensors = dict(_list_tensors(adapter, kind))
    for name, values in tensors.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise UserError(f"{name}: holds numbers beyond {dtype}; write the adapter in fp32, or train it again")
    metadata = _encode_info(adapter.info)
    try:
        parse_info(metadata)
    except ValueError as error:
        raise UserError(f"{folder}: no adapter that could be read again: {error}; change it") from None
    make_folder(folder)
    content = json.dumps(_peft_config(adapter), indent=2) + "\n"
    atomic_write(folder / ADAPTER_CONFIG_NAME, content.encode())
    # Last, since it is all that a reader needs: where the disk refuses, the adapter is the one before.
    write_tensors(folder / ADAPTER_NAME, tensors, metadata)


def _list_tensors(adapter: Adapter, kind: np.dtype[Any]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Names and values of the file's tensors."""
    scaling = adapter.info.alpha / adapter.info.rank
    for name, (a, b) in adapter.low_ranks.items():
        place = TENSOR_PREFIX + name.removesuffix(MATRIX_SUFFIX)
        # PEFT multiplies by alpha / rank.
        factors = {"A": a, "B": (b / scaling).astype(np.float32)}
        for letter, values in factors.items():
            yield f"{place}.lora_{letter}.weight", _cast(values[0] if name.endswith(MATRIX_SUFFIX) else values, kind)
    for layer, state in adapter.states.items():
        for part, values in state._asdict().items():
            yield f"{TENSOR_PREFIX}blocks.{layer}.mixer.state_{part}", _cast(values, kind)
    for name, patch in adapter.patches.items():
        gaps, step_bits = pack_places(patch)
        parts = {"shape": np.array(patch.shape, "<i8"), "gaps": gaps, "steps": step_bits}
        parts |= {"scales": patch.scales.astype("<f4"), "base_scales": patch.base_scales.astype("<f4")}
        yield from ((f"{TENSOR_PREFIX}{name}.patch_{part}", values) for part, values in parts.items())


def _cast(values: NDArray[np.float32], kind: np.dtype[Any]) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        return values.astype(kind)


def _encode_info(info: AdapterInfo) -> dict[str, str]:
    return {
        "format": "pt",
        "adapter_format": str(ADAPTER_FORMAT),
        "name": info.name,
        "method": info.method,
        "rank": str(info.rank),
        "alpha": repr(float(info.alpha)),
        "targets": json.dumps(info.targets),
        "base_sha256": info.base_sha256,
        "result_sha256": info.result_sha256,
        "steps": str(info.steps),
        "base_name": info.base_name,
    }


def _peft_config(adapter: Adapter) -> dict[str, Any]:
    """What PEFT reads; patches and states have names of our own there, which it refuses."""
    info = adapter.info
    kinds = {"lora": "LORA", "ternary_lora": "MIXKABRN_TERNARY_LORA", "state": "MIXKABRN_STATE"}
    matrices = [name.removesuffix(MATRIX_SUFFIX) for name in adapter.low_ranks if name.endswith(MATRIX_SUFFIX)]
    return {
        "peft_type": kinds[info.method],
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": info.base_name or None,
        "r": info.rank,
        "lora_alpha": info.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": matrices,
    }
