"""`mixkabrn pack`: from a run or an export to one file, with the trainer's codes, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from kabrn_dist.cli.main import main
from kabrn_dist.inference.export import plan_export, write_export
from kabrn_dist.inference.run import Run
from kabrn_dist.runtime.model_file import ModelFile, read_model_file, write_model_file
from tests.inference.test_export_codes import list_matrices
from tests.runtime.test_model_file import role_of
from tests.support.runs import ROOT, make_shards, run_training, write_small_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in fp32 whose quantization warms up until step 3."""
    folder = tmp_path_factory.mktemp("pack")
    changes = {"training__steps": 5, "checkpoint__save_interval": 1, "checkpoint__keep_last": 9}
    warmup = {"model__quantize_start_step": 2, "model__quantize_warmup_steps": 1, "model__scale_group_size": 9}
    config = write_small_config(
        folder / "run.yaml", make_shards(folder), folder / "run", **changes, **warmup, model__layers="RA"
    )
    result = run_training(1, "--config", str(config))
    assert result.exit_code == 0, result.output
    return folder / "run"


def as_bf16(run: Path, folder: Path) -> Path:
    """A copy of a run that says that it was trained in bf16."""
    shutil.copytree(run, folder)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("precision: fp32", "precision: bf16"))
    return folder


def pack(*arguments: object) -> int:
    return main(["pack", *map(str, arguments)])


def refuse(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which packing is refused."""
    capsys.readouterr()
    assert pack(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def count_differing_codes(file: ModelFile, run: Path) -> int:
    differing = 0
    for name, matrices in list_matrices(Run.open(run).model()).items():
        stored = file.read(*role_of(name))
        assert stored.codes is not None and matrices.gamma is not None
        codes = matrices.codes(torch.int8)
        differing += int((stored.codes != codes.numpy()).sum())
        assert np.array_equal(stored.values, (codes * matrices.gamma).numpy()), name
    return differing


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("bits", ["2", "1.6"])
def test_a_file_has_the_codes_and_scales_of_the_trainer(
    precision: str, bits: str, trained: Path, tmp_path: Path
) -> None:
    run = trained if precision == "fp32" else as_bf16(trained, tmp_path / "run")
    assert pack(run, "--out", tmp_path / "new" / "m.mkb", "--ternary", bits) == 0
    file = read_model_file(tmp_path / "new" / "m.mkb")
    assert count_differing_codes(file, run) == 0
    assert (file.header["step"], file.header["scale_group_size"]) == (5, 9)
    # The checkpoint, parameter by parameter, gives what the whole model does.
    opened = Run.open(run)
    ternary = {"2": "tiles", "1.6": "base3"}[bits]
    write_model_file(opened.model(), opened.config, opened.tokenizer(), 5, tmp_path / "whole.mkb", ternary=ternary)
    assert (tmp_path / "whole.mkb").read_bytes() == (tmp_path / "new" / "m.mkb").read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, None])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_export_in_any_dtype_packs_to_the_codes_of_its_run(
    dtype: torch.dtype | None, precision: str, trained: Path, tmp_path: Path
) -> None:
    run = trained if precision == "fp32" else as_bf16(trained, tmp_path / "run")
    write_export(plan_export(run, dtype), tmp_path / "export")
    assert pack(tmp_path / "export", "--out", tmp_path / "m.mkb") == 0
    file = read_model_file(tmp_path / "m.mkb")
    assert count_differing_codes(file, run) == 0 and file.header["step"] == 5


def test_what_is_written_is_told_with_the_next_command(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template, out = tmp_path / "chat.jinja", tmp_path / "m.mkb"
    text = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    template.write_text(text)
    assert pack(trained, "--out", out, "--template", template, "--sources", "--embedding", "fp16") == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert lines[-1] == f"next: mixkabrn chat {out}" and "cc -O2 mixkabrn.c -o mixkabrn -lm -lpthread" in lines[-2]
    parameters = sum(parameter.numel() for parameter in Run.open(trained).model().parameters())
    assert f"{out}: step 5, 257 tokens, {parameters:,} weights, ternary matrices; {out.stat().st_size:,} bytes" in lines
    assert "16.00 bits each" in shown
    sizes = [int(line.split(" bytes")[0].split()[-1].replace(",", "")) for line in lines[:7]]
    assert sum(sizes) == out.stat().st_size
    for name in ("mixkabrn.c", "mixkabrn.h"):
        assert (tmp_path / name).read_bytes() == (ROOT / "kabrn_dist/runtime/csrc" / name).read_bytes()
    assert read_model_file(out).template == text


def test_plain_matrices_before_quantization_and_none_during_its_warm_up(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pack(trained, "--out", tmp_path / "m.mkb", "--step", 1, "--matrices", "fp16") == 0
    assert "plain matrices" in capsys.readouterr().out
    file = read_model_file(tmp_path / "m.mkb")
    assert (file.header["quantized"], file.header["scale_group_size"], file.header["step"]) == (0, 0, 1)
    assert file.read("routed.up").record.dtype == 1
    error = refuse(capsys, trained, "--out", tmp_path / "n.mkb", "--step", 2)
    assert "step 2 is in the warm-up of quantization" in error and "train on to step 3, or choose" in error
    assert [path.name for path in tmp_path.iterdir()] == ["m.mkb"]


def test_mistakes_are_answered_with_one_line_and_leave_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.mkb"
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    (tmp_path / "empty.jinja").write_text(" \n")
    write_export(plan_export(trained), tmp_path / "export")
    assert "no such folder" in refuse(capsys, tmp_path / "none", "--out", out)
    assert "is a file" in refuse(capsys, tmp_path / "empty.jinja", "--out", out)
    assert "is a folder; name a file in it" in refuse(capsys, trained, "--out", tmp_path)
    assert "no checkpoint of step 99; there are those of 1, 2" in refuse(capsys, trained, "--out", out, "--step", 99)
    assert "leave out --step" in refuse(capsys, tmp_path / "export", "--out", out, "--step", 5)
    assert "byte 0 is not UTF-8" in refuse(capsys, trained, "--out", out, "--template", tmp_path / "latin.jinja")
    assert "is empty" in refuse(capsys, trained, "--out", out, "--template", tmp_path / "empty.jinja")
    assert "none of 2, 1.6" in refuse(capsys, trained, "--out", out, "--ternary", "3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.jinja", "export", "latin.jinja"]
    out.write_text("mine")
    assert "exists already; name another file, or replace it with --force" in refuse(capsys, trained, "--out", out)
    assert out.read_text() == "mine" and pack(trained, "--out", out, "--force") == 0
    assert read_model_file(out).header["step"] == 5
