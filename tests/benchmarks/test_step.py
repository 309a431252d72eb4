"""The benchmark of whole steps: rivals of equal size, time counted for the part that takes it, and its command."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.step import list_cases
from benchmarks.step_models import Case, draw_tokens, make_dense, make_large_dense
from benchmarks.step_parts import measure_parts
from tests.benchmarks.test_benchmarks import check_form
from tests.support.runs import start_command, wait_for_exit

SMALL = Case(128, 2, 64, 2, 8, 2, "fp32")


class Wait(torch.autograd.Function):
    """Sleeps in forward and, five times as long, in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        time.sleep(5 * ctx.seconds)
        return grad, None


class Slow(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Wait.apply(x, self.seconds)
        return out


def test_time_is_counted_for_the_innermost_part_and_its_direction() -> None:
    outer, inner, last = nn.Sequential(Slow(0.01), Slow(0.02)), Slow(0.02), Slow(0.03)
    outer[1] = inner
    x = torch.ones(3, requires_grad=True)

    def forward_backward() -> None:
        last(outer(x)).sum().backward()

    parts = measure_parts({"outer": [outer], "inner": [inner], "last": [last]}, forward_backward, lambda: None)
    expected = {"outer": 0.01, "inner": 0.02, "last": 0.03}
    for name, seconds in expected.items():
        assert parts[f"{name} forward"] >= seconds and parts[f"{name} backward"] >= 5 * seconds
    # Nothing is counted twice: what sleeps elsewhere would more than double the shortest.
    assert parts["outer forward"] < parts["inner forward"] < parts["last forward"]
    assert parts["outer backward"] < parts["inner backward"] < parts["last backward"]
    assert not [hooks for module in (outer, inner, last) for hooks in module._forward_hooks]


def test_rivals_have_as_many_parameters() -> None:
    counts = SMALL.count()
    active, total = make_dense(SMALL), make_large_dense(SMALL)
    assert abs(active.active / counts.active - 1) < 0.01
    assert abs(total.total / counts.total - 1) < 0.01
    before = [p.detach().clone() for p in active.model.parameters()]
    active.forward_backward()
    active.update()
    assert any(not torch.equal(a, b) for a, b in zip(before, active.model.parameters(), strict=True))


def test_the_whole_benchmark_has_every_shape() -> None:
    cases = list(list_cases(quick=False))
    assert len(cases) == len(set(cases)) == 3 * 3 * 2 * 2
    assert {case.tokens for case in cases} == {4096}
    drawn = draw_tokens(SMALL)
    assert len({tokens.numpy().tobytes() for tokens, _ in drawn}) == len(drawn) > 1
    for tokens, targets in drawn:
        assert tokens.shape == (2, 64) and torch.equal(tokens[:, 1:], targets[:, :-1])


@pytest.mark.slow
def test_step(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    command = [sys.executable, "-m", "benchmarks.step", "--quick", "--json", str(path)]
    result = wait_for_exit(start_command(command, CUDA_VISIBLE_DEVICES=""), timeout=600)
    assert result.exit_code == 0, result.output
    content = json.loads(path.read_text())
    check_form(content)
    names = [row["name"] for row in content["rows"]]
    for part in (
        "dense",
        "Mixtral",
        "floor",
        "mixer forward",
        "experts backward",
        "optimizer",
        "peak",
        "two processes",
    ):
        assert any(part in name for name in names), part
    rows = {row["name"]: row for row in content["rows"]}
    rates = [row for name, row in rows.items() if "rate" in name and "dense" in name]
    assert len(rates) == 3 and all(row["ours"] > 0 for row in rates)
