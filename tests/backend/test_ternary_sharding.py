"""Ternary matrices shared out over ranks: the same losses as ZeRO 1, the same codes on all ranks, any checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import check_ternary_losses, read_losses, run_sessions, run_worker, write_small_config
from tests.train.test_parity import LARGER

STEPS = 20
SHORT: dict[str, Any] = {"training__steps": 5, "validation__eval_interval": 4}
# World size → (sequence parallelism, expert parallelism, experts per rank, micro-batch, other settings).
LAYOUTS: dict[int, list[tuple[int, int, list[int] | None, int, dict[str, Any]]]] = {
    1: [(1, 1, None, 4, {})],
    2: [
        (1, 1, None, 4, {}),
        (1, 2, [1, 3], 8, {"parallel__ternary_wire_format": "base_three"}),
        (2, 1, None, 8, {"model__activation_checkpointing": "recompute"}),
    ],
    4: [(1, 2, None, 2, {"parallel__bucket_size": 3000}), (2, 2, [3, 1], 4, {}), (4, 4, None, 16, {})],
}


def configure(path: Path, shards: Path, layout: tuple[Any, ...], shared: bool) -> Path:
    sequence, expert, counts, micro, others = layout
    settings: dict[str, Any] = {
        "training__steps": STEPS,
        "parallel__sequence_parallel": sequence,
        "parallel__expert_parallel": expert,
        "parallel__experts_per_rank": counts,
        "parallel__zero_stage": 1,
        "parallel__shard_ternary": shared,
        "training__micro_batch_size": micro,
    }
    return write_small_config(path, shards, path.with_suffix(""), **{**LARGER, **settings, **others})


def test_losses_are_those_of_zero_1_and_codes_agree(shards: Path, tmp_path: Path) -> None:
    plain = configure(tmp_path / "zero.yaml", shards, LAYOUTS[1][0], False)
    run_sessions(1, [[str(plain), "never", None]], tmp_path)
    expected = read_losses(tmp_path / "zero")
    assert len(expected) == STEPS
    for world, layouts in LAYOUTS.items():
        paths = [configure(tmp_path / f"{world}-{i}.yaml", shards, layout, True) for i, layout in enumerate(layouts)]
        (tmp_path / "jobs.json").write_text(json.dumps([str(path) for path in paths]))
        run_worker(world, "tests.workers.shards", str(tmp_path / "jobs.json"), timeout=600)
        for path in paths:
            check_ternary_losses(read_losses(path.with_suffix("")), expected, path.stem)


@pytest.mark.parametrize("form", ["hat", "bspline"])
def test_functions_on_edges_are_drawn_and_learn_as_under_zero_1(form: str, shards: Path, tmp_path: Path) -> None:
    """Their curves hang on the codes, and are drawn before the first step too."""
    jobs: list[list[object]] = []
    for name, shared in (("zero", False), ("shared", True)):
        settings = {"parallel__zero_stage": 1, "parallel__shard_ternary": shared, "model__experts__type": form}
        path = write_small_config(tmp_path / f"{name}.yaml", shards, tmp_path / name, **SHORT, **settings)
        jobs.append([str(path), "never", None])
    run_sessions(1, jobs, tmp_path)
    expected, found = (read_losses(tmp_path / name) for name in ("zero", "shared"))
    assert len(found) == len(expected) == SHORT["training__steps"]
    check_ternary_losses(found, expected, form)


def test_checkpoints_are_those_of_any_stage(shards: Path, tmp_path: Path) -> None:
    """Saved with shares and resumed without them, in every ZeRO stage, and the other way round; bit-equal as it was."""
    steps, half = 8, 4
    small = {
        "training__steps": steps,
        "optimizer__learning_rate": 3.0e-4,
        "parallel__expert_parallel": 2,
        # No width is a multiple of it.
        "model__scale_group_size": 10,
    }
    shared = {"parallel__zero_stage": 1, "parallel__shard_ternary": True}
    whole = write_small_config(tmp_path / "whole.yaml", shards, tmp_path / "whole", **small, **shared)
    first = write_small_config(tmp_path / "first.yaml", shards, tmp_path / "first", **small, **shared)
    other = write_small_config(tmp_path / "other.yaml", shards, tmp_path / "other", **small, parallel__zero_stage=2)
    run_sessions(2, [[str(whole), "never", None], [str(first), "never", half], [str(other), "never", half]], tmp_path)
    after: list[tuple[int, str, str, dict[str, Any]]] = [
        (1, "one", "first", {"parallel__expert_parallel": 1, **shared}),
        (2, "same", "first", shared),
        (2, "zero0", "first", {"parallel__zero_stage": 0}),
        (2, "zero2", "first", {"parallel__zero_stage": 2, "parallel__sequence_parallel": 2}),
        (2, "zero3", "first", {"parallel__zero_stage": 3, "parallel__expert_parallel": 1}),
        (2, "back", "other", shared),
        (4, "wide", "first", {**shared, "parallel__expert_parallel": 4, "parallel__ternary_wire_format": "base_three"}),
    ]
    for world in (1, 2, 4):
        jobs: list[list[object]] = []
        for _, name, source, changes in (case for case in after if case[0] == world):
            path = write_small_config(tmp_path / f"{name}.yaml", shards, tmp_path / name, **{**small, **changes})
            jobs.append([str(path), str(tmp_path / source / "checkpoints" / f"step-{half:08d}"), None])
        run_sessions(world, jobs, tmp_path)
    expected = read_losses(tmp_path / "whole")
    assert len(expected) == steps
    for _, name, _, _ in after:
        found = read_losses(tmp_path / name)
        assert len(found) == steps - half
        if name == "same":
            assert found == expected[half:]
        check_ternary_losses(found, expected[half:], name)
