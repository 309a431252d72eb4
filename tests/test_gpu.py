"""Training on a card: every precision and ZeRO stage learns and resumes, and fp32 agrees with the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.harness import read_losses, run, torchrun, write_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")]


def sessions(jobs: list[list[object]], folder: Path, **variables: str) -> None:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    result = run(torchrun(1, "tests/sessions_worker.py", str(folder / "jobs.json")), **variables)
    assert result.code == 0, result.out


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_each_stage_learns_and_resumes(precision: str, shards: Path, tmp_path: Path) -> None:
    jobs: list[list[object]] = []
    for zero in (0, 1, 2, 3):
        for name, stops in (("whole", [None]), ("parts", [6, None])):
            path = write_config(
                tmp_path / f"{name}{zero}.yaml",
                shards,
                tmp_path / f"{name}{zero}",
                parallel__zero=zero,
                training__precision=precision,
                training__steps=20,
            )
            jobs += [[str(path), "auto", stop] for stop in stops]
    sessions(jobs, tmp_path)
    for zero in (0, 1, 2, 3):
        whole = read_losses(tmp_path / f"whole{zero}")
        assert whole[-1] < whole[0] - 0.3, f"ZeRO {zero}"
        parts = read_losses(tmp_path / f"parts{zero}")
        assert parts == pytest.approx(whole, abs=5e-2), f"ZeRO {zero}"
        if precision == "fp16":
            scales = [read_losses(tmp_path / f"{name}{zero}", "optimizer/loss_scale") for name in ("whole", "parts")]
            assert scales[0] == scales[1], f"ZeRO {zero}"


def test_fp32_agrees_with_the_cpu(shards: Path, tmp_path: Path) -> None:
    for name, variables in (("card", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"})):
        path = write_config(tmp_path / f"{name}.yaml", shards, tmp_path / name, model__quantise=False)
        sessions([[str(path), "never", None]], tmp_path, **variables)
    assert read_losses(tmp_path / "card") == pytest.approx(read_losses(tmp_path / "cpu"), abs=1e-4)
