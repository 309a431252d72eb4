"""Adapters on models in memory: the trained model's codes and logits, and the base's own bits without them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kabrn_dist.adapters.adapter import Adapter, CodePatch
from kabrn_dist.inference.adapters import ModelAdapters, hash_model_codes, set_adapters
from kabrn_dist.inference.code_patches import list_matrices, patch_packed, patch_packed_naive
from kabrn_dist.inference.export import plan_export, write_export
from kabrn_dist.inference.frozen_codes import freeze_codes
from kabrn_dist.inference.load import load_export
from kabrn_dist.inference.run import Run
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.ops.packing import pack
from kabrn_dist.runtime.file_plan import Packing
from kabrn_dist.runtime.model_file import read_model_file
from kabrn_dist.runtime.pack import pack_folder
from kabrn_dist.runtime.patch_file import hash_file_codes
from kabrn_dist.utils.errors import UserError
from tests.support.models import MODEL_KINDS
from tests.support.patched_models import make_patched_models
from tests.support.runs import make_shards, run_command, torchrun_command, write_small_config


def logits(model: MixKABRN) -> Tensor:
    tokens = torch.arange(24)[None] * 7 % 256
    with torch.no_grad():
        return model.decode(tokens, torch.zeros_like(tokens), torch.arange(24)[None], None)[0]


@pytest.mark.parametrize("kind", [kind for kind in MODEL_KINDS if not kind.startswith("plain")])
def test_a_patch_makes_the_trained_model_and_leaves_no_trace(kind: str) -> None:
    models = make_patched_models(*MODEL_KINDS[kind])
    base, adapter = models.base, models.adapter
    before = logits(base)
    set_adapters(base, [(adapter, 1)])
    assert hash_model_codes(base) == adapter.info.result_sha256
    assert torch.equal(logits(base), logits(models.trained)) and not torch.equal(logits(base), before)
    # Attached once more, it is not there twice.
    set_adapters(base, [(adapter, 1)])
    assert torch.equal(logits(base), logits(models.trained))
    set_adapters(base, [])
    assert torch.equal(logits(base), before) and hash_model_codes(base) == adapter.info.base_sha256
    assert all(not module.sources for module in base.modules() if hasattr(module, "sources"))


@pytest.mark.parametrize("when", ["before", "after"])
def test_frozen_codes_stay_frozen(when: str) -> None:
    models = make_patched_models()
    base = models.base
    before = logits(base)
    if when == "before":
        freeze_codes(base)
    adapters = ModelAdapters(base)
    adapters.set([(models.adapter, 1)])
    if when == "after":
        freeze_codes(base)
    assert torch.equal(logits(base), logits(models.trained))
    assert are_kept(base)
    adapters.set([])
    assert torch.equal(logits(base), before) and are_kept(base)
    adapters.set([(models.adapter, 1)])
    assert torch.equal(logits(base), logits(models.trained)) and are_kept(base)


def are_kept(model: MixKABRN) -> bool:
    """Whether the model has its codes ready and does not find them anew in every pass."""

    def read() -> list[Tensor | None]:
        matrices = list_matrices(model).values()
        return [each.int8_codes if each.wide_codes is None else each.wide_codes for each in matrices]

    return all(first is not None and first is second for first, second in zip(read(), read(), strict=True))


def test_packed_codes_are_patched_where_they_lie() -> None:
    random = np.random.default_rng(0)
    for count, share in ((64 * 11 + 13, 0.3), (64 * 40, 1.0), (5, 0.5), (700, 0.0)):
        packed = pack(torch.from_numpy(random.integers(-1, 2, count).astype(np.int8)))
        places = np.flatnonzero(random.random(count) < share)
        steps = random.integers(1, 3, len(places)).astype(np.uint8)
        before = packed.clone()
        assert torch.equal(patch_packed(packed, places, steps), patch_packed_naive(packed, places, steps))
        assert torch.equal(packed, before)


def change(adapter: Adapter, name: str, patch: CodePatch) -> Adapter:
    return replace(adapter, patches=adapter.patches | {name: patch})


def test_an_adapter_that_does_not_fit_is_refused_and_the_model_stays() -> None:
    models = make_patched_models()
    base, adapter, name = models.base, models.adapter, "blocks.1.mixture.routed.down"
    before, patch, info = logits(base), models.adapter.patches["blocks.1.mixture.routed.down"], models.adapter.info
    other = replace(adapter, info=replace(info, base_sha256="7" * 64))
    found = f"sha256 {info.base_sha256[:12]}…, and adapter 'between' is for those of 777777777777…; name the model"
    for given, message in (
        ([(other, 1.0)], found),
        ([(adapter, 0.5)], "with weight 1"),
        ([(adapter, 1.0), (adapter, 1.0)], "a model takes one, with weight 1"),
        ([(change(adapter, "blocks.7.mixture.routed.down", patch), 1.0)], "no parameter of this model"),
        ([(change(adapter, "embedding.weight", patch), 1.0)], "no parameter of this model"),
        ([(change(adapter, name, patch._replace(shape=(4, 20, 40))), 1.0)], "in the adapter (4, 20, 40)"),
        ([(change(adapter, name, patch._replace(base_scales=patch.scales * 2)), 1.0)], "other scales"),
    ):
        with pytest.raises(UserError) as error:
            set_adapters(base, given)
        assert message in str(error.value) and "\n" not in str(error.value)
        assert torch.equal(logits(base), before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its experts spread over two processes, and groups of outputs with scales of their own."""
    folder = tmp_path_factory.mktemp("adapters")
    changes = {"parallel__expert_parallel": 2, "parallel__zero_stage": 1, "training__steps": 2}
    shards = make_shards(folder)
    config = write_small_config(folder / "run.yaml", shards, folder / "run", model__scale_group_size=5, **changes)
    result = run_command(torchrun_command(2, "launch/train.py", "--config", str(config)))
    assert result.exit_code == 0, result.output
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_its_exports_and_its_files_have_one_identity(precision: str, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("precision: fp32", f"precision: {precision}"))
    expected = hash_model_codes(Run.open(run).model())
    assert (expected == hash_model_codes(Run.open(trained).model())) == (precision == "fp32")
    for name, dtype in (("own", None), ("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        write_export(plan_export(run, dtype), tmp_path / name)
        assert hash_model_codes(load_export(tmp_path / name)[0]) == expected, name
    for folder in (run, tmp_path / "own", tmp_path / "bf16"):
        for ternary in ("tiles", "base3"):
            out = tmp_path / f"{folder.name}-{ternary}.mkb"
            pack_folder(folder, out, Packing(ternary=ternary))
            file = read_model_file(out)
            assert file.header["codes_sha256"].hex() == hash_file_codes(file) == expected
