"""Exports with an adapter in their weights: the bits of the model with the adapter beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.inference.adapters import hash_model_codes, set_adapters
from kabrn_dist.inference.export import lay_out_export, list_ternary, write_export
from kabrn_dist.inference.load import load_export
from kabrn_dist.inference.loaded_weights import LoadedWeights
from kabrn_dist.inference.make_adapter import collect_adapter
from kabrn_dist.inference.merged_export import plan_merged_export
from kabrn_dist.model.adapter import AdapterSpec
from kabrn_dist.ops.weight_quant import TernaryModule
from kabrn_dist.runtime.file_plan import Packing
from kabrn_dist.runtime.model_file import read_model_file
from kabrn_dist.runtime.pack import pack_folder
from kabrn_dist.runtime.patch_file import patch_model_file
from kabrn_dist.utils.errors import UserError
from tests.inference.test_adapters import SPECS, logits, make_base, train_adapter
from tests.support.models import make_model_config

PLAIN = ("model.quantize=false",)
PLAIN_SPECS = {
    "ternary": AdapterSpec("lora", 2, 4.0, ("router", "head")),
    "plain": AdapterSpec("lora", 4, 8.0, ("mixer", "up", "head")),
}


def write_base(out: Path, *overrides: str) -> Path:
    """Write an export of the base, without a run."""
    config, weights = make_model_config("model.layers=RAR", *overrides), LoadedWeights(make_base(*overrides), {})
    plan = lay_out_export(config, out, 7, Tokenizer.of_bytes(), weights, weights.dtypes, list_ternary(config, weights))
    write_export(plan, out)
    return out


@pytest.mark.parametrize("overrides", [(), ("model.scale_group_size=7",), ("model.experts.type=relu2",)])
def test_a_merged_patch_is_the_patched_model(overrides: tuple[str, ...], tmp_path: Path) -> None:
    base, spec = write_base(tmp_path / "base", *overrides), SPECS["ternary_lora"]
    adapter = collect_adapter(train_adapter(spec, 3, *overrides), spec, "a", 1)
    assert hash_model_codes(load_export(base)[0]) == adapter.info.base_sha256
    write_export(plan_merged_export(base, adapter), tmp_path / "merged")
    merged, reference = load_export(tmp_path / "merged")[0], load_export(base)[0]
    assert not torch.equal(logits(merged), logits(reference))
    set_adapters(reference, [(adapter, 1)])
    assert torch.equal(logits(merged), logits(reference))
    assert hash_model_codes(merged) == adapter.info.result_sha256 and merged.routers.step == 7
    # Training goes on from the latents, which are rounded to the same.
    for module in merged.modules():
        if isinstance(module, TernaryModule):
            module.sources.clear()
    assert torch.equal(logits(merged), logits(reference)) and hash_model_codes(merged) == adapter.info.result_sha256
    # The runtime's file of it holds what the patched file of the base holds.
    pack_folder(base, tmp_path / "base.mkb", Packing())
    patch_model_file(tmp_path / "base.mkb", adapter, tmp_path / "patched.mkb")
    pack_folder(tmp_path / "merged", tmp_path / "merged.mkb", Packing())
    assert (tmp_path / "patched.mkb").read_bytes() == (tmp_path / "merged.mkb").read_bytes()
    assert read_model_file(tmp_path / "merged.mkb").header["codes_sha256"].hex() == adapter.info.result_sha256


@pytest.mark.parametrize(("kind", "overrides"), [("ternary", ()), ("plain", PLAIN)])
def test_factors_of_plain_matrices_are_added_to_them(kind: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    base, spec = write_base(tmp_path / "base", *overrides), PLAIN_SPECS[kind]
    adapter = collect_adapter(train_adapter(spec, 3, *overrides), spec, "a", 1)
    write_export(plan_merged_export(base, adapter), tmp_path / "merged")
    merged, reference = load_export(tmp_path / "merged")[0], load_export(base)[0]
    before = logits(reference)
    for name, (a, b) in adapter.low_ranks.items():
        expected = reference.get_parameter(name) + torch.from_numpy(b @ a).view(reference.get_parameter(name).shape)
        assert torch.allclose(merged.get_parameter(name), expected, atol=1e-6) and len(adapter.low_ranks) > 1
    set_adapters(reference, [(adapter, 1)])
    assert torch.allclose(logits(merged), logits(reference), atol=1e-3)
    assert not torch.allclose(before, logits(reference), atol=1e-2)


def test_what_weights_cannot_hold_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    for method, message in (("lora", "finetune.method ternary_lora, which can be merged"), ("state", "--adapter")):
        spec = SPECS[method]
        with pytest.raises(UserError) as error:
            plan_merged_export(base, collect_adapter(train_adapter(spec), spec, "a", 1))
        assert message in str(error.value) and "\n" not in str(error.value)
