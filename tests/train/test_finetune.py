"""Fine-tuning: every method starts from the base, is the same in every layout, goes on after a stop, and is a model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kabrn_dist.adapters.folder import read_adapter
from kabrn_dist.checkpoint.manifest import read_manifest
from kabrn_dist.checkpoint.state import read_state
from kabrn_dist.data.corpus import open_corpus
from kabrn_dist.data.dataset import TokenDataset
from kabrn_dist.data.run_config import load_run_config
from kabrn_dist.hub.export import plan_hub_export
from kabrn_dist.inference.adapters import hash_model_codes
from kabrn_dist.inference.base import attach_new_adapter
from kabrn_dist.inference.export import plan_export, write_export
from kabrn_dist.inference.init_adapter import load_init_adapter
from kabrn_dist.inference.load import build_full_model, load_export
from kabrn_dist.inference.run import Run
from kabrn_dist.model.adapter import adapter_parameters
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.runtime.file_format import find_role
from kabrn_dist.runtime.file_plan import Packing
from kabrn_dist.runtime.model_file import read_model_file
from kabrn_dist.runtime.pack import pack_folder
from kabrn_dist.runtime.patch_file import patch_model_file
from kabrn_dist.utils.errors import UserError
from tests.support.finetunes import BASE_STEPS, STEPS, train_base, write_finetune
from tests.support.runs import check_ternary_losses, read_losses, run_sessions

METHODS = ("full", "lora", "ternary_lora", "state")
# Least fall of the loss, in nats; batches differ by some 0.04, and a few states of a small model do little in 6 steps.
LEARNED = {"full": 0.1, "lora": 0.1, "ternary_lora": 0.1, "state": -0.05}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def runs(base: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each method in one process, by method."""
    folder = tmp_path_factory.mktemp("runs")
    paths = {method: write_finetune(folder / f"{method}.yaml", shards, base, method) for method in METHODS}
    run_sessions(1, [[str(path), "never", None] for path in paths.values()], folder)
    return {method: path.with_suffix("") for method, path in paths.items()}


def read_log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def measure_loss(run: Run, model: MixKABRN) -> float:
    """The validation loss of a model on the data of a run."""
    corpus, length = open_corpus(run.config.data), run.config.data.sequence_length
    data = TokenDataset(corpus, "validation", length, run.config.run.seed, ordered=False)
    batch = data.get(data.validation_positions(run.config.validation.eval_sequences))
    with torch.no_grad():
        return float(model(batch).language / (batch.targets >= 0).sum())


def test_every_method_learns_from_the_base_on_and_tells_what_it_forgets(base: Path, runs: dict[str, Path]) -> None:
    trained = next(entry for entry in reversed(read_log(base)) if "validation/bits_per_byte" in entry)
    firsts = set()
    for method, run in runs.items():
        losses, log = read_losses(run), read_log(run)
        assert losses[-1] < losses[0] - LEARNED[method], method
        firsts.add(round(losses[0], 5))
        measured = [
            entry["forgetting/noise/bits_per_byte"] for entry in log if "forgetting/noise/bits_per_byte" in entry
        ]
        before, after = measured[0], measured[-1]
        assert len(measured) == 2 and abs(before - trained["validation/noise/bits_per_byte"]) < 1e-5
        rise = next(entry["forgetting/rise"] for entry in log if "forgetting/rise" in entry)
        assert rise == pytest.approx(after / before - 1) and rise != 0
    assert len(firsts) == 1, "a loss before the first update is that of the base"


