"""Experts for each rank: shares by weight and room, found at the start, and changed between sessions."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from kabrn_dist.checkpoint.store import read_manifest
from kabrn_dist.config import Config
from kabrn_dist.config.file import load_config
from kabrn_dist.distributed.expert_placement import ExpertPlacement, allocate_experts, plan_expert_counts
from kabrn_dist.distributed.mesh import single_process_mesh
from kabrn_dist.planner.estimate import describe_plan
from kabrn_dist.train.expert_balance import count_room, describe_placement, level, resolve_placement
from kabrn_dist.utils.errors import UserError
from tests.support.runs import read_losses, run_sessions, write_small_config


@pytest.mark.parametrize(
    ("experts", "weights", "most", "shares"),
    [
        (8, [1, 3, 1, 3], None, (1, 3, 1, 3)),
        (8, [1, 1], None, (4, 4)),
        (7, [1, 1], None, (4, 3)),
        (4, [1, 1000], None, (1, 3)),
        (16, [0.5, 1.5], None, (4, 12)),
        (10, [5.5, 1.5, 1.5, 1.5], None, (7, 1, 1, 1)),
        (8, [1, 3], [8, 4], (4, 4)),
        (10, [8, 1, 1], [2, 9, 9], (2, 4, 4)),
        (3, [1], None, (3,)),
        (2, [9, 1], None, (1, 1)),
    ],
)
def test_shares(experts: int, weights: list[float], most: list[int] | None, shares: tuple[int, ...]) -> None:
    assert allocate_experts(experts, weights, most) == shares


def test_no_other_shares_end_earlier() -> None:
    """Against all shares there are: none has a lower longest time."""
    generator = torch.Generator().manual_seed(3)
    for experts, ranks in ((5, 2), (7, 3), (9, 4), (12, 3)):
        for _ in range(20):
            weights = (torch.rand(ranks, generator=generator) + 0.1).tolist()
            room = torch.randint(1, experts + 1, (ranks,), generator=generator).tolist()
            every = itertools.product(*(range(1, most + 1) for most in room))
            allowed = [counts for counts in every if sum(counts) == experts]
            if not allowed:
                continue
            longest = [max(n / w for n, w in zip(counts, weights, strict=True)) for counts in allowed]
            found = allocate_experts(experts, weights, room)
            assert found in allowed
            assert max(n / w for n, w in zip(found, weights, strict=True)) == min(longest)


def test_what_cannot_be_shared_out_is_refused_with_the_numbers() -> None:
    with pytest.raises(UserError, match=r"num_experts 3 .* 4 ranks .* parallel.expert_parallel to 3"):
        allocate_experts(3, [1, 1, 1, 1])
    with pytest.raises(UserError, match=r"\[2, 3\] experts of model.experts.num_experts 8"):
        allocate_experts(8, [1, 1], [2, 3])
    with pytest.raises(UserError, match=r"\[0, 9\]"):
        allocate_experts(8, [1, 1], [0, 9])


def test_like_speeds_are_level() -> None:
    assert level([1.0, 0.9, 0.85]) == [1.0, 1.0, 1.0]
    assert level([0.5, 1.0, 0.45, 0.97]) == [0.5, 1.0, 0.5, 1.0]
    assert level([3.0]) == [3.0]
    assert allocate_experts(64, level([0.93, 1.0])) == (32, 32)


def test_local_experts_are_contiguous_and_all_are_somewhere() -> None:
    placements = [ExpertPlacement((1, 3, 2), rank) for rank in range(3)]
    assert [expert for placement in placements for expert in placement.local] == list(range(6))


def configure(folder: Path, **changes: object) -> Config:
    changes = {"model__experts__num_experts": 8} | changes
    return load_config(write_small_config(folder / "config.yaml", folder / "shards", folder / "run", **changes))


def test_room_follows_memory_and_what_zero_shares_out(tmp_path: Path) -> None:
    gib = 2.0**30
    rooms = []
    for stage in (0, 1, 2, 3):
        config = configure(tmp_path, parallel__expert_parallel=2, parallel__zero_stage=stage)
        rooms.append(count_room(config, 8, [1e-3 * gib, 2e-3 * gib, 0.0]))
        assert rooms[-1][2] == 0
    assert all(one < two for one, two, _ in rooms)
    assert all(lower <= higher for a, b in itertools.pairwise(rooms) for lower, higher in zip(a, b, strict=True))
    assert rooms[0] != rooms[3]


def test_auto_is_planned_resolved_and_told(tmp_path: Path) -> None:
    auto = {"parallel__expert_parallel": 2, "parallel__experts_per_rank": "auto"}
    given = configure(tmp_path, **auto, parallel__rank_weights=[1, 3])
    assert plan_expert_counts(given) == (2, 6) and "[2, 6]" in describe_plan(given, 2)
    measured = configure(tmp_path, **auto)
    assert plan_expert_counts(measured) is None and "auto: measured at the start" in describe_plan(measured, 4)
    one = configure(tmp_path, parallel__experts_per_rank="auto")
    one.check_world_size(1)
    assert resolve_placement(one, single_process_mesh()) is one and plan_expert_counts(one) == (8,)
    even = configure(tmp_path, parallel__expert_parallel=2)
    assert plan_expert_counts(even) == (4, 4) and resolve_placement(even, single_process_mesh()) is even


def test_what_was_measured_is_told() -> None:
    line = describe_placement([2e9, 1e9], [2.0**33, 2.0**34], [5, 9], [5, 3])
    for words in ("2.0 GFLOP/s, 8.00 GiB free, room for 5", "1.0 GFLOP/s, 16.00 GiB free, room for 9", "[5, 3]"):
        assert words in line


def test_what_is_measured_trains_and_another_vector_goes_on(shards: Path, tmp_path: Path) -> None:
    """Two ranks: shares measured, then 1:3, then 3:1, in one run; the losses are those of one process."""
    plain = {"model__quantize": False, "training__steps": 6, "checkpoint__keep_last": 3}
    whole = write_small_config(tmp_path / "whole.yaml", shards, tmp_path / "whole", **plain)
    run_sessions(1, [[str(whole), "never", None]], tmp_path)
    jobs: list[list[object]] = []
    for number, (zero, weights) in enumerate([(2, None), (3, [1, 3]), (1, [3, 1])]):
        layout = {
            "expert_parallel": 2,
            "experts_per_rank": "auto",
            "rank_weights": weights,
            "zero_stage": zero,
            "bucket_size": 3000,
        }
        changes = plain | {f"parallel__{key}": value for key, value in layout.items()}
        path = write_small_config(tmp_path / f"{number}.yaml", shards, tmp_path / "run", **changes)
        jobs.append([str(path), "must" if number else "never", 2])
    run_sessions(2, jobs, tmp_path)
    found = [read_manifest(tmp_path / "run" / "checkpoints" / f"step-{step:08d}").state for step in (2, 4, 6)]
    measured, *given = [Config.model_validate(state["config"]).parallel for state in found]
    assert sum(measured.experts_per_rank or ()) == 4 and min(measured.experts_per_rank or ()) >= 1
    assert [parallel.experts_per_rank for parallel in given] == [(1, 3), (3, 1)]
    assert load_config(tmp_path / "run" / "config.yaml").parallel == given[-1]
    losses, reference = read_losses(tmp_path / "run"), read_losses(tmp_path / "whole")
    assert max(abs(a - b) for a, b in zip(losses, reference, strict=True)) <= 1e-5


def test_uneven_shares_in_half_precision(shards: Path, tmp_path: Path) -> None:
    """Four ranks, each expert on two of them, two micro-batches a step, clipping, tiny buckets: beside even shares."""
    half = {
        "model__quantize": False,
        "training__precision": "bf16",
        "training__micro_batch_size": 1,
        "training__steps": 5,
    }
    jobs: list[list[object]] = []
    for zero, kept in ((1, "keep"), (2, "recompute"), (3, "offload")):
        for counts in ([2, 2], [1, 3]):
            layout = {"expert_parallel": 2, "experts_per_rank": counts, "zero_stage": zero, "bucket_size": 1001}
            changes = half | {f"parallel__{key}": value for key, value in layout.items()}
            name = f"{zero}-{counts[0]}"
            path = write_small_config(
                tmp_path / f"{name}.yaml", shards, tmp_path / name, **changes, model__activation_checkpointing=kept
            )
            jobs.append([str(path), "never", None])
    run_sessions(4, jobs, tmp_path)
    for zero in (1, 2, 3):
        even, uneven = (read_losses(tmp_path / f"{zero}-{first}") for first in (2, 1))
        assert len(even) == 5 and even[-1] < even[0] - 0.1
        apart = [abs(a - b) for a, b in zip(even, uneven, strict=True)]
        print(zero, apart)
        assert max(apart) <= 0.01
