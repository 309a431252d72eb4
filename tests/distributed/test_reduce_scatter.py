"""Sums at their owners: what a reduce-scatter gives, for half of what gloo's sends."""

from __future__ import annotations

import pytest

from tests.support.runs import run_worker


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_each_rank_gets_the_sum_of_its_piece(world: int) -> None:
    run_worker(world, "tests.workers.reduce_scatter")
