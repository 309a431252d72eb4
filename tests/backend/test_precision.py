"""bf16 training: what stays fp32, and that every ZeRO stage takes the same first steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kabrn_dist.checkpoint.store import CheckpointStore, load_tensor, read_manifest
from kabrn_dist.config.file import load_config
from kabrn_dist.inference.working_copy import working_dtypes
from tests.support.runs import read_losses, run_sessions, run_worker, write_small_config


def test_routers_and_coefficients_stay_fp32(shards: Path, tmp_path: Path) -> None:
    paths = []
    for stage in (0, 1, 2, 3):
        changes = {
            "training__precision": "bf16",
            "parallel__zero_stage": stage,
            "training__steps": 2,
            "model__short_conv_size": 3,
        }
        paths.append(str(write_small_config(tmp_path / f"{stage}.yaml", shards, tmp_path / str(stage), **changes)))
    (tmp_path / "jobs.json").write_text(json.dumps(paths))
    run_worker(1, "tests.workers.precision", str(tmp_path / "jobs.json"))
    for stage, dtypes in enumerate(json.loads((tmp_path / "dtypes.json").read_text())):
        # What exports and generation take for the trainer's dtypes.
        foreseen = working_dtypes(load_config(paths[stage]), 1)
        assert {name: str(dtype) for name, dtype in foreseen.items()}.items() <= dtypes.items()
        fine = {name for name, dtype in dtypes.items() if dtype == "torch.float32"}
        states = {"router/bias", "router/share"}
        if stage == 3:
            assert fine == states
            continue
        coefficients = ("numerator", "denominator", "convolution.weight")
        small = {name for name in dtypes if "router" in name or name.endswith(coefficients)}
        # Of each layer the router, two function layers of routed and shared experts, and two convolutions.
        assert fine == small and len(small - states) == 2 * (1 + 2 * 4 + 2)


@pytest.mark.parametrize("expert", [1, 2])
def test_stages_agree_in_bf16(expert: int, shards: Path, tmp_path: Path) -> None:
    jobs: list[list[object]] = []
    for stage in (0, 1, 2, 3):
        changes = {"training__precision": "bf16", "parallel__zero_stage": stage, "parallel__expert_parallel": expert}
        path = write_small_config(tmp_path / f"{stage}.yaml", shards, tmp_path / str(stage), **changes)
        jobs.append([str(path), "never", None])
    run_sessions(2, jobs, tmp_path)
    streams = [read_losses(tmp_path / str(stage)) for stage in (0, 1, 2, 3)]
    # DeepSpeed's optimizer without ZeRO once counted a step of its own, which halved the first updates: 0.04 apart.
    for stream in streams[1:]:
        assert max(abs(a - b) for a, b in zip(stream, streams[0], strict=True)) < 0.015, streams


def test_neither_validation_nor_recomputation_counts_towards_the_bias(shards: Path, tmp_path: Path) -> None:
    plain = {"model__router": {"bias_update_rate": 0.02, "jitter": 0.05}, "checkpoint__save_interval": 10}
    cases = {
        "plain": {},
        "validated": {"validation__eval_interval": 4},
        "recomputed": {"model__activation_checkpointing": "recompute"},
        "accumulated": {"training__micro_batch_size": 1},
    }
    jobs: list[list[object]] = []
    for name, changes in cases.items():
        path = write_small_config(tmp_path / f"{name}.yaml", shards, tmp_path / name, **plain, **changes)
        jobs.append([str(path), "never", None])
    run_sessions(2, jobs, tmp_path)
    biases = {}
    for name in cases:
        path = CheckpointStore(tmp_path / name / "checkpoints").find_latest()
        assert path is not None
        biases[name] = load_tensor(path, read_manifest(path), "router/bias")
    expected = read_losses(tmp_path / "plain")
    for name in ("validated", "recomputed"):
        assert read_losses(tmp_path / name) == expected, name
        assert torch.equal(biases[name], biases["plain"]), name
    # Ten steps of ±0.02, less the mean.
    steps = biases["plain"] / 0.02
    assert 1 < float(steps.abs().max()) <= 20 and float(steps.mean(1).abs().max()) < 1e-4
    # Where a load is next to the mean, one token routed elsewhere moves a bias the other way: by 0.02 here.
    assert max(abs(a - b) for a, b in zip(read_losses(tmp_path / "accumulated"), expected, strict=True)) < 1e-2
