"""Fixtures shared by the tests that train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.runs import make_shards

# Several test processes share the cores; small products are slower on many threads than on one.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data"))
