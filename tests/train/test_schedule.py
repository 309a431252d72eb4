"""The recipe: learning rate and weight decay as functions of the step, their refusals, exact over resumes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from kabrn_dist.checkpoint.store import load_tensor, read_manifest
from kabrn_dist.config import Config, OptimizerConfig
from kabrn_dist.config.file import load_config
from kabrn_dist.train.schedule import learning_rate, weight_decay
from kabrn_dist.utils.errors import UserError
from tests.support.runs import read_losses, run_sessions, write_small_config

TWO_STAGES: dict[str, Any] = {
    "optimizer__lr_schedule": "linear",
    "optimizer__min_lr_ratio": 0.0,
    "optimizer__second_stage": {"start_fraction": 0.5, "learning_rate": 2.0e-3, "weight_decay": 0.0},
    "optimizer__weight_decay": 0.1,
}


def rates(steps: int, **settings: Any) -> list[float]:
    optimizer = OptimizerConfig(**settings)
    return [learning_rate(step, steps, optimizer) for step in range(steps)]


def test_one_linear_stage_by_hand() -> None:
    found = rates(10, learning_rate=8.0, warmup_steps=2, lr_schedule="linear", min_lr_ratio=0.5)
    assert found == pytest.approx([4, 8, 8, 7.5, 7, 6.5, 6, 5.5, 5, 4.5])


def test_one_cosine_stage_by_hand() -> None:
    assert rates(4, learning_rate=1.0, min_lr_ratio=0.0) == pytest.approx(
        [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - 0.125**0.5]
    )
    assert rates(5, learning_rate=2.0, warmup_steps=1, min_lr_ratio=1.0) == [2.0] * 5


@pytest.mark.parametrize("decay", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("steps", "at", "begins"), [(10, 0.5, 5), (10, 0.26, 3), (7, 0.5, 4), (100_000, 0.333, 33_300)]
)
def test_a_second_stage_has_its_own_peak_and_weight_decay(decay: str, steps: int, at: float, begins: int) -> None:
    common: dict[str, Any] = {"warmup_steps": 2, "lr_schedule": decay, "min_lr_ratio": 0.1}
    high, low = (OptimizerConfig(learning_rate=rate, **common) for rate in (3e-3, 2e-3))
    second = {"start_fraction": at, "learning_rate": 2e-3, "weight_decay": 0.01}
    both = OptimizerConfig(learning_rate=3e-3, weight_decay=0.1, second_stage=second, **common)
    for step in {0, 1, begins - 1, begins, steps - 1}:
        alone = low if step >= begins else high
        assert learning_rate(step, steps, both) == learning_rate(step, steps, alone)
        assert weight_decay(step, steps, both) == (0.01 if step >= begins else 0.1)
        assert weight_decay(step, steps, high) == 0.1
    assert learning_rate(begins, steps, both) < learning_rate(begins - 1, steps, both)


def complaint(tmp_path: Path, **changes: Any) -> str:
    path = write_small_config(tmp_path / "c.yaml", tmp_path, tmp_path / "run", **changes)
    with pytest.raises(UserError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and ": :" not in message
    return message


@pytest.mark.parametrize(
    ("steps", "warmup", "at", "remedy"),
    [(10, 6, 0.5, 0.6), (10, 2, 0.01, 0.5), (10, 0, 0.999, 0.5), (10, 9, 0.5, 0.9), (3, 2, 0.4, 2 / 3)],
)
def test_stages_out_of_order(tmp_path: Path, steps: int, warmup: int, at: float, remedy: float) -> None:
    second = {"start_fraction": at, "learning_rate": 1e-3}
    changes = {"training__steps": steps, "optimizer__warmup_steps": warmup}
    message = complaint(tmp_path, **changes, optimizer__second_stage=second)
    for named in (
        f"optimizer.second_stage.start_fraction {at:g} ",
        f"training.steps {steps} ",
        f"optimizer.warmup_steps {warmup} ",
    ):
        assert named in message
    found = float(message.split("set start_fraction to ")[1].split(",")[0])
    assert found == pytest.approx(remedy)
    fixed = write_small_config(
        tmp_path / "d.yaml",
        tmp_path,
        tmp_path / "run",
        **changes,
        optimizer__second_stage=second | {"start_fraction": found},
    )
    optimizer = load_config(fixed).optimizer
    assert max(1, warmup) <= optimizer.second_stage_step(steps) < steps


def test_a_run_too_short_for_two_stages(tmp_path: Path) -> None:
    second = {"learning_rate": 1e-3}
    message = complaint(tmp_path, training__steps=4, optimizer__warmup_steps=4, optimizer__second_stage=second)
    assert "set training.steps to 8 or more and start_fraction to 0.5, or leave out second_stage" in message
    for steps, warmup in ((8, 4), (2, 1), (2, 0)):
        Config.model_validate(
            small(training__steps=steps, optimizer__warmup_steps=warmup, optimizer__second_stage=second)
        )


def small(**changes: Any) -> dict[str, Any]:
    tree = {
        "run": {"folder": "runs/x"},
        "data": {"path": "data/x", "sequence_length": 32},
        "model": {
            "vocab_size": 64,
            "hidden_size": 16,
            "layers": 1,
            "retention": {"num_heads": 2, "key_dim": 4, "value_dim": 8},
            "experts": {"num_experts": 8, "top_k": 2, "expert_hidden_size": 8},
        },
        "optimizer": {"learning_rate": 1.0e-3},
        "training": {"steps": 10, "global_batch_size": 24, "micro_batch_size": 2},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        tree[section][name] = value  # type: ignore[index]
    return tree


def test_wrong_stages_are_named(tmp_path: Path) -> None:
    for second, said in (
        ({"start_fraction": 1.0, "learning_rate": 1e-3}, "optimizer.second_stage.start_fraction: "),
        ({"start_fraction": 0.0, "learning_rate": 1e-3}, "optimizer.second_stage.start_fraction: "),
        ({"start_fraction": 0.5}, "optimizer.second_stage.learning_rate is missing"),
        (
            {"start_fraction": 0.5, "learning_rate": 1e-3, "weight_dekay": 0},
            "did you mean 'optimizer.second_stage.weight_decay'?",
        ),
        ({"learning_rate": 4e-3}, "second_stage.learning_rate 0.004 exceeds the first stage's optimizer.learning_rate"),
        ({"learning_rate": 1e-3, "weight_decay": 0.2}, "second_stage.weight_decay 0.2 exceeds"),
    ):
        assert said in complaint(tmp_path, optimizer__second_stage=second)
    assert "optimizer.lr_schedule: " in complaint(tmp_path, optimizer__lr_schedule="step")


def test_a_resume_across_the_boundary_is_bit_equal(shards: Path, tmp_path: Path) -> None:
    """Stopped before, at and after the first step of the second stage (the sixth of ten), the first wholly ternary."""
    jobs: list[list[object]] = []
    warming = {"model__quantize_start_step": 1, "model__quantize_warmup_steps": 4}
    for zero in (0, 1, 2, 3):
        layout = {"parallel__expert_parallel": 2, "parallel__zero_stage": zero, **TWO_STAGES, **warming}
        whole = write_small_config(tmp_path / f"whole{zero}.yaml", shards, tmp_path / f"whole{zero}", **layout)
        parts = write_small_config(tmp_path / f"parts{zero}.yaml", shards, tmp_path / f"parts{zero}", **layout)
        jobs += [[str(whole), "never", None], *([str(parts), "auto", stop] for stop in (4, 1, 1, None))]
    run_sessions(2, jobs, tmp_path)
    for zero in (0, 1, 2, 3):
        whole, parts = tmp_path / f"whole{zero}", tmp_path / f"parts{zero}"
        assert len(read_losses(whole)) == 10
        for key in (
            "loss/total",
            "optimizer/gradient_norm",
            "optimizer/learning_rate",
            "optimizer/quantization_lambda",
        ):
            assert read_losses(parts, key) == read_losses(whole, key), f"ZeRO {zero}: {key}"
    assert read_losses(tmp_path / "whole1", "optimizer/weight_decay") == [0.1] * 5 + [0.0] * 5
    assert read_losses(tmp_path / "whole1", "optimizer/quantization_lambda") == [0, 0.2, 0.4, 0.6, 0.8, *[1] * 5]
    rate = read_losses(tmp_path / "whole1", "optimizer/learning_rate")
    assert rate == pytest.approx(
        [1.5e-3, *(3e-3 * x / 8 for x in (8, 8, 7, 6)), *(2e-3 * x / 8 for x in (5, 4, 3, 2, 1))]
    )
    board = EventAccumulator(str(tmp_path / "parts1" / "tensorboard"))
    board.Reload()
    assert [event.value for event in board.Scalars("optimizer/weight_decay")] == pytest.approx([0.1] * 5 + [0.0] * 5)


def test_the_weight_decay_reaches_matrices_and_no_coefficients(shards: Path, tmp_path: Path) -> None:
    """Two runs that differ in the second stage's decay alone: equal until it begins, then apart by just that decay."""
    jobs, runs = [], {}
    for zero in (0, 1, 3):
        for decay in (0.0, 0.4):
            folder = runs[zero, decay] = tmp_path / f"z{zero}-{decay}"
            changes = TWO_STAGES | {
                "optimizer__weight_decay": 0.4,
                "optimizer__second_stage": {"start_fraction": 0.5, "learning_rate": 1e-3, "weight_decay": decay},
                "training__steps": 4,
                "parallel__expert_parallel": 2,
                "parallel__zero_stage": zero,
                "checkpoint__save_interval": 1,
                "checkpoint__keep_last": 4,
            }
            jobs.append(
                [str(write_small_config(tmp_path / f"{folder.name}.yaml", shards, folder, **changes)), "never", None]
            )
    run_sessions(2, jobs, tmp_path)
    for zero in (0, 1, 3):
        none, some = (read_masters(runs[zero, decay], 3) for decay in (0.0, 0.4))
        before = read_masters(runs[zero, 0.0], 2)
        rate = json.loads((runs[zero, 0.0] / "log.jsonl").read_text().splitlines()[2])["optimizer/learning_rate"]
        for name, value in before.items():
            lost = none[name] - some[name]
            expected = 0 * value if is_coefficient(name) else rate * 0.4 * value
            assert float((lost - expected).abs().max()) <= 1e-6 * max(1.0, float(value.abs().max())), (zero, name)
        assert 0 < sum(map(is_coefficient, before)) < len(before) - 8
        assert all(value.equal(before[name]) for name, value in read_masters(runs[zero, 0.4], 2).items())


def is_coefficient(name: str) -> bool:
    return name.endswith(("numerator/master", "denominator/master"))


def read_masters(folder: Path, step: int) -> dict[str, Tensor]:
    path = folder / "checkpoints" / f"step-{step:08d}"
    manifest = read_manifest(path)
    return {name: load_tensor(path, manifest, name) for name in manifest.tensors if name.endswith("/master")}
