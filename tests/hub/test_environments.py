"""The environments that stand for other people's machines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support.environments import make_environment, run_in_environment

TRANSFORMERS = ("4.57.6", "5.23.0")


def make_transformers(version: str) -> Path:
    """Return the environment of a version of transformers, with what its Trainer needs."""
    return make_environment(f"transformers-{version}", [f"transformers=={version}", "accelerate"])


@pytest.mark.slow
@pytest.mark.parametrize("version", TRANSFORMERS)
def test_an_environment_has_transformers_and_not_this_package(version: str, tmp_path: Path) -> None:
    environment = make_transformers(version)
    code = (
        "import importlib.metadata as m, importlib.util as u, json\n"
        "print(json.dumps([m.version('transformers'), u.find_spec('kabrn_dist') is None, m.version('torch')]))"
    )
    result = run_in_environment(environment, ["-c", code], tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found == [version, True, torch.__version__]
