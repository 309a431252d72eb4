"""Tensors and texts of an adapter's file, untrusted, turned into an `Adapter`; a ValueError says what is wrong.

Shapes: as in adapter.py.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from math import prod
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import NDArray

from kabrn_dist.adapters.adapter import Adapter, AdapterInfo, AdapterMethod, CodePatch, LowRankFactors, StateFactors
from kabrn_dist.adapters.code_patch import PackedPlaces, unpack_places

LARGEST_RANK, LARGEST_ALPHA, LARGEST_STEP = 2**16, 1e9, 10**15
# Of a parameter, a target or a name.
LONGEST_TEXT, _TARGETS = 1000, 10_000
# Larger than any parameter; sums of places stay far below the end of int64.
_LARGEST_PARAMETER = 2**50
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = r"base_model\.model\.(?P<name>[A-Za-z0-9_.]{1,200})"
_LOW_RANK = re.compile(_NAME + r"\.lora_(?P<part>[AB])\.weight")
_STATE = re.compile(r"base_model\.model\.blocks\.(?P<name>0|[1-9][0-9]{0,5})\.mixer\.state_(?P<part>key|value)")
_PATCH = re.compile(_NAME + r"\.patch_(?P<part>shape|gaps|steps|scales|base_scales)")
_PATTERNS: dict[AdapterMethod, re.Pattern[str]] = {"lora": _LOW_RANK, "state": _STATE, "ternary_lora": _PATCH}
_PARTS = {
    "lora": {"A", "B"},
    "state": {"key", "value"},
    "ternary_lora": {"shape", "gaps", "steps", "scales", "base_scales"},
}


def parse_info(metadata: Mapping[str, str]) -> AdapterInfo:
    """Return what an adapter says about itself.

    Args:
        metadata: Texts of the file's header.

    Raises:
        ValueError: for a text that is missing or means nothing.
    """
    version = metadata.get("adapter_format")
    if version is None:
        raise ValueError("its header has no adapter_format, so it is none of MixKABRN's, which name their base by hash")
    if version != "1":
        raise ValueError(f"adapter_format is {version[:20]!r}, of a newer MixKABRN; update it")
    method = metadata.get("method", "")
    if method not in get_args(AdapterMethod):
        raise ValueError(f"method is {method[:80]!r}, none of {', '.join(get_args(AdapterMethod))}")
    base, result = metadata.get("base_sha256", ""), metadata.get("result_sha256", "")
    if not _SHA256.fullmatch(base) or ((result or method == "ternary_lora") and not _SHA256.fullmatch(result)):
        raise ValueError("base_sha256 or result_sha256 is no sha256")
    return AdapterInfo(
        name=_parse_text(metadata.get("name", ""), "name"),
        method=cast(AdapterMethod, method),
        rank=_parse_count(metadata.get("rank", ""), "rank", 1, LARGEST_RANK),
        alpha=_parse_alpha(metadata.get("alpha", "")),
        targets=_parse_targets(metadata.get("targets", "[]")),
        base_sha256=base,
        result_sha256=result,
        steps=_parse_count(metadata.get("steps", "0"), "steps", 0, LARGEST_STEP),
        base_name=_parse_text(metadata.get("base_name", ""), "base_name"),
    )


def clean_text(text: str) -> str:
    """Return a name, such as that of a folder, as an adapter may say it: of bounded length, and printable."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)[-LONGEST_TEXT:]


def parse_tensors(info: AdapterInfo, tensors: Mapping[str, NDArray[Any]]) -> Adapter:
    """Return the adapter that the tensors of a file make.

    Args:
        info: What it says about itself.
        tensors: By their names in the file.

    Raises:
        ValueError: for names, shapes, dtypes or values that no adapter of this method has.
    """
    groups: dict[str, dict[str, NDArray[Any]]] = defaultdict(dict)
    for key, values in tensors.items():
        found = _PATTERNS[info.method].fullmatch(key)
        if found is None:
            raise ValueError(f"tensor {key[:80]!r} is none that an adapter of method {info.method} has")
        groups[found["name"]][found["part"]] = values
    for name, parts in groups.items():
        if set(parts) != _PARTS[info.method]:
            raise ValueError(f"{name}: has {', '.join(sorted(parts))} and not {', '.join(sorted(_PARTS[info.method]))}")
    if not groups and info.method != "ternary_lora":
        raise ValueError("it holds no tensors")
    adapter = Adapter(info)
    for name, parts in groups.items():
        if info.method == "lora":
            stacked = parts["A"].ndim == 3
            adapter.low_ranks[name if stacked else f"{name}.weight"] = _parse_low_rank(name, parts, info)
        elif info.method == "state":
            adapter.states[int(name)] = _parse_state(name, parts)
        else:
            adapter.patches[name] = _parse_patch(name, parts)
    return adapter


