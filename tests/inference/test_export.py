"""Exports: the same logits as the checkpoint's, whole or not at all, and usable without the run and its shards."""

from __future__ import annotations

import hashlib
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kabrn_dist.inference.export import plan_export, write_export
from kabrn_dist.inference.load import load_export
from kabrn_dist.inference.run import Run
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.utils.errors import UserError
from launch.export import main
from tests.checkpoint.test_store import reseal
from tests.support.runs import ROOT, make_shards, run_training, write_small_config

CHANGES: dict[str, Any] = {
    "model__layers": 2,
    "model__short_conv_size": 3,
    "parallel__expert_parallel": 2,
    "parallel__zero_stage": 1,
    "training__steps": 3,
    "model__quantize_warmup_steps": 2,
    "checkpoint__save_interval": 1,
    "checkpoint__keep_last": 5,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes, its experts spread over both."""
    folder = tmp_path_factory.mktemp("export")
    config = write_small_config(folder / "run.yaml", make_shards(folder), folder / "run", **CHANGES)
    result = run_training(2, "--config", str(config))
    assert result.exit_code == 0, result.output
    return folder / "run"


def logits(model: MixKABRN) -> Tensor:
    tokens = torch.arange(24)[None] * 7 % 256
    with torch.no_grad():
        return model.decode(tokens, torch.zeros_like(tokens), torch.arange(24)[None], None)[0]


def test_an_fp32_export_gives_the_same_logits_bit_for_bit(trained: Path, tmp_path: Path) -> None:
    run = Run.open(trained)
    reference, step = run.model(), run.step
    for file_bytes in (2 * 10**9, 30_000):
        out = tmp_path / str(file_bytes)
        export = plan_export(trained, torch.float32, file_bytes=file_bytes)
        # Another test of this process may have left a group open.
        grouped = torch.distributed.is_initialized()
        write_export(export, out)
        assert torch.distributed.is_initialized() == grouped
        model, tokenizer = load_export(out)
        assert torch.equal(logits(model), logits(reference)) and tokenizer.kind == "bytes"
        # As other tools read it.
        tensors: dict[str, Tensor] = {}
        for file in sorted(out.glob("*.safetensors")):
            tensors |= load_file(file)
            assert file.stat().st_size <= file_bytes + 4000 or len(load_file(file)) == 1
        expected = dict(reference.named_parameters()) | reference.routers.named()
        assert set(tensors) == set(expected)
        assert all(torch.equal(tensors[name], values) for name, values in expected.items())
        assert export.num_parameters == sum(p.numel() for p in reference.parameters())
        assert f"step {step}" in (out / "README.md").read_text()
    index = json.loads((tmp_path / "30000" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(expected) and index["metadata"]["total_size"] == export.num_bytes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2000000000", "30000"]


def test_an_export_computes_what_the_trainer_computes(trained: Path, tmp_path: Path) -> None:
    """Without options: the same codes and scales, and quantization as far as it had warmed up."""
    for step, lam in ((1, 2 / 3), (3, 1)):
        assert main(["--run", str(trained), "--out", str(tmp_path / str(step)), "--step", str(step)]) == 0
        model, _ = load_export(tmp_path / str(step))
        reference = Run.open(trained, step).model()
        assert model.quant.lam == reference.quant.lam == lam
        assert torch.equal(logits(model), logits(reference))


def test_a_run_in_half_precision_is_read_as_its_working_copies(trained: Path, tmp_path: Path) -> None:
    """Its codes are rounded from those, wherever the masters are read."""
    shutil.copytree(trained, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("precision: fp32", "precision: bf16"))
    run = Run.open(tmp_path / "run")
    write_export(plan_export(tmp_path / "run"), tmp_path / "out")
    masters, model, exported = Run.open(trained).model(), run.model(), load_export(tmp_path / "out")[0]
    assert torch.equal(logits(model), logits(exported))
    for (name, ours), master in zip(model.named_parameters(), masters.parameters(), strict=True):
        fine = name.endswith(("numerator", "denominator", "convolution.weight", "router.weight"))
        assert torch.equal(ours, master if fine else master.bfloat16().float()), name


@pytest.mark.parametrize(
    ("written", "edited", "words"),
    [
        ("layers: RR", "layers: RA", "model.layers is RA, and RR in what was trained"),
        ("top_k: 2", "top_k: 1", "model.experts.top_k is 1, and 2"),
        ("score_func: sigmoid", "score_func: softmax", "model.router.score_func"),
    ],
)
def test_a_configuration_edited_by_hand_makes_no_other_model(
    written: str, edited: str, words: str, trained: Path, tmp_path: Path
) -> None:
    """These keep all shapes, so the weights would load and say nonsense."""
    shutil.copytree(trained, tmp_path / "run")
    write_export(plan_export(trained), tmp_path / "out")
    for folder in ("run", "out"):
        config = tmp_path / folder / "config.yaml"
        assert written in config.read_text()
        config.write_text(config.read_text().replace(written, edited))
    for open_edited in (
        lambda: Run.open(tmp_path / "run"),
        lambda: plan_export(tmp_path / "run"),
        lambda: load_export(tmp_path / "out"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            open_edited()


def test_what_only_training_needs_may_be_edited(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    text = config.read_text().replace("quantize_warmup_steps: 2", "quantize_warmup_steps: 1")
    config.write_text(text.replace("precision: fp32", "precision: auto"))
    run, reference = Run.open(tmp_path / "run", 1), Run.open(trained, 1)
    assert torch.equal(logits(run.model()), logits(reference.model()))
    write_export(plan_export(tmp_path / "run", step=1), tmp_path / "out")
    assert torch.equal(logits(load_export(tmp_path / "out")[0]), logits(reference.model()))


def _replace_hashes(hashes: dict[str, str], manifest: dict[str, Any]) -> None:
    for file in manifest["files"]:
        file["sha256"] = hashes[file["name"]]


def test_weights_that_are_not_finite_are_refused_wherever_they_are_read(trained: Path, tmp_path: Path) -> None:
    write_export(plan_export(trained), tmp_path / "out")
    weights, values = tmp_path / "out" / "model.safetensors", load_file(tmp_path / "out" / "model.safetensors")
    values["embedding.weight"][3, 1] = float("nan")
    save_file(values, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"'embedding\.weight' holds numbers that are not finite"):
        load_export(tmp_path / "out")
    run = shutil.copytree(trained, tmp_path / "run")
    for path in (run / "checkpoints").glob("step-*"):
        hashes = {}
        for file in path.glob("*.safetensors"):
            content = file.read_bytes()
            first = 8 + int.from_bytes(content[:8], "little")
            file.write_bytes(content[:first] + b"\xff" * (len(content) - first))
            hashes[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
        reseal(path, partial(_replace_hashes, hashes))
    for read in (lambda: Run.open(run).model(), lambda: write_export(plan_export(run), tmp_path / "none")):
        with pytest.raises(UserError, match="holds numbers that are not finite"):
            read()
    assert not (tmp_path / "none").exists()


def test_a_run_has_its_tokenizer_with_it(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shards may be elsewhere, as seen from another folder."""
    shutil.copytree(trained, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    path = Run.open(trained).config.data.path
    config.write_text(config.read_text().replace(path, "data/corpus"))
    monkeypatch.chdir(tmp_path)
    assert Run.open("run").tokenizer().kind == "bytes"
    (tmp_path / "run" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"data\.path data/corpus: no such folder here .*start the command where"):
        Run.open("run").tokenizer()


def test_an_export_refuses_another_tokenizer_and_an_old_one_loads(trained: Path, tmp_path: Path) -> None:
    write_export(plan_export(trained), tmp_path / "out")
    tokenizer = tmp_path / "out" / "tokenizer.json"
    tokenizer.write_text('{"kind":  "bytes"}')
    with pytest.raises(UserError, match=r"tokenizer\.json: sha256 is .* this is another tokenizer"):
        load_export(tmp_path / "out")
    # As earlier versions wrote it: no metadata but the format and the step.
    weights = tmp_path / "out" / "model.safetensors"
    save_file(load_file(weights), weights, {"format": "pt", "step": "3"})
    model, _ = load_export(tmp_path / "out")
    assert torch.equal(logits(model), logits(Run.open(trained).model()))


def test_a_bf16_export_is_the_rounded_one_and_writes_alone(trained: Path, tmp_path: Path) -> None:
    moved, out = tmp_path / "run", tmp_path / "exports" / "tiny"
    shutil.copytree(trained, moved)
    assert main(["--run", str(moved), "--out", str(out), "--dry-run"]) == 0 and not out.exists()
    assert main(["--run", str(moved), "--out", str(out), "--step", "3", "--dtype", "bf16"]) == 0
    reference = Run.open(moved).model()
    shutil.rmtree(moved)
    model, _ = load_export(out)
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16().float()), name
    for name, values in model.routers.named().items():
        assert torch.equal(values, reference.routers.named()[name])
    command = [sys.executable, "launch/generate.py", "--model", str(out), "--prompt", "def ", "--tokens", "20"]
    written = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert written.returncode == 0, written.stderr
    assert written.stdout.startswith("def ") and str(out) in written.stderr


def test_refusals_leave_nothing_behind(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err

    out = tmp_path / "out"
    assert "config.yaml" in refused("--run", tmp_path, "--out", out)
    assert "no checkpoint of step 99; there are those of 1, 2, 3\n" in refused(
        "--run", trained, "--out", out, "--step", 99
    )
    assert "exists" in refused("--run", trained, "--out", trained)
    export = plan_export(trained, torch.float32)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(UserError, match="File too large"):
            write_export(export, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []
    write_export(export, out)
    (out / "tokenizer.json").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_export(out)
    (tmp_path / "elsewhere").rename(out / "tokenizer.json")
    config = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(config.replace("hidden_size: 32", "hidden_size: 1000000"))
    with pytest.raises(UserError, match=r"config\.yaml: model\.hidden_size is 1000000, and 32 in what was trained"):
        load_export(out)
    (out / "config.yaml").write_text(config)
    (out / "model.safetensors").rename(out / "model.bin")
    (out / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere"}}')
    with pytest.raises(UserError, match="is no file name"):
        load_export(out)
