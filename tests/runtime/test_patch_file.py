"""Adapters of flipped codes on model files: the trained model's codes, and back to the same bytes."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kabrn_dist.adapters.adapter import Adapter
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.inference.adapters import hash_model_codes
from kabrn_dist.inference.generate import GenerativeModel
from kabrn_dist.runtime.file_checks import seal_model_file
from kabrn_dist.runtime.file_format import find_role
from kabrn_dist.runtime.model_file import read_model_file, write_model_file
from kabrn_dist.runtime.parameter_names import MATRIX_ROLES, parameter_name
from kabrn_dist.runtime.patch_file import hash_file_codes, patch_model_file, unpatch_model_file
from kabrn_dist.utils.errors import UserError
from tests.support.adapters import make_adapter_of
from tests.support.models import MODEL_KINDS, make_model, make_model_config
from tests.support.patched_models import PatchedModels, make_patched_models


def pack(models: PatchedModels, model: GenerativeModel, path: Path, ternary: str = "tiles") -> Path:
    write_model_file(model, models.config, Tokenizer.of_bytes(), 12, path, ternary=ternary, template="{{ messages }}")
    return path


def without_codes_hash(path: Path) -> Path:
    """A file as earlier versions wrote it."""
    old = path.with_name(f"old-{path.name}")
    old.write_bytes(path.read_bytes())
    with old.open("r+b") as stream:
        seal_model_file(stream, bytes(32))
    return old


@pytest.fixture(scope="module")
def models() -> PatchedModels:
    return make_patched_models("model.layers=RAR", "model.scale_group_size=7")


@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_a_model_and_its_file_have_one_identity(kind: str, tmp_path: Path) -> None:
    config = make_model_config(*MODEL_KINDS[kind])
    model = make_model(config)
    for ternary in ("tiles", "base3"):
        path = tmp_path / f"{ternary}.mkb"
        write_model_file(model, config, Tokenizer.of_bytes(), 12, path, ternary=ternary)
        file = read_model_file(path)
        assert file.header["codes_sha256"].hex() == hash_file_codes(file) == hash_model_codes(model)
        assert hash_file_codes(read_model_file(without_codes_hash(path))) == hash_model_codes(model)


def test_names_of_matrices_are_those_of_the_model(tmp_path: Path) -> None:
    """`parameter_name`, for every kind of expert."""
    for kind, overrides in MODEL_KINDS.items():
        config = make_model_config(*overrides)
        model = make_model(config)
        write_model_file(model, config, Tokenizer.of_bytes(), 1, tmp_path / f"{kind}.mkb")
        records = read_model_file(tmp_path / f"{kind}.mkb").records
        roles = [(find_role(record.role) or "", record.layer) for record in records]
        named = {parameter_name(role, layer) for role, layer in roles if role in MATRIX_ROLES}
        assert named == {name for name, info in model.parameter_table().items() if info.role == "matrix"}
        others = {
            parameter_name(role, layer) for role, layer in roles if role in ("router.weight", "embedding", "head")
        }
        assert others <= set(model.parameter_table())


@pytest.mark.parametrize("ternary", ["tiles", "base3"])
@pytest.mark.parametrize("old", [False, True])
def test_a_patch_gives_the_trained_codes_and_comes_off_without_a_trace(
    ternary: str, old: bool, models: PatchedModels, tmp_path: Path
) -> None:
    base = pack(models, models.base, tmp_path / "base.mkb", ternary)
    trained = read_model_file(pack(models, models.trained, tmp_path / "trained.mkb", ternary))
    base = without_codes_hash(base) if old else base
    before = base.read_bytes()
    patch_model_file(base, models.adapter, tmp_path / "patched.mkb")
    patched = read_model_file(tmp_path / "patched.mkb")
    assert hash_file_codes(patched) == models.adapter.info.result_sha256 == hash_model_codes(models.trained)
    assert any(patched.header["codes_sha256"]) == (not old)
    for record in patched.records:
        role = find_role(record.role) or ""
        source = trained if role in MATRIX_ROLES else read_model_file(base)
        ours, theirs = patched.read(role, record.layer), source.read(role, record.layer)
        assert np.array_equal(ours.values, theirs.values), role
        assert (ours.codes is None) == (theirs.codes is None), role
    unpatch_model_file(tmp_path / "patched.mkb", models.adapter, tmp_path / "again.mkb")
    assert (tmp_path / "again.mkb").read_bytes() == before == base.read_bytes()
    assert hashlib.sha256((tmp_path / "patched.mkb").read_bytes()).digest() != hashlib.sha256(before).digest()


def test_a_file_can_be_patched_in_its_place(models: PatchedModels, tmp_path: Path) -> None:
    base = pack(models, models.base, tmp_path / "m.mkb")
    before = base.read_bytes()
    patch_model_file(base, models.adapter, base)
    assert base.read_bytes() != before
    unpatch_model_file(base, models.adapter, base)
    assert base.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["m.mkb"]


def with_patch(adapter: Adapter, name: str, **changes: object) -> Adapter:
    return replace(adapter, patches=adapter.patches | {name: adapter.patches[name]._replace(**changes)})  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused_and_nothing_written(models: PatchedModels, tmp_path: Path) -> None:
    base = pack(models, models.base, tmp_path / "base.mkb")
    trained = pack(models, models.trained, tmp_path / "trained.mkb")
    adapter, name = models.adapter, "blocks.0.mixture.routed.up"
    patch = adapter.patches[name]
    info = adapter.info
    other = replace(adapter, info=replace(info, base_sha256="7" * 64))
    cases: list[tuple[Path, Adapter, str]] = [
        (base, other, f"sha256 {info.base_sha256[:12]}…, and adapter 'between' is for those of 777777777777…; name"),
        (trained, adapter, "the file has it already"),
        (base, make_adapter_of("lora"), "is of method lora, which changes no codes"),
        (base, replace(adapter, patches={"blocks.9.mixture.routed.up": patch}), "has no ternary parameter"),
        (base, replace(adapter, patches={"embedding.weight": patch}), "has no ternary parameter"),
        (base, with_patch(adapter, name, shape=(4, 40, 20)), "in the adapter (4, 40, 20)"),
        (base, with_patch(adapter, name, base_scales=patch.base_scales * 2), "other scales than the adapter says"),
        (base, with_patch(adapter, name, steps=3 - patch.steps), "the adapter is damaged; copy it again"),
        (base, with_patch(adapter, name, scales=patch.scales * 2), "the adapter is damaged; copy it again"),
    ]
    for path, wrong, message in cases:
        with pytest.raises(UserError) as error:
            patch_model_file(path, wrong, tmp_path / "out.mkb")
        assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="does not have it"):
        unpatch_model_file(base, adapter, tmp_path / "out.mkb")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.mkb", "trained.mkb"]


def test_an_old_file_with_fp16_matrices_has_no_identity(tmp_path: Path) -> None:
    config = make_model_config(*MODEL_KINDS["plain"])
    model = make_model(config)
    write_model_file(model, config, Tokenizer.of_bytes(), 1, tmp_path / "half.mkb", matrix_dtype="fp16")
    # A file of today says it.
    assert hash_file_codes(read_model_file(tmp_path / "half.mkb")) == hash_model_codes(model)
    with pytest.raises(UserError, match="pack again"):
        hash_file_codes(read_model_file(without_codes_hash(tmp_path / "half.mkb")))


def test_a_parameter_that_is_not_touched_keeps_its_bytes(models: PatchedModels, tmp_path: Path) -> None:
    """Of a patch of one parameter, so of most patches."""
    base = pack(models, models.base, tmp_path / "base.mkb")
    name = "blocks.1.mixer.inputs.value.weight"
    patched, trained = make_patched_models("model.layers=RAR", "model.scale_group_size=7").base, models.trained
    with torch.no_grad():
        patched.get_parameter(name).copy_(trained.get_parameter(name))
    info = replace(models.adapter.info, result_sha256=hash_model_codes(patched))
    small = Adapter(info, patches={name: models.adapter.patches[name]})
    patch_model_file(base, small, tmp_path / "small.mkb")
    expected = pack(models, patched, tmp_path / "expected.mkb")
    assert (tmp_path / "small.mkb").read_bytes() == expected.read_bytes()
