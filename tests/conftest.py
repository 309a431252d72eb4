"""Fixtures shared by the tests that train."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import make_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data"))