def _parse_low_rank(name: str, parts: dict[str, NDArray[Any]], info: AdapterInfo) -> LowRankFactors:
    a, b = (_as_factors(f"{name}.lora_{part}", parts[part]) for part in "AB")
    if a.ndim != b.ndim or a.ndim not in (2, 3):
        raise ValueError(f"{name}: lora_A is {a.shape} and lora_B {b.shape}, not [R,I] and [O,R], or stacks of them")
    a, b = (values.reshape(-1, *values.shape[-2:]) for values in (a, b))
    if len(a) != len(b) or (a.shape[1], b.shape[2]) != (info.rank, info.rank):
        raise ValueError(
            f"{name}: lora_A is {a.shape} and lora_B {b.shape}, which do not fit each other at rank {info.rank}"
        )
    scaling = info.alpha / info.rank
    with np.errstate(over="ignore"):
        scaled = (b * scaling).astype(np.float32)
    return LowRankFactors(a, _as_factors(f"{name}.lora_B", scaled))


def _parse_state(name: str, parts: dict[str, NDArray[Any]]) -> StateFactors:
    key, value = (_as_factors(f"state_{part} of layer {name}", parts[part]) for part in ("key", "value"))
    if key.ndim != 3 or value.ndim != 3 or key.shape[:2] != value.shape[:2]:
        raise ValueError(
            f"layer {name}: state_key is {key.shape} and state_value {value.shape}, not [H,R,K] and [H,R,V]"
        )
    return StateFactors(key, value)


def _parse_patch(name: str, parts: dict[str, NDArray[Any]]) -> CodePatch:
    dtypes = {part: values.dtype.str for part, values in parts.items()}
    if dtypes != {"shape": "<i8", "gaps": "|u1", "steps": "|u1", "scales": "<f4", "base_scales": "<f4"}:
        raise ValueError(f"{name}: a part of its patch has another dtype, of {dtypes}")
    sizes = tuple(parts["shape"].reshape(-1).tolist())
    if len(sizes) != 3 or min(sizes) < 1 or prod(sizes) > _LARGEST_PARAMETER:
        raise ValueError(f"{name}: patch_shape is {sizes[:8]}, not [E,O,I]")
    scales, base_scales = parts["scales"], parts["base_scales"]
    if scales.ndim != 2 or scales.shape != base_scales.shape or len(scales) != sizes[0]:
        raise ValueError(f"{name}: scales are {scales.shape} and {base_scales.shape} for a parameter of {sizes}")
    if not 1 <= scales.shape[1] <= sizes[1]:
        raise ValueError(f"{name}: {scales.shape[1]} scales of a matrix of {sizes[1]} rows")
    for each in (scales, base_scales):
        if not (np.isfinite(each) & (each > 0)).all():
            raise ValueError(f"{name}: scales that are not positive and finite")
    packed = PackedPlaces(parts["gaps"].reshape(-1), parts["steps"].reshape(-1))
    try:
        places, steps = unpack_places(packed, sizes)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return CodePatch(sizes, places, steps, scales, base_scales)


def _as_factors(name: str, values: NDArray[Any]) -> NDArray[np.float32]:
    if values.dtype.kind != "f":
        raise ValueError(f"{name} is {values.dtype.name}, and factors are fp32 or fp16")
    if not values.size:
        raise ValueError(f"{name} is {values.shape}, which holds nothing")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds numbers that are not finite")
    return values.astype(np.float32)


def _parse_text(text: str, key: str) -> str:
    # It is shown in terminals.
    if len(text) > LONGEST_TEXT or not text.isprintable():
        raise ValueError(f"{key} has {len(text)} characters, or some that cannot be printed")
    return text


def _parse_count(text: str, key: str, least: int, most: int) -> int:
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 19 else -1
    if not least <= value <= most:
        raise ValueError(f"{key} is {text[:20]!r}, not a number from {least} to {most}")
    return value


def _parse_alpha(text: str) -> float:
    try:
        alpha = float(text) if len(text) < 40 else math.nan
    except ValueError:
        alpha = math.nan
    if not 0 < alpha <= LARGEST_ALPHA:
        raise ValueError(f"alpha is {text[:20]!r}, not a positive number up to {LARGEST_ALPHA:g}")
    return alpha


def _parse_targets(text: str) -> tuple[str, ...]:
    try:
        targets = json.loads(text)
    except (ValueError, RecursionError):
        targets = None
    if not isinstance(targets, list) or len(targets) > _TARGETS or not all(isinstance(t, str) for t in targets):
        raise ValueError(f"targets is {text[:40]!r}, not a list of names")
    return tuple(_parse_text(target, "targets") for target in targets)
