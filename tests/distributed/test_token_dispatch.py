"""Expert parallelism on real processes: the same values and gradients as one process, whatever the placement."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable

import pytest
import torch
import torch.multiprocessing as mp

from kabrn_dist.distributed.expert_placement import ExpertPlacement
from kabrn_dist.distributed.launch_env import free_port
from kabrn_dist.distributed.stochastic_rounding import round_rows
from tests.workers import dispatch as dispatch_worker
from tests.workers import mixture as mixture_worker

multiprocessing.set_forkserver_preload(["torch", "pytest", "tests.workers.dispatch", "tests.workers.mixture"])


@pytest.mark.parametrize("world", sorted(dispatch_worker.CASES))
def test_every_rank_has_the_values_and_gradients_of_one_process(world: int) -> None:
    run(dispatch_worker.work, world)


@pytest.mark.parametrize("world", sorted(mixture_worker.CASES))
def test_mixtures_and_models_on_every_rank(world: int) -> None:
    run(mixture_worker.work, world)


def run(work: Callable[[int, int, int], None], world: int) -> None:
    """Run `work(rank, world, port)` in so many processes."""
    context = mp.start_processes(work, (world, free_port()), nprocs=world, join=False, start_method="forkserver")
    # A rank that waits for another for ever must fail the test, not stop it.
    end = time.monotonic() + 60
    while not context.join(timeout=1):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            pytest.fail(f"{world} processes hang")


@pytest.mark.parametrize("counts", [(3,), (1, 3), (4, 1, 3)])
def test_placement_covers_every_expert_once(counts: tuple[int, ...]) -> None:
    ranges = [ExpertPlacement(counts, rank).local for rank in range(len(counts))]
    assert [expert for local in ranges for expert in local] == list(range(sum(counts)))
    assert [len(local) for local in ranges] == list(counts)
    assert ExpertPlacement(counts, 0).total == sum(counts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_right_on_average(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    one = torch.randn(64).to(dtype)
    # The same row 4,000 times: noise differs by place.
    codes, step = round_rows(one.repeat(4000, 1))
    values = codes.to(step.dtype) * step
    assert codes.dtype == torch.int8 and step.shape == (4000, 1)
    assert ((values - one.to(step.dtype)).abs() <= step * 1.001).all()
    # The mean of 4,000 roundings has a deviation of half a step / √4000 at most.
    off = (values.mean(0) - one.to(step.dtype)) / step[0]
    assert off.abs().max() < 4.5 * 0.5 / 4000**0.5 and off.mean().abs() < 4 * 0.5 / (64 * 4000) ** 0.5
    again, _ = round_rows(one.repeat(4000, 1))
    assert torch.equal(again, codes)


def test_rounding_keeps_zeros_and_does_not_hide_an_overflow() -> None:
    rows = torch.tensor([[0.0, 0.0, 0.0], [1.0, float("inf"), 0.0], [1.0, float("nan"), 2.0], [-3e-38, 1e-38, 0.0]])
    codes, step = round_rows(rows)
    values = codes * step
    assert torch.equal(values[0], torch.zeros(3))
    assert not values[1].isfinite().any() and not values[2].isfinite().any()
    assert values[3].isfinite().all() and round_rows(rows[:0])[0].shape == (0, 3)
