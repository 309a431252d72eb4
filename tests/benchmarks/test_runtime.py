"""The benchmark of the runtime in C runs and writes what docs/benchmarks.md says; no time is asserted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.benchmarks.test_benchmarks import check_form
from tests.support.runs import start_command, wait_for_exit


@pytest.mark.slow
def test_runtime(tmp_path: Path) -> None:
    path = tmp_path / "runtime.json"
    command = [sys.executable, "-m", "benchmarks.runtime", "--quick", "--json", str(path)]
    result = wait_for_exit(start_command(command, CUDA_VISIBLE_DEVICES=""), timeout=600)
    assert result.exit_code == 0, result.output
    content = json.loads(path.read_text())
    check_form(content)
    names = [row["name"] for row in content["rows"]]
    for part in ("in cache, scalar", "2 threads", "prefill", "100,000", "WebAssembly simd", "onnxruntime", "PyTorch"):
        assert any(part in name for name in names), f"{part} was left out"
    assert content["aims"]["the program, stripped, KiB"]["measured"] > 0
