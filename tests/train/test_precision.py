"""`training.precision: auto`: one for all ranks, said once, kept by the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kabrn_dist.config.file import load_config
from kabrn_dist.grow.run import grow
from kabrn_dist.train.precision import PrecisionChoice, agree, choose_precision
from tests.support.runs import run_training, write_small_config


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (["bf16", "bf16"], "bf16"),
        (["fp32"], "fp32"),
        (["fp16", "bf16", "bf16"], "fp16"),
        (["bf16", "fp32"], "fp32"),
        (["fp16", "fp32", "bf16"], "fp32"),
    ],
)
def test_ranks_take_what_all_of_them_can(ranks: list[Any], expected: str) -> None:
    choice = agree([PrecisionChoice(each, f"rank {number} said so") for number, each in enumerate(ranks)])
    assert choice.precision == expected
    if len(set(ranks)) == 1:
        assert choice.reason == "rank 0 said so"
    else:
        assert all(each in choice.reason for each in ranks) and "rank" in choice.reason


def test_a_processor_without_units_for_bf16_takes_fp32(shards: Path, tmp_path: Path) -> None:
    config = load_config(write_small_config(tmp_path / "c.yaml", shards, tmp_path / "run"))
    choice = choose_precision(torch.device("cpu"), config)
    has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert choice.precision == "fp32" or has_units
    assert ("no units" in choice.reason) != has_units


@pytest.mark.slow
def test_the_choice_is_said_written_and_kept(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    path = write_small_config(tmp_path / "c.yaml", shards, run, training__precision="auto", training__steps=4)
    result = run_training(2, "--config", str(path), "--stop-after", "2")
    assert result.exit_code == 0, result.output
    said = [line for line in result.output.splitlines() if "training.precision auto: " in line]
    assert len(said) == 1 and ", because " in said[0]
    chosen = load_config(run / "config.yaml").training.precision
    assert chosen != "auto" and f"auto: {chosen}, because" in said[0]
    # Whatever a new measurement would say: the run keeps what it began with.
    other = "bf16" if chosen == "fp32" else "fp32"
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["training"]["precision"] = other
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    result = run_training(1, "--config", str(path))
    assert result.exit_code == 0, result.output
    assert f"training.precision auto: {other}, because this run began with it" in result.output
    grown = load_config(path, [f"run.folder={tmp_path / 'grown'}"])
    grow(run, grown)
    assert load_config(tmp_path / "grown" / "config.yaml").training.precision == other
