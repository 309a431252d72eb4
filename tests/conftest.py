"""Fixtures shared by the tests that train, and the mark of tests that start processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.support.markers import starts_processes
from tests.support.runs import make_shards

# Several test processes share the cores; small products are slower on many threads than on one.
torch.set_num_threads(1)
# Commands that tests start take all cores; threads that sleep while they wait leave these to each other.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
TESTS = Path(__file__).parent

# The files that take a minute and more, the longest first. Where test processes take file after file, the last ones
# must be short: else all but one of the processes wait for it.
LONGEST = (
    "train/test_parity.py",
    "docs/test_commands.py",
    "hub/test_hf_clean.py",
    "benchmarks/test_benchmarks.py",
    "train/test_trainer.py",
    "train/test_stop_requests.py",
    "checkpoint/test_kill.py",
    "train/test_guard.py",
    "evaluation/test_lm_eval.py",
    "runtime/test_architectures.py",
    "benchmarks/test_step.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start processes as `distributed`, and begin with the files that take longest."""
    costs: dict[Path, int] = {}
    for item in items:
        if isinstance(item, pytest.Function) and starts_processes(item):
            item.add_marker(pytest.mark.distributed)
        is_long = item.get_closest_marker("slow") or item.get_closest_marker("distributed")
        costs[item.path] = costs.get(item.path, 0) + bool(is_long)
    for number, name in enumerate(reversed(LONGEST), 1):
        path = TESTS / name
        if path in costs:
            costs[path] = len(items) + number
    items.sort(key=lambda item: (-costs[item.path], item.path))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare a small set of shards, once per test process."""
    return make_shards(tmp_path_factory.mktemp("data"))
