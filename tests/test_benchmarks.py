"""Benchmarks run and write what design §9 says. Nothing here asserts a time: the machine is shared."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.report import Report, kept_bytes, measure
from tests.harness import finish, start

NUMBER = (int, float)


def check_form(content: dict[str, Any]) -> None:
    assert set(content) == {"machine", "rows", "aims"}
    assert {"cpu", "cores", "threads", "torch"} <= set(content["machine"])
    for row in content["rows"]:
        assert set(row) == {"name", "ours", "rival", "unit", "ratio"}
        if isinstance(row["rival"], str):
            assert row["rival"].startswith("missing: ") and row["ratio"] is None
        else:
            assert isinstance(row["ours"], NUMBER) and isinstance(row["ratio"], NUMBER)
    for aim in content["aims"].values():
        assert set(aim) == {"measured", "aim", "holds"} and isinstance(aim["holds"], bool)


@pytest.mark.slow
def test_retention(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "retention.json"
    command = [sys.executable, "-m", "benchmarks.retention", "--quick", "--json", str(path)]
    result = finish(start(command, CUDA_VISIBLE_DEVICES=""), timeout=600)
    assert result.code == 0, result.out
    content = json.loads(path.read_text())
    check_form(content)
    names = [row["name"] for row in content["rows"]]
    for rival in ("SDPA", "torchscale", "bare products", "packed", "GPU", "decoding", "kept", "wire"):
        assert any(rival in name for name in names), f"{rival} was left out"
        assert rival in result.out
    # Bytes, unlike times, are the same whatever else the machine does.
    exact = {what: aim for what, aim in content["aims"].items() if "wire" in what or "bytes" in what or "state" in what}
    assert len(exact) >= 2 * 3 * 2 + 4
    assert all(aim["holds"] for aim in exact.values()), exact


def test_missing_rivals_are_named(tmp_path: Path) -> None:
    report = Report("title")
    report.compare("ours alone", 2.0, "missing: torchscale", "ms")
    report.compare("nobody", None, "missing: no CUDA card", "ms")
    report.compare("both", 2.0, 3.0, "ms")
    report.at_least("speed", None, 2.0)
    report.at_least("fast", 2.0, 2.0)
    report.at_most("small", 3.0, 2.0)
    report.write(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    check_form(content)
    assert [row["ratio"] for row in content["rows"]] == [None, None, 1.5]
    assert [aim["holds"] for aim in content["aims"].values()] == [False, True, False]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_measure_lets_rivals_take_turns() -> None:
    calls: list[str] = []
    times = measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0.0, rounds=3)
    assert calls == ["a", "b"] * 3
    assert set(times) == {"a", "b"}


def test_kept_bytes_counts_each_storage_once() -> None:
    x = torch.ones(100, requires_grad=True)
    # exp keeps its result; the product keeps that same result and x.
    assert kept_bytes(lambda: x.exp() * x) == 2 * 100 * 4
