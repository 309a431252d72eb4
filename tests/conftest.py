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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start processes as `distributed`."""
    for item in items:
        if isinstance(item, pytest.Function) and starts_processes(item):
            item.add_marker(pytest.mark.distributed)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare a small set of shards, once per test process."""
    return make_shards(tmp_path_factory.mktemp("data"))
