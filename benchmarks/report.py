"""What the benchmarks share: fair timing of rivals, rows, aims, a table and a JSON file."""

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

from kabrn_dist.distributed.mesh import keep_freed_memory


@dataclass(frozen=True)
class Row:
    """One comparison. `ratio` is rival / ours: above 1, ours is faster or smaller.

    A rival that could not run has its reason, "missing: …", in place of a number. There is no ratio where a figure is
    missing, nor where ours is 0.
    """

    name: str
    ours: float | None
    rival: float | str
    unit: str
    ratio: float | None


@dataclass(frozen=True)
class Aim:
    """A figure to reach. `measured` is None, and the aim not held, where what it compares could not run."""

    measured: float | None
    aim: float
    holds: bool


@dataclass
class Report:
    """The rows and aims of one run."""

    title: str
    rows: list[Row] = field(default_factory=list)
    aims: dict[str, Aim] = field(default_factory=dict)

    def compare(self, name: str, ours: float | None, rival: float | str, unit: str) -> None:
        """Add a row; `rival` may be "missing: why"."""
        ratio = rival / ours if ours and not isinstance(rival, str) else None
        self.rows.append(Row(name, ours, rival, unit, ratio))

    def at_least(self, what: str, measured: float | None, aim: float) -> None:
        self.aims[what] = Aim(measured, aim, measured is not None and measured >= aim)

    def at_most(self, what: str, measured: float | None, aim: float) -> None:
        self.aims[what] = Aim(measured, aim, measured is not None and measured <= aim)

    def write(self, path: Path) -> None:
        """The JSON of design §9. A reader never sees half a file."""
        content = {
            "machine": describe_machine(),
            "rows": [asdict(row) for row in self.rows],
            "aims": {what: asdict(aim) for what, aim in self.aims.items()},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    def show(self) -> None:
        """Both tables on the console."""
        # Not to a terminal, rich would fold to 80 columns.
        console = Console(width=None if os.isatty(1) else 140)
        machine = " · ".join(f"{key} {value}" for key, value in describe_machine().items())
        console.print(f"[bold]{self.title}[/]\n{machine}", highlight=False)
        rows = Table("", "ours", "rival", "unit", "rival / ours", box=box.SIMPLE_HEAD)
        for row in self.rows:
            rows.add_row(row.name, _number(row.ours), _number(row.rival), row.unit, _number(row.ratio))
        aims = Table("aim", "measured", "wanted", "", box=box.SIMPLE_HEAD)
        for what, aim in self.aims.items():
            verdict = "not measured" if aim.measured is None else "[green]holds[/]" if aim.holds else "[red]missed[/]"
            aims.add_row(what, _number(aim.measured), _number(aim.aim), verdict)
        console.print(rows, aims)


def _number(value: float | str | None) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def run(title: str, questions: Callable[[Report, bool], None]) -> None:
    """The command line every benchmark has: ask the questions, show the tables, write the JSON."""
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
    """The least time of a call of each, in seconds.

    The rivals take turns, so that a busy moment of the machine hits all of them; the least time is the one least
    disturbed. In its turn a function runs as often as its share of `seconds` allows, and at least once.
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
    """Bytes that a forward pass keeps for its backward pass: every storage once, inputs included."""
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
    """What a reader must know before comparing two files; `load` above `cores` tells of a disturbed run."""
    machine = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 1),
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return machine


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
