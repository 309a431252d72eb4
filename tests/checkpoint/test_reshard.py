"""A checkpoint goes on in any other layout: every pair of world sizes, every pair of ZeRO stages, the same losses."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest

from kabrn_dist.checkpoint.store import read_manifest
from tests.support.runs import read_losses, run_sessions, write_small_config

SAVED, NEXT = 2, 20
WORLDS = (1, 2, 3, 4, 6)
STAGES = (0, 1, 2, 3)
# A world's four layouts, one for each ZeRO stage: sequence parallelism, experts of each rank, micro-batch.
LAYOUTS: dict[int, tuple[tuple[int, list[int], int], ...]] = {
    1: ((1, [6], 12), (1, [6], 6), (1, [6], 4), (1, [6], 3)),
    2: ((1, [4, 2], 6), (2, [6], 6), (1, [1, 5], 3), (2, [2, 4], 12)),
    3: ((1, [2, 2, 2], 4), (1, [3, 2, 1], 2), (3, [6], 12), (1, [1, 4, 1], 4)),
    4: ((2, [3, 3], 6), (1, [1, 2, 1, 2], 3), (4, [5, 1], 12), (1, [2, 4], 3)),
    6: ((1, [1] * 6, 2), (3, [4, 2], 6), (2, [3, 2, 1], 4), (1, [1, 5], 2)),
}
SMALLER: dict[str, Any] = {
    "data__sequence_length": 24,
    "model__quantize": False,
    "model__layers": 1,
    "model__short_conv_size": 4,
    "model__experts__num_experts": 6,
    # Differences of summation order grow with the rate from step to step.
    "optimizer__learning_rate": 1.0e-3,
    "training__steps": SAVED + NEXT,
    "training__global_batch_size": 12,
    "validation__eval_sequences": 2,
}


def layout(world: int, zero: int) -> dict[str, Any]:
    sequence, experts, micro_batch = LAYOUTS[world][zero]
    return {
        "parallel__sequence_parallel": sequence,
        "parallel__expert_parallel": len(experts),
        "parallel__experts_per_rank": experts,
        "parallel__zero_stage": zero,
        # Several buckets; of stage 3, which gathers a bucket at a time, fewer.
        "parallel__bucket_size": 20000 if zero == 3 else 3000,
        "training__micro_batch_size": micro_batch,
    }


def pairs() -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(world, stage) before → after: all pairs of worlds, and among unlike worlds all pairs of stages."""
    found = [((world, 3 * number % 4), (world, 3 * number % 4)) for number, world in enumerate(WORLDS)]
    for number, after in enumerate(WORLDS):
        others = [world for world in WORLDS if world != after]
        # Each world ends in every stage; from which one moves on with the world, so that all pairs occur.
        found += [((before, (zero + number) % 4), (after, zero)) for zero, before in enumerate(others)]
    return found


class Runs:
    """Configurations and folders of many runs, and what each of them is to do, by world."""

    def __init__(self, shards: Path, folder: Path) -> None:
        self.shards, self.folder = shards, folder
        self.jobs: dict[int, list[list[object]]] = {}

    def add(self, name: str, world: int, resume: str, stop_after: int | None, **changes: Any) -> None:
        path = write_small_config(self.folder / f"{name}.yaml", self.shards, self.folder / name, **SMALLER | changes)
        self.jobs.setdefault(world, []).append([str(path), resume, stop_after])

    def train(self) -> None:
        """All that was added since the last time, one group of processes a world."""
        for world, jobs in self.jobs.items():
            run_sessions(world, jobs, self.folder, timeout=600)
        self.jobs.clear()

    def losses(self, name: str) -> list[float]:
        return read_losses(self.folder / name)

    def checkpoint(self, name: str) -> str:
        return str(self.folder / name / "checkpoints" / f"step-{SAVED:08d}")


@pytest.fixture(scope="module")
def saved(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A checkpoint of each layout that some pair begins with, and the uninterrupted run of a single process."""
    runs = Runs(shards, tmp_path_factory.mktemp("reshard"))
    runs.add("whole", 1, "never", None, **layout(1, 1))
    small = set(itertools.product((1, 2), STAGES))
    for world, zero in sorted(small | {before for before, _ in pairs()}):
        runs.add(f"{world}-{zero}", world, "never", SAVED, **layout(world, zero))
    runs.train()
    return runs


def test_pairs_are_all_there() -> None:
    assert {(a, b) for (a, _), (b, _) in pairs()} == set(itertools.product(WORLDS, WORLDS))
    assert {(z, y) for (a, z), (b, y) in pairs() if a != b} == set(itertools.product(STAGES, STAGES))


def test_the_next_losses_are_those_of_the_uninterrupted_run(saved: Runs) -> None:
    """Every pair of worlds and of stages at parity; in the same layout, bit for bit."""
    for before, after in pairs():
        name = "{}-{}".format(*before)
        world, zero = after
        saved.add(f"{name}to{world}-{zero}", world, saved.checkpoint(name), None, **layout(world, zero))
        if before == after:
            saved.add(f"{name}whole", world, "never", None, **layout(world, zero))
    saved.train()
    reference = saved.losses("whole")
    assert len(reference) == SAVED + NEXT and reference[-1] < reference[0] - 0.1
    apart = {}
    for before, after in pairs():
        name = "{}-{}to{}-{}".format(*before, *after)
        losses = saved.losses(name)
        apart[name] = max(abs(a - b) for a, b in zip(losses, reference[SAVED:], strict=True))
        if before == after:
            assert losses == saved.losses("{}-{}whole".format(*before))[SAVED:], f"{name} is not bit-equal"
        end = read_manifest(saved.folder / name / "checkpoints" / f"step-{SAVED + NEXT:08d}").state
        assert end["cursor"]["consumed"] == (SAVED + NEXT) * SMALLER["training__global_batch_size"]
    print(apart)
    assert max(apart.values()) <= 1e-5, apart


def test_another_split_into_micro_batches(saved: Runs) -> None:
    for micro_batch in (1, 2, 6):
        changes = layout(2, 2) | {"training__micro_batch_size": micro_batch}
        saved.add(f"micro{micro_batch}", 2, saved.checkpoint("2-2"), 5, **changes)
    saved.train()
    for micro_batch in (1, 2, 6):
        apart = zip(saved.losses(f"micro{micro_batch}"), saved.losses("whole")[SAVED:][:5], strict=True)
        assert max(abs(a - b) for a, b in apart) <= 1e-5


@pytest.mark.parametrize("world", [1, 2])
def test_another_precision_goes_on(world: int, saved: Runs) -> None:
    """fp32 → bf16 → fp32, another stage each time: what differs is rounding."""
    for zero in STAGES:
        name, other = f"bf16-{world}-{zero}", (zero + 1) % 4
        bf16 = layout(world, other) | {"training__precision": "bf16"}
        saved.add(name, world, saved.checkpoint(f"{world}-{zero}"), 3, **bf16)
        saved.add(name, world, "must", 2, **layout(world, zero))
    saved.train()
    for zero in STAGES:
        losses = saved.losses(f"bf16-{world}-{zero}")
        assert len(losses) == 5 and all(map(math.isfinite, losses))
        apart = [abs(a - b) for a, b in zip(losses, saved.losses("whole")[SAVED:][:5], strict=True)]
        assert max(apart) <= 0.02, apart
