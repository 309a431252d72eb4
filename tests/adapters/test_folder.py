"""Adapters' files: what is written is read, in PEFT's names, and a stranger's file is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from kabrn_dist.adapters.adapter import Adapter, AdapterMethod
from kabrn_dist.adapters.codes_hash import CodesHash
from kabrn_dist.adapters.folder import ADAPTER_NAME, read_adapter, write_adapter
from kabrn_dist.utils.errors import UserError
from tests.support.adapters import SINGLE, STACKED, make_adapter_of

METHODS: list[AdapterMethod] = ["lora", "ternary_lora", "state"]


def assert_same(left: Adapter, right: Adapter, tolerance: float = 0) -> None:
    assert left.info == right.info
    for field in ("low_ranks", "patches", "states"):
        ours, theirs = getattr(left, field), getattr(right, field)
        assert set(ours) == set(theirs)
        for name, values in ours.items():
            for part, expected in zip(theirs[name], values, strict=True):
                assert np.asarray(part).dtype == np.asarray(expected).dtype
                assert np.allclose(part, expected, rtol=tolerance, atol=tolerance), (name, field)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_survives_its_files(method: AdapterMethod, tmp_path: Path) -> None:
    adapter = make_adapter_of(method)
    write_adapter(adapter, tmp_path / "a" / "b")
    assert_same(adapter, read_adapter(tmp_path / "a" / "b"))
    assert_same(adapter, read_adapter(tmp_path / "a" / "b" / ADAPTER_NAME))
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["adapter_config.json", ADAPTER_NAME]
    write_adapter(make_adapter_of(method, seed=1), tmp_path / "a" / "b")
    assert_same(make_adapter_of(method, seed=1), read_adapter(tmp_path / "a" / "b"))


@pytest.mark.parametrize("method", METHODS)
def test_in_fp16_factors_are_rounded_and_patches_are_not(method: AdapterMethod, tmp_path: Path) -> None:
    adapter = make_adapter_of(method)
    write_adapter(adapter, tmp_path / "half", "fp16")
    assert_same(adapter, read_adapter(tmp_path / "half"), 0 if method == "ternary_lora" else 2e-3)


def test_a_scaling_that_is_no_power_of_two_costs_a_rounding(tmp_path: Path) -> None:
    adapter = make_adapter_of("lora", rank=3, alpha=10)
    write_adapter(adapter, tmp_path / "a")
    assert_same(adapter, read_adapter(tmp_path / "a"), 1e-6)


def test_names_and_configuration_are_those_of_peft(tmp_path: Path) -> None:
    adapter = make_adapter_of("lora")
    write_adapter(adapter, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / ADAPTER_NAME)
    single, stacked = "base_model.model.blocks.0.mixer.inputs.query", f"base_model.model.{STACKED}"
    assert set(tensors) == {f"{name}.lora_{part}.weight" for name in (single, stacked) for part in "AB"}
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    assert config["target_modules"] == ["blocks.0.mixer.inputs.query"]
    # As PEFT adds it: alpha / r times B·A.
    a, b = tensors[f"{single}.lora_A.weight"], tensors[f"{single}.lora_B.weight"]
    ours = adapter.low_ranks[SINGLE]
    assert np.allclose(8 / 4 * b @ a, ours.b[0] @ ours.a[0], rtol=1e-5, atol=1e-6)
    with safe_open(tmp_path / "a" / ADAPTER_NAME, "np") as file:
        assert file.metadata()["base_sha256"] == "5" * 64


def test_factors_beyond_fp16_are_refused(tmp_path: Path) -> None:
    adapter = make_adapter_of("lora")
    adapter.low_ranks[SINGLE].a[0, 0, 0] = 1e6
    with pytest.raises(UserError, match="beyond fp16; write the adapter in fp32"):
        write_adapter(adapter, tmp_path / "a", "fp16")
    assert not (tmp_path / "a").exists()


Change = Callable[[dict[str, Any], dict[str, str]], object]
GAPS, QUERY = f"base_model.model.{STACKED}.patch_gaps", "base_model.model.blocks.0.mixer.inputs.query"


def set_tensor(name: str, change: Callable[[Any], Any]) -> Change:
    return lambda tensors, metadata: tensors.update({name: change(tensors[name])})


def set_text(key: str, value: str) -> Change:
    return lambda tensors, metadata: metadata.update({key: value})


def with_nan(values: Any) -> Any:
    changed = values.copy()
    changed.flat[-1] = np.nan
    return changed


BAD: dict[str, tuple[AdapterMethod, Change, str]] = {
    "of PEFT itself": ("lora", lambda tensors, metadata: metadata.pop("adapter_format"), "none of MixKABRN's"),
    "a newer format": ("lora", set_text("adapter_format", "2"), "newer MixKABRN; update it"),
    "another method": ("lora", set_text("method", "ia3"), "method is 'ia3', none of lora"),
    "tensors of another method": ("lora", set_text("method", "state"), "none that an adapter of method state has"),
    "no hash": ("state", set_text("base_sha256", "5" * 63), "is no sha256"),
    "no result": ("ternary_lora", set_text("result_sha256", ""), "is no sha256"),
    "rank 0": ("lora", set_text("rank", "0"), "rank is '0', not a number from 1"),
    "a rank of digits": ("lora", set_text("rank", "9" * 5000), "rank is '9999"),
    "another rank": ("lora", set_text("rank", "5"), "do not fit each other at rank 5"),
    "alpha": ("lora", set_text("alpha", "nan"), "alpha is 'nan', not a positive number"),
    "no list": ("lora", set_text("targets", '{"a": 1}'), "targets is"),
    "a deep list": ("lora", set_text("targets", "[" * 100_000), "targets is"),
    "a name for terminals": ("lora", set_text("name", "\x1b[2J"), "cannot be printed"),
    "one factor": ("lora", lambda tensors, metadata: tensors.pop(f"{QUERY}.lora_A.weight"), "has B and not A, B"),
    "whole numbers": ("lora", set_tensor(f"{QUERY}.lora_A.weight", lambda a: a.astype(np.int64)), "factors are fp32"),
    "wide numbers": ("lora", set_tensor(f"{QUERY}.lora_A.weight", lambda a: a.astype(np.float64)), "is F64, none of"),
    "NaN": ("lora", set_tensor(f"{QUERY}.lora_B.weight", with_nan), "not finite"),
    "a vector": ("lora", set_tensor(f"{QUERY}.lora_B.weight", lambda b: b.reshape(-1)), "not [R,I] and [O,R]"),
    "nothing": ("lora", lambda tensors, metadata: tensors.clear(), "holds no tensors"),
    "an empty factor": ("lora", set_tensor(f"{QUERY}.lora_B.weight", lambda b: b[:0]), "which holds nothing"),
    "states of other heads": (
        "state",
        set_tensor("base_model.model.blocks.12.mixer.state_value", lambda v: v[:1]),
        "state_key is (2, 4, 5)",
    ),
    "NaN in a state": ("state", set_tensor("base_model.model.blocks.0.mixer.state_key", with_nan), "not finite"),
    "a place too far": ("ternary_lora", set_tensor(GAPS, lambda g: np.append(g, g)), "of 10500 codes"),
    "a bomb of gaps": (
        "ternary_lora",
        set_tensor(GAPS, lambda g: np.full(1_000_000, 255, np.uint8)),
        "gaps that lead to no place",
    ),
    "a shape": ("ternary_lora", set_tensor(GAPS.replace("gaps", "shape"), lambda s: s * 2**40), "not [E,O,I]"),
    "a scale of 0": ("ternary_lora", set_tensor(GAPS.replace("gaps", "scales"), lambda s: s * 0), "not positive"),
    "half scales": (
        "ternary_lora",
        set_tensor(GAPS.replace("gaps", "scales"), lambda s: s.astype(np.float16)),
        "another dtype",
    ),
    "scales of other matrices": (
        "ternary_lora",
        set_tensor(GAPS.replace("gaps", "base_scales"), lambda s: s[:2]),
        "scales are (3, 10) and (2, 10)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_is_none_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    method, change, message = BAD[case]
    write_adapter(make_adapter_of(method), tmp_path)
    file = tmp_path / ADAPTER_NAME
    with safe_open(file, "np") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors, metadata)
    save_file(tensors, file, metadata)
    with pytest.raises(UserError) as error:
        read_adapter(tmp_path)
    assert message in str(error.value) and str(file) in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500 and "\x1b" not in str(error.value)


def test_a_missing_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file; name the folder of an adapter"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_no_change_of_bytes_does_more_than_be_refused(method: AdapterMethod, tmp_path: Path) -> None:
    """Whatever the bytes are, there is an adapter or one line; a few thousand changes, in the header for the most."""
    write_adapter(make_adapter_of(method), tmp_path)
    file = tmp_path / ADAPTER_NAME
    content, random = file.read_bytes(), np.random.default_rng(7)
    header, refused = int.from_bytes(content[:8], "little") + 8, 0
    for _ in range(1200):
        damaged = bytearray(content)
        kind = random.integers(5)
        for place in random.integers(0, header if random.random() < 0.7 else len(content), random.integers(1, 4)):
            damaged[place] = random.integers(32, 127) if place < header and kind else random.integers(256)
        if kind == 1:
            damaged = damaged[: random.integers(len(damaged))]
        file.write_bytes(damaged)
        try:
            read_adapter(file)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 600


def test_a_hash_does_not_depend_on_the_order_and_on_everything_else() -> None:
    random = np.random.default_rng(0)
    codes, scales = random.integers(-1, 2, (2, 3, 4)).astype(np.int8), random.random((2, 1)).astype(np.float32)
    plain = random.random((1, 5, 4)).astype(np.float32)

    def hash_of(*names: str, codes: Any = codes, scales: Any = scales, plain: Any = plain) -> str:
        total = CodesHash()
        for name in names:
            if name.startswith("p"):
                total.add_plain(name, plain)
            else:
                total.add_ternary(name, codes, scales)
        return total.hexdigest()

    first = hash_of("a", "b", "p")
    assert hash_of("p", "b", "a") == first and hash_of("a", "c", "p") != first and hash_of("a", "b") != first
    assert hash_of("a", "b", "p", codes=codes.transpose(0, 2, 1)) != first
    assert hash_of("a", "b", "p", codes=np.asfortranarray(codes)) == first
    assert hash_of("a", "b", "p", scales=np.nextafter(scales, np.float32(2))) != first
    # Exports hold plain matrices in bf16.
    assert hash_of("a", "b", "p", plain=plain * np.float32(1.1)) != first


def test_a_plain_matrix_is_hashed_as_torch_rounds_it_to_bf16() -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).normal(size=(1, 40, 50)).astype(np.float32)
    rounded, exact = CodesHash(), CodesHash()
    exact.add_plain("w", values)
    rounded.add_plain("w", torch.from_numpy(values).bfloat16().float().numpy())
    assert rounded.hexdigest() == exact.hexdigest()


def test_what_an_adapter_says_is_what_it_was_told(tmp_path: Path) -> None:
    adapter = make_adapter_of("state")
    info = replace(adapter.info, name="", alpha=1 / 3, targets=(), steps=0, base_name="")
    write_adapter(replace(adapter, info=info), tmp_path)
    assert read_adapter(tmp_path).info == info
