"""A small run, trained for real, that learns in a chat."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import run_sessions, write_small_config


@pytest.fixture(scope="session")
def base_run(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """Folder of a run of 80 steps on bytes."""
    folder = tmp_path_factory.mktemp("learning")
    config = write_small_config(
        folder / "config.yaml",
        shards,
        folder / "run",
        training__steps=80,
        model__hidden_size=48,
        data__sequence_length=128,
    )
    run_sessions(1, [[str(config), "never", None]], folder)
    return folder / "run"
