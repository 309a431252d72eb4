"""What a run prints: a step's line in 80 columns, numbers and times in five characters, the FLOPs behind MFU."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kabrn_dist.config.file import load_config
from kabrn_dist.planner.flops import flops_per_token
from kabrn_dist.train.console import format_count, format_duration, format_step, format_text
from kabrn_dist.train.phase_timer import PhaseTimer
from kabrn_dist.train.throughput import TimeLeft
from tests.support.runs import read_losses, run_sessions, write_small_config


@pytest.mark.parametrize("norm", [0.001, 9.999, 99.99, 9999.0, 1.5e7, math.inf])
@pytest.mark.parametrize("speed", [3.0, 9999.6, 99_999.0, 999_999.0, 1e9])
def test_a_step_fits_80_columns(norm: float, speed: float) -> None:
    values = {
        "loss/total": 10.55641,
        "optimizer/learning_rate": 3.0e-4,
        "optimizer/gradient_norm": norm,
        "speed/tokens_per_second": speed,
        "speed/mfu": 0.987,
        "progress/seconds_left": 360_000.0,
    }
    line = format_step(999_999, values, True)
    assert len(line) <= 80 and line.startswith("step 999999  loss 10.556  lr 3.0e-4  grad "), line
    assert format_step(5, values, False).endswith("  SKIPPED")


def test_numbers_and_times_are_short() -> None:
    for exponent in range(-20, 110):
        assert len(format_count(10 ** (exponent / 8))) <= 6
        assert len(format_duration(10 ** min(8, exponent / 14))) <= 6
    assert [format_count(value) for value in (999, 9999.6, 99_960, 999_960)] == ["999", "10.0k", "100k", "1.00M"]


def test_a_sample_cannot_control_the_terminal() -> None:
    assert format_text("a\x1b[2J\nb\x07") == "a·[2J b·"


def test_phases_add_up_until_they_are_taken() -> None:
    timer = PhaseTimer()
    for _ in range(2):
        with timer.span("data"):
            pass
    assert set(timer.take()) == {"data"} and timer.take() == {}


def test_time_left_is_known_from_the_second_step_of_a_session() -> None:
    left = TimeLeft(10, done=3)
    assert math.isnan(left.seconds(4, 9.0)) and left.seconds(5, 1.0) >= 0 and left.seconds(10, 1.0) == 0
    assert TimeLeft(10, done=3).seconds(6, 0.5) == 2.0, "the first line of the log already has it"


def test_flops_by_hand(shards: Path, tmp_path: Path) -> None:
    config = load_config(write_small_config(tmp_path / "c.yaml", shards, tmp_path / "run", model__layers="RA")).model
    # Two heads of key width 8 and value width 16, chunks of 8 tokens, 32 tokens.
    retention = 3 * 2 * (8 * (8 + 16) + 4 * 8 * 16)
    attention = 3 * 2 * 32 * (8 + 16)
    assert flops_per_token(config, 32, 1000) == 6 * 1000 + retention + attention


LAYOUTS = {
    1: [{}],
    2: [
        {"parallel__expert_parallel": 2, "parallel__zero_stage": 3},
        {"parallel__sequence_parallel": 2, "parallel__zero_stage": 1, "parallel__shard_ternary": True},
    ],
}


def test_every_layout_writes_a_sample_and_trains_as_without(shards: Path, tmp_path: Path) -> None:
    # Pictures of each layer are drawn with each validation.
    common = {"training__steps": 4, "validation__eval_interval": 2, "model__layers": 1}
    texts = {}
    for world, layouts in LAYOUTS.items():
        jobs: list[list[object]] = []
        for number, layout in enumerate(layouts):
            for tokens in (0, 12):
                name = f"w{world}-{number}-{tokens}"
                changes = {**common, **layout, "validation__sample_tokens": tokens}
                path = write_small_config(tmp_path / f"{name}.yaml", shards, tmp_path / name, **changes)
                jobs.append([str(path), "never", None])
        run_sessions(world, jobs, tmp_path)
        for number in range(len(layouts)):
            without, with_sample = (tmp_path / f"w{world}-{number}-{tokens}" for tokens in (0, 12))
            for key in ("loss/total", "validation/loss", "optimizer/gradient_norm"):
                assert read_losses(with_sample, key) == read_losses(without, key), (world, number, key)
            board = EventAccumulator(str(with_sample / "tensorboard"))
            board.Reload()
            samples = board.Tensors("sample/text_summary")
            assert [sample.step for sample in samples] == [2, 4]
            texts[world, number] = samples[0].tensor_proto.string_val[0]
            entries = [json.loads(line) for line in (without / "log.jsonl").read_text().splitlines()]
            copies = {entry["step"]: entry["experts/copies"] for entry in entries if "experts/copies" in entry}
            if "parallel__expert_parallel" in layouts[number]:
                # Step 3 comes after a validation, whose exchange is not its own.
                assert sum(map(sum, copies[3])) == sum(map(sum, copies[2]))
            entry = json.loads((with_sample / "log.jsonl").read_text().splitlines()[1])
            assert {f"time/{phase}" for phase in ("data", "forward_backward", "sync", "optimizer", "log")} <= set(entry)
            assert 0 < entry["speed/mfu"] < 1
    assert texts[1, 0]
