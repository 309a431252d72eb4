"""Whole runs through the real launchers: resume, stop, precision, checkpointed activations, generation."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.runs import (
    deepspeed_command,
    read_losses,
    run_command,
    run_launch_script,
    run_sessions,
    run_training,
    start_command,
    wait_for_exit,
    wait_for_steps,
    write_small_config,
)

TRAIN = "launch/train.py"


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(shards: Path, tmp_path: Path) -> None:
    jobs: list[list[object]] = []
    for zero in (0, 1, 2, 3):
        layout = {"parallel__expert_parallel": 2, "parallel__zero_stage": zero}
        whole = write_small_config(tmp_path / f"whole{zero}.yaml", shards, tmp_path / f"whole{zero}", **layout)
        parts = write_small_config(tmp_path / f"parts{zero}.yaml", shards, tmp_path / f"parts{zero}", **layout)
        jobs += [
            [str(whole), "never", None],
            [str(parts), "auto", 4],
            [str(parts), "must", 3],
            [str(parts), "auto", None],
        ]
    run_sessions(2, jobs, tmp_path)
    for zero in (0, 1, 2, 3):
        whole_losses = read_losses(tmp_path / f"whole{zero}")
        assert len(whole_losses) == 10
        assert read_losses(tmp_path / f"parts{zero}") == whole_losses, f"ZeRO {zero}"


def test_a_run_resumes_at_another_world_size_placement_and_stage(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = {"parallel__expert_parallel": 2, "parallel__experts_per_rank": [1, 3], "parallel__zero_stage": 1}
    common = {"model__quantize": False}
    started = write_small_config(tmp_path / "a.yaml", shards, folder, **first, **common)
    other = write_small_config(
        tmp_path / "b.yaml", shards, folder, parallel__expert_parallel=4, parallel__zero_stage=3, **common
    )
    whole = write_small_config(tmp_path / "c.yaml", shards, tmp_path / "whole", **common)
    run_sessions(2, [[str(started), "never", 5]], tmp_path)
    run_sessions(4, [[str(other), "must", None]], tmp_path)
    run_sessions(1, [[str(whole), "never", None]], tmp_path)
    apart = [abs(a - b) for a, b in zip(read_losses(folder), read_losses(tmp_path / "whole"), strict=True)]
    assert len(apart) == 10
    assert max(apart) <= 1e-5, apart


def test_the_deepspeed_launcher_trains_and_generate_writes(shards: Path, tmp_path: Path) -> None:
    config = write_small_config(
        tmp_path / "c.yaml",
        shards,
        tmp_path / "run",
        parallel__expert_parallel=2,
        validation__eval_interval=5,
        checkpoint__save_interval=5,
    )
    result = run_command(deepspeed_command(2, TRAIN, "--config", str(config)))
    assert result.exit_code == 0, result.output
    assert "finished at step 10" in result.output
    assert "bits per byte (gzip -9" in result.output
    assert (tmp_path / "run" / "config.yaml").exists()
    _check_scalars(tmp_path / "run" / "tensorboard")
    options = ["--run", str(tmp_path / "run"), "--prompt", "def ", "--tokens", "20"]
    written = run_command([sys.executable, "launch/generate.py", *options])
    assert written.exit_code == 0, written.output
    assert written.output.startswith("def "), written.output
    text, _, last_line = written.output.rpartition("\n[")
    assert "step 10, " in last_line, written.output
    assert run_launch_script("generate", *options).output.rpartition("\n[")[0] == text, "the seed decides the text"


def _check_scalars(folder: Path) -> None:
    board = EventAccumulator(str(folder))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    wanted = {
        "loss/total",
        "loss/language",
        "loss/balance",
        "loss/router_z",
        "optimizer/learning_rate",
        "optimizer/gradient_norm",
        "speed/tokens_per_second",
        "experts/maxvio/layer_1",
        "experts/bias_range/layer_0",
        "experts/router_entropy/layer_0",
        "optimizer/weight_decay",
        "ternary/zero/layer_1",
        "ternary/flips/layer_1",
        "ternary/saturation/layer_0",
        "validation/loss",
        "validation/bits_per_byte",
    }
    assert wanted <= tags, wanted - tags
    pictures = {"experts/load", *(f"{kind}/layer_{layer}" for kind in ("functions", "weights") for layer in (0, 1))}
    assert pictures == set(board.Tags()["images"])
    assert [event.step for event in board.Scalars("loss/total")] == list(range(1, 11))
    zeros = [event.value for event in board.Scalars("ternary/zero/layer_1")]
    assert all(0.2 < share < 0.45 for share in zeros), "Gaussian latents give 31 % zeros"


def test_a_plain_process_told_to_stop_saves_and_resumes_exactly(shards: Path, tmp_path: Path) -> None:
    config = write_small_config(tmp_path / "c.yaml", shards, tmp_path / "run", training__steps=400)
    process = start_command([sys.executable, TRAIN, "--config", str(config)])
    wait_for_steps(process, tmp_path / "run", 3)
    process.send_signal(signal.SIGTERM)
    ended = wait_for_exit(process, timeout=60)
    assert ended.exit_code == 0, ended.output
    assert "stopped at step" in ended.output
    stopped = len(read_losses(tmp_path / "run"))
    assert 3 <= stopped < 400
    again = run_training(1, "--config", str(config), "--resume", "must", "--stop-after", "5")
    assert again.exit_code == 0, again.output
    assert f"at step {stopped}" in again.output
    assert len(read_losses(tmp_path / "run")) == stopped + 5


def test_losses_are_the_same_with_recomputed_and_offloaded_activations(shards: Path, tmp_path: Path) -> None:
    jobs = []
    for zero in (1, 3):
        for kept in ("keep", "recompute", "offload"):
            name = f"{kept}{zero}"
            path = write_small_config(
                tmp_path / f"{name}.yaml",
                shards,
                tmp_path / name,
                parallel__expert_parallel=2,
                parallel__zero_stage=zero,
                model__activation_checkpointing=kept,
                model__quantize=False,
            )
            jobs.append([str(path), "never", None])
    run_sessions(2, jobs, tmp_path)
    for zero in (1, 3):
        kept_losses = read_losses(tmp_path / f"keep{zero}")
        assert len(kept_losses) == 10
        for other in ("recompute", "offload"):
            assert read_losses(tmp_path / f"{other}{zero}") == pytest.approx(kept_losses, abs=1e-5)


def test_bf16_trains_and_resumes_under_every_stage(shards: Path, tmp_path: Path) -> None:
    jobs: list[list[object]] = []
    for zero in (0, 1, 2, 3):
        for name, stops in (("whole", [None]), ("parts", [6, None])):
            path = write_small_config(
                tmp_path / f"{name}{zero}.yaml",
                shards,
                tmp_path / f"{name}{zero}",
                parallel__expert_parallel=2,
                parallel__zero_stage=zero,
                training__precision="bf16",
            )
            jobs += [[str(path), "auto", stop] for stop in stops]
    run_sessions(2, jobs, tmp_path)
    for zero in (0, 1, 2, 3):
        whole = read_losses(tmp_path / f"whole{zero}")
        assert whole[-1] < whole[0] - 0.1
        assert read_losses(tmp_path / f"parts{zero}") == whole, f"ZeRO {zero}"


def test_tensorboard_shows_every_step_once_after_a_resume(shards: Path, tmp_path: Path) -> None:
    config = write_small_config(tmp_path / "c.yaml", shards, tmp_path / "run")
    run_sessions(1, [[str(config), "auto", 4], [str(config), "must", None]], tmp_path)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss/total")] == list(range(1, 11))


def test_mpirun_starts_a_run(shards: Path, tmp_path: Path) -> None:
    launcher = Path(sys.executable).parent / "mpirun"
    if not launcher.exists():
        pytest.skip("the mpi extra is not installed")
    config = write_small_config(tmp_path / "c.yaml", shards, tmp_path / "run", parallel__expert_parallel=2)
    result = run_command([str(launcher), "-n", "2", sys.executable, TRAIN, "--config", str(config)])
    assert result.exit_code == 0, result.output
    assert len(read_losses(tmp_path / "run")) == 10
