"""Exports compute with the trainer's ternary codes and scales, in whatever dtype their weights are written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kabrn_dist.inference.export import plan_export, write_export
from kabrn_dist.inference.load import load_export
from kabrn_dist.inference.run import Run
from kabrn_dist.inference.stored_codes import is_code_tensor
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.ops.packing import unpack
from kabrn_dist.ops.weight_quant import TernaryMatrices, TernaryModule
from kabrn_dist.utils.errors import UserError
from tests.inference.test_export import logits
from tests.support.runs import make_shards, run_training, write_small_config


@pytest.fixture(scope="module", params=[None, 7], ids=["one scale", "scale groups"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in fp32; an odd width leaves blocks of codes that hold two matrices."""
    folder = tmp_path_factory.mktemp("codes")
    changes = {"model__scale_group_size": request.param, "model__experts__expert_hidden_size": 20}
    config = write_small_config(
        folder / "run.yaml", make_shards(folder), folder / "run", training__steps=3, model__layers="RA", **changes
    )
    result = run_training(1, "--config", str(config))
    assert result.exit_code == 0, result.output
    return folder / "run"


def list_matrices(model: MixKABRN) -> dict[str, TernaryMatrices]:
    modules = {name: module for name, module in model.named_modules() if isinstance(module, TernaryModule)}
    with torch.no_grad():
        return {f"{name}.{leaf}": module.matrices(leaf) for name, module in modules.items() for leaf in module.stds}


def count_flips(model: MixKABRN, reference: MixKABRN) -> int:
    """Codes that differ. Scales must be equal, bit for bit, if none does."""
    ours, theirs = list_matrices(model), list_matrices(reference)
    flips = sum(int((ours[name].codes(torch.int8) != each.codes(torch.int8)).sum()) for name, each in theirs.items())
    same_scales = all(torch.equal(ours[name].gamma, each.gamma) for name, each in theirs.items())  # type: ignore[arg-type]
    assert same_scales or flips
    return flips


def without_codes(out: Path, target: Path) -> Path:
    """A copy of an export as earlier versions wrote it."""
    shutil.copytree(out, target)
    tensors = {
        name: values for name, values in load_file(out / "model.safetensors").items() if not is_code_tensor(name)
    }
    with safe_open(out / "model.safetensors", "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "data_sha256"}
    save_file(tensors, target / "model.safetensors", metadata)
    return target


def test_a_bf16_export_of_an_fp32_run_has_the_codes_that_rounding_flips(trained: Path, tmp_path: Path) -> None:
    reference, out = Run.open(trained).model(), tmp_path / "out"
    write_export(plan_export(trained, torch.bfloat16), out)
    assert count_flips(load_export(without_codes(out, tmp_path / "old"))[0], reference) > 0
    model, _ = load_export(out)
    assert count_flips(model, reference) == 0
    for name, parameter in reference.named_parameters():
        if name not in list_matrices(reference):
            parameter.data = parameter.data.bfloat16().float()
    assert torch.equal(logits(model), logits(reference))
    assert "NAME.codes" in (out / "README.md").read_text()


def test_an_fp32_export_of_a_bf16_run_has_the_codes_of_the_working_copies(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("precision: fp32", "precision: bf16"))
    reference = Run.open(tmp_path / "run").model()
    write_export(plan_export(tmp_path / "run", torch.float32), tmp_path / "out")
    assert count_flips(load_export(without_codes(tmp_path / "out", tmp_path / "old"))[0], reference) > 0
    assert count_flips(load_export(tmp_path / "out")[0], reference) == 0


def test_codes_lie_as_documented_and_only_where_rounding_needs_them(trained: Path, tmp_path: Path) -> None:
    plain = plan_export(trained)
    assert not plain.has_codes
    export = plan_export(trained, torch.bfloat16, file_bytes=10_000)
    assert export.num_parameters == plain.num_parameters and len(export.files) > 1
    write_export(export, tmp_path / "out")
    tensors: dict[str, Tensor] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        tensors |= load_file(file)
    reference = list_matrices(Run.open(trained).model())
    assert {name.removesuffix(".codes") for name in tensors if name.endswith(".codes")} == set(reference)
    for name, matrices in reference.items():
        codes, packed = matrices.codes(torch.int8), tensors[f"{name}.codes"]
        assert torch.equal(unpack(packed, tuple(codes.shape), torch.int8), codes)
        assert tensors[f"{name}.scales"].dtype == torch.float32
    assert count_flips(load_export(tmp_path / "out")[0], Run.open(trained).model()) == 0


def test_weights_that_are_trained_further_leave_their_stored_codes(trained: Path, tmp_path: Path) -> None:
    write_export(plan_export(trained, torch.bfloat16), tmp_path / "out")
    model, _ = load_export(tmp_path / "out")
    query = model.get_submodule("blocks.0.mixer.inputs.query")
    assert isinstance(query, TernaryModule)
    stored = query.matrices("weight")
    stored.latents.sum().backward()
    assert query.weight.grad is not None and bool((query.weight.grad == 1).all())
    with torch.no_grad():
        query.weight.neg_()
    assert torch.equal(query.matrices("weight").codes(torch.int8), -stored.codes(torch.int8))


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("weight.codes", torch.full((128,), 255, dtype=torch.uint8), r"codes or scales of 'blocks\.0.* are none"),
        ("weight.codes", torch.zeros(64, dtype=torch.uint8), r"weight\.codes' is U8 \(64,\), not of this model"),
        ("weight.scales", torch.full((1, 1), float("nan")), "are none"),
        ("weight.scales", None, r"has no 'blocks\.0.*weight\.scales' beside its partner"),
        ("bias.codes", torch.zeros(64, dtype=torch.uint8), r"bias\.codes' is U8 .*, not of this model"),
    ],
)
def test_codes_of_a_stranger_are_refused(
    name: str, values: Tensor | None, words: str, trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write_export(plan_export(trained, torch.bfloat16), out)
    file = out / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = {key: value for key, value in opened.metadata().items() if key != "data_sha256"}
    tensors = load_file(file)
    key = f"blocks.0.mixer.inputs.query.{name}"
    if values is None:
        del tensors[key]
    else:
        tensors[key] = values.expand(tensors[key].shape).clone() if name == "weight.scales" else values
    save_file(tensors, file, metadata)
    with pytest.raises(UserError, match=words):
        load_export(out)
