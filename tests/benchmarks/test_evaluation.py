"""The benchmark of evaluation runs and writes what docs/benchmarks.md says; no time is asserted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.benchmarks.test_benchmarks import check_form
from tests.support.runs import start_command, wait_for_exit


@pytest.mark.slow
def test_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    command = [sys.executable, "-m", "benchmarks.evaluation", "--quick", "--json", str(path)]
    result = wait_for_exit(start_command(command, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"), timeout=600)
    assert result.exit_code == 0, result.output
    content = json.loads(path.read_text())
    check_form(content)
    names = [row["name"] for row in content["rows"]]
    for part in ("batch of 1,", "batch of 32", "rounding", "runtime in C, 1 thread", "few-shot", "choices", "document"):
        assert any(part in name for name in names), f"{part} was left out"
    assert all(row["ours"] > 0 and row["rival"] > 0 for row in content["rows"])