def test_the_losses_are_the_same_in_every_layout(
    base: Path, shards: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    layouts: dict[str, dict[str, Any]] = {
        "full": {"expert_parallel": 2, "experts_per_rank": [3, 1], "zero_stage": 1},
        "lora": {"expert_parallel": 2, "experts_per_rank": [1, 3], "zero_stage": 2},
        "ternary_lora": {"zero_stage": 3},
        "state": {"sequence_parallel": 2, "expert_parallel": 2, "zero_stage": 0},
    }
    jobs: list[list[object]] = []
    for method, layout in layouts.items():
        changes = {f"parallel__{key}": value for key, value in layout.items()} | {"parallel__bucket_size": 3000}
        path = write_finetune(tmp_path / f"{method}.yaml", shards, base, method, **changes)
        jobs.append([str(path), "never", 3 if method == "ternary_lora" else None])
    run_sessions(2, jobs, tmp_path)
    # The rest of one of them is done by one process, at another stage.
    path = write_finetune(tmp_path / "ternary_lora.yaml", shards, base, "ternary_lora", parallel__zero_stage=0)
    run_sessions(1, [[str(path), "must", None]], tmp_path)
    for method in layouts:
        check_ternary_losses(read_losses(tmp_path / method), read_losses(runs[method]), method)


def test_a_stopped_run_goes_on_with_the_same_bits(
    base: Path, shards: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    path = write_finetune(tmp_path / "lora.yaml", shards, base, "lora")
    run_sessions(1, [[str(path), "never", 2], [str(path), "must", None]], tmp_path)
    assert read_losses(tmp_path / "lora") == read_losses(runs["lora"])
    measured = [entry for entry in read_log(tmp_path / "lora") if "forgetting/rise" in entry]
    expected = [entry for entry in read_log(runs["lora"]) if "forgetting/rise" in entry]
    assert [entry["forgetting/rise"] for entry in measured] == [entry["forgetting/rise"] for entry in expected]


def test_a_finished_run_has_written_its_adapter(runs: dict[str, Path]) -> None:
    for method, run in runs.items():
        assert (run / "adapter").exists() == (method != "full")
        if method == "full":
            continue
        adapter = read_adapter(run / "adapter")
        assert (adapter.info.method, adapter.info.steps, adapter.info.name) == (method, STEPS, method)
        held = {"lora": adapter.low_ranks, "ternary_lora": adapter.patches, "state": adapter.states}
        assert [name for name, parts in held.items() if parts] == [method]


@pytest.mark.parametrize("method", METHODS)
def test_the_model_of_a_run_has_the_loss_that_was_validated(method: str, runs: dict[str, Path]) -> None:
    run = Run.open(runs[method])
    validated = read_losses(runs[method], "validation/loss")[-1]
    assert measure_loss(run, run.model()) == pytest.approx(validated, abs=2e-5)


def test_a_run_of_flipped_codes_is_packed_and_exported_as_the_model_that_was_trained(
    base: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    run, adapter = Run.open(runs["ternary_lora"]), read_adapter(runs["ternary_lora"] / "adapter")
    assert hash_model_codes(run.model()) == adapter.info.result_sha256 != adapter.info.base_sha256
    pack_folder(base, tmp_path / "base.mkb", Packing())
    patch_model_file(tmp_path / "base.mkb", adapter, tmp_path / "patched.mkb")
    pack_folder(run.folder, tmp_path / "run.mkb", Packing())
    patched, packed = (read_model_file(tmp_path / name) for name in ("patched.mkb", "run.mkb"))
    assert packed.header["codes_sha256"].hex() == adapter.info.result_sha256
    for record in packed.records:
        role = find_role(record.role)
        assert role is not None
        found, expected = (file.read(role, record.layer) for file in (packed, patched))
        assert np.array_equal(found.values, expected.values), (role, record.layer)
    for dtype in (None, torch.bfloat16):
        write_export(plan_export(run.folder, dtype), tmp_path / str(dtype))
        exported, _ = load_export(tmp_path / str(dtype))
        assert hash_model_codes(exported) == adapter.info.result_sha256 and exported.routers.step == STEPS
    exported, _ = load_export(tmp_path / "None")
    assert measure_loss(run, exported) == pytest.approx(measure_loss(run, run.model()), abs=1e-6)


@pytest.mark.parametrize("method", ["lora", "state"])
def test_a_run_of_an_adapter_is_no_model(method: str, runs: dict[str, Path], tmp_path: Path) -> None:
    writers: list[Callable[[], object]] = [
        lambda: pack_folder(runs[method], tmp_path / "model.mkb", Packing()),
        lambda: plan_export(runs[method]),
        lambda: plan_hub_export(runs[method]),
    ]
    for write in writers:
        with pytest.raises(UserError, match=r"mixkabrn adapter export .*/\w+ --out FOLDER, and use .*/base with --ada"):
            write()
    assert not (tmp_path / "model.mkb").exists()


def test_checkpoints_of_adapters_hold_nothing_else(runs: dict[str, Path]) -> None:
    leaves = {"lora": "_lora_", "ternary_lora": "_lora_", "state": ".state_"}
    sizes = {}
    for method, run in runs.items():
        checkpoint = run / "checkpoints" / f"step-{STEPS:08d}"
        names = read_manifest(checkpoint).tensors
        sizes[method] = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
        assert method == "full" or (names and all(leaves[method] in name for name in names)), method
    assert sizes["state"] < sizes["lora"] < sizes["full"]


def test_exports_are_bases_in_every_layout(base: Path, shards: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    # The second one holds rounded latents, and the codes of the run beside them.
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        write_export(plan_export(base, dtype), tmp_path / name)
    layout = {"parallel__expert_parallel": 2, "parallel__experts_per_rank": [3, 1]}
    paths = [
        write_finetune(tmp_path / "plain.yaml", shards, tmp_path / "fp32", "lora"),
        write_finetune(tmp_path / "rounded.yaml", shards, tmp_path / "bf16", "ternary_lora"),
        write_finetune(tmp_path / "divided.yaml", shards, tmp_path / "bf16", "ternary_lora", **layout),
    ]
    run_sessions(1, [[str(path), "never", 2] for path in paths[:2]], tmp_path)
    run_sessions(2, [[str(paths[2]), "never", 2]], tmp_path)
    plain, rounded, divided = (read_losses(path.with_suffix("")) for path in paths)
    assert plain == read_losses(runs["lora"])[:2]
    check_ternary_losses(divided, rounded, "slices of stored codes")
    assert rounded[0] == pytest.approx(plain[0], abs=1e-2)
    sha256 = read_adapter(runs["lora"] / "adapter").info.base_sha256
    for path in paths:
        checkpoint = path.with_suffix("") / "checkpoints" / "step-00000002"
        state = read_state(checkpoint, read_manifest(checkpoint)).base
        assert state is not None and (state.sha256, state.step) == (sha256, BASE_STEPS)


def test_adapters_train_in_half_precision(base: Path, shards: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    jobs: list[list[object]] = []
    for method, stage in (("lora", 2), ("state", 0), ("ternary_lora", 3)):
        changes = {"training__precision": "bf16", "parallel__zero_stage": stage}
        path = write_finetune(tmp_path / f"{method}.yaml", shards, base, method, **changes)
        jobs.append([str(path), "never", None])
    run_sessions(1, jobs, tmp_path)
    for method in ("lora", "state", "ternary_lora"):
        found, expected = read_losses(tmp_path / method), read_losses(runs[method])
        assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 0.05, method
        # It is the adapter of the fp32 base, and flips codes of that one alone.
        adapter, same = (read_adapter(run / "adapter") for run in (tmp_path / method, runs[method]))
        assert adapter.info.base_sha256 == same.info.base_sha256


def test_a_run_goes_on_with_the_adapter_of_an_earlier_one(
    base: Path, shards: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    layouts: dict[str, dict[str, Any]] = {
        "lora": {"expert_parallel": 2, "experts_per_rank": [1, 3], "zero_stage": 2},
        "ternary_lora": {"zero_stage": 3},
        "state": {"sequence_parallel": 2, "zero_stage": 0},
    }
    jobs = []
    for method, layout in layouts.items():
        changes = {f"parallel__{key}": value for key, value in layout.items()}
        # A step that changes nothing, so that what is saved is what was loaded.
        changes |= {"finetune__init_adapter": str(runs[method]), "training__steps": 1}
        path = write_finetune(
            tmp_path / f"{method}.yaml", shards, base, method, **changes, optimizer__learning_rate=1e-12
        )
        jobs.append([str(path), "never", None])
    run_sessions(2, jobs, tmp_path)
    for method in layouts:
        found, expected = (Run.open(run).model() for run in (tmp_path / method, runs[method]))
        earlier = {info.name: parameter for info, parameter in adapter_parameters(expected)}
        assert earlier and any(parameter.count_nonzero() for parameter in earlier.values())
        for info, parameter in adapter_parameters(found):
            torch.testing.assert_close(parameter, earlier.pop(info.name), rtol=0, atol=1e-9, msg=info.name)
        assert not earlier


def test_adapters_that_a_run_cannot_go_on_with_are_refused(
    base: Path, shards: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    sha256 = read_adapter(runs["lora"] / "adapter").info.base_sha256
    for changes, other, message in (
        ({"finetune__rank": 2}, "lora", "has rank 4, and finetune.rank is 2; set it to 4"),
        ({"finetune__alpha": 8.0}, "lora", "has alpha 32.0, and finetune.alpha is 8.0"),
        ({"finetune__targets": ["mixer"]}, "lora", "has targets"),
        ({}, "state", "has method state, and finetune.method is lora"),
        ({}, "full", "trained a whole model, no adapter; set finetune.base to it instead"),
        ({}, "nowhere", "finetune.init_adapter: "),
    ):
        folder = runs.get(other, tmp_path / other)
        path = write_finetune(
            tmp_path / "lora.yaml", shards, base, "lora", finetune__init_adapter=str(folder), **changes
        )
        config = load_run_config(str(path))
        model = build_full_model(config)
        attach_new_adapter(model, config)
        with pytest.raises(UserError, match=re.escape(message)):
            load_init_adapter(model, config, sha256)
    path = write_finetune(tmp_path / "lora.yaml", shards, base, "lora", finetune__init_adapter=str(runs["lora"]))
    with pytest.raises(UserError, match="is of another base"):
        load_init_adapter(model, load_run_config(str(path)), "0" * 64)
    with pytest.raises(UserError, match=re.escape("finetune.method full trains no adapter; leave it out")):
        load_run_config(
            str(write_finetune(tmp_path / "full.yaml", shards, base, "full", finetune__init_adapter=str(runs["lora"])))
        )
