"""Shared by all benchmarks: fair timing of rivals, the report's rows and aims, its tables and its JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kabrn_dist.utils.atomic_io import atomic_write
from kabrn_dist.utils.malloc import keep_freed_memory


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: what was measured, and the rival's name after ", rival: ".
        ours: the figure of this project; None where it could not be measured.
        rival: the rival's figure, or the reason why there is none: "missing: …".
        unit: of both figures.
        ratio: rival / ours, so that above 1 ours is faster or smaller; None where a figure is missing or ours is 0.
    """

    name: str
    ours: float | None
    rival: float | str
    unit: str
    ratio: float | None


@dataclass(frozen=True)
class Aim:
    """A figure to reach.

    Attributes:
        measured: None where what it compares could not run.
        aim: the bound.
        holds: True if the measured figure is on the right side of the bound.
    """

    measured: float | None
    aim: float
    holds: bool


@dataclass
class Report:
    """The rows and aims of one run.

    Attributes:
        title: printed above the tables.
        rows: comparisons, in the order in which they were made.
        aims: by what they ask for.
    """

    title: str
    rows: list[Row] = field(default_factory=list)
    aims: dict[str, Aim] = field(default_factory=dict)

    def compare(self, name: str, ours: float | None, rival: float | str, unit: str) -> None:
        """Add a row; `rival` may be "missing: " and the reason."""
        ratio = rival / ours if ours and not isinstance(rival, str) else None
        self.rows.append(Row(name, ours, rival, unit, ratio))

    def at_least(self, what: str, measured: float | None, aim: float) -> None:
        """Add an aim that holds if `measured` is `aim` or more."""
        self.aims[what] = Aim(measured, aim, measured is not None and measured >= aim)

    def at_most(self, what: str, measured: float | None, aim: float) -> None:
        """Add an aim that holds if `measured` is `aim` or less."""
        self.aims[what] = Aim(measured, aim, measured is not None and measured <= aim)

    def write(self, path: Path) -> None:
        """Write the JSON that docs/benchmarks.md describes. A reader never sees half a file."""
        content = {
            "machine": describe_machine(),
            "rows": [asdict(row) for row in self.rows],
            "aims": {what: asdict(aim) for what, aim in self.aims.items()},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, (json.dumps(content, indent=1) + "\n").encode())

    def show(self) -> None:
        """Print both tables on the console."""
        # Not to a terminal, rich would fold to 80 columns.
        console = Console(width=None if os.isatty(1) else 140)
        machine = " · ".join(f"{key} {value}" for key, value in describe_machine().items())
        console.print(f"[bold]{self.title}[/]\n{machine}", highlight=False)
        rows = Table("", "ours", "rival", "unit", "rival / ours", box=box.SIMPLE_HEAD)
        for row in self.rows:
            rows.add_row(row.name, _number(row.ours), _number(row.rival), row.unit, _number(row.ratio))
        aims = Table("aim", "measured", "bound", "", box=box.SIMPLE_HEAD)
        for what, aim in self.aims.items():
            verdict = "not measured" if aim.measured is None else "[green]holds[/]" if aim.holds else "[red]missed[/]"
            aims.add_row(what, _number(aim.measured), _number(aim.aim), verdict)
        console.print(rows, aims)


def _number(value: float | str | None) -> str:
    if value is None:
        return "not measured"
    return value if isinstance(value, str) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def run(title: str, questions: Callable[[Report, bool], None]) -> None:
    """Run a benchmark's command line: measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--quick", action="store_true", help="a smaller run that ends within a minute on 2 cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and aims there")
    options = parser.parse_args()
    # As training does: without it long inputs measure the page faults of the allocator, for all rivals alike.
    keep_freed_memory()
    report = Report(title)
    questions(report, options.quick)
    report.show()
    if options.json:
        report.write(options.json)


def measure(functions: Mapping[str, Callable[[], object]], seconds: float = 2.0, rounds: int = 3) -> dict[str, float]:
    """Return the shortest time of one call of each function, in seconds.

    The rivals take turns, so that a busy moment of the machine hits all of them; the shortest time is the least
    disturbed one. In its turn a function runs as often as its part of `seconds` allows, and at least once.

    Args:
        functions: by name.
        seconds: for all functions and rounds together.
        rounds: turns of each function.
    """
    least = dict.fromkeys(functions, float("inf"))
    share = seconds / (rounds * len(functions))
    for _ in range(rounds):
        for name, function in functions.items():
            began = time.perf_counter()
            while True:
                start = time.perf_counter()
                function()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                now = time.perf_counter()
                least[name] = min(least[name], now - start)
                if now - began >= share:
                    break
    return least


def kept_bytes(function: Callable[[], object]) -> int:
    """Return the bytes that a forward pass saves for its backward pass: every storage once, inputs included."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    del result
    return sum(storages.values())


def describe_machine() -> dict[str, Any]:
    """Return what a reader must know before comparing two files; a `load` above `cores` means a disturbed run."""
    machine = {
        "cpu": _cpu_info("model name") or platform.processor() or platform.machine(),
        "features": " ".join(_cpu_features()) or "unknown",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 1),
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return machine


def _cpu_features() -> list[str]:
    """Return those extensions of the processor that decide about speed here."""
    flags = _cpu_info("flags").split()
    patterns = {"avx2": "avx2", "avx512": "avx512f", "vnni": "vnni", "amx": "amx_int8"}
    return [name for name, part in patterns.items() if any(part in flag for flag in flags)]


def _cpu_info(key: str) -> str:
    """Return the value of a line of Linux's /proc/cpuinfo, "" where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")
