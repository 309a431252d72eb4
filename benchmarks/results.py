"""Read the committed results of the benchmarks: benchmarks/results/*.json, and the runs of quality.jsonl."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

NOT_MEASURED = "not measured"
MEGA = 1e-6
# A benchmark itself takes one of each core.
LOAD_PER_CORE = 2.0


@dataclass(frozen=True)
class ModelQuality:
    """One model of `benchmarks/quality.py`, over its seeds.

    Attributes:
        model: its letter.
        rate: the learning rate.
        nats: the mean validation loss of a character.
        seeds: number of runs.
        megabytes: of the weights, at 2 bits a ternary weight and 2 bytes any other.
        active: parameters that a character passes through.
    """

    model: str
    rate: float
    nats: float
    seeds: int
    megabytes: float
    active: int


class Results:
    """All results in a folder, read when they are needed.

    Args:
        folder: holds NAME.json of each benchmark that was run, and quality.jsonl.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reports: dict[str, dict[str, Any]] = {}

    def report(self, benchmark: str) -> dict[str, Any]:
        """Return the JSON of a benchmark, without rows where it was not run."""
        if benchmark not in self._reports:
            path = self.folder / f"{benchmark}.json"
            empty: dict[str, Any] = {"machine": {}, "rows": [], "aims": {}}
            self._reports[benchmark] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else empty
        return self._reports[benchmark]

    def row(self, benchmark: str, pattern: str) -> dict[str, Any] | None:
        """Return the first row whose whole name matches a regular expression, None where there is none."""
        rows = self.report(benchmark)["rows"]
        return next((row for row in rows if re.fullmatch(pattern, row["name"])), None)

    def is_busy(self, benchmark: str) -> bool:
        """Return True if the machine did much else while a benchmark ran, so that its times mean little."""
        about = self.report(benchmark)["machine"]
        return bool(about) and about["load"] > LOAD_PER_CORE * about["cores"]

    def figure(self, benchmark: str, pattern: str, field: str) -> float | None:
        """Return a figure of a row: `ours`, `rival`, `ratio` (rival / ours) or `share` (ours / rival)."""
        row = self.row(benchmark, pattern)
        if row is None:
            return None
        ratio = row["ratio"]
        value = (1 / ratio if ratio else None) if field == "share" else row[field]
        return value if isinstance(value, int | float) else None

    def aim(self, benchmark: str, name: str) -> float | None:
        """Return the measured figure of an aim, None where there is none."""
        aim = self.report(benchmark)["aims"].get(name, {})
        return aim.get("measured")

    def text(self, name: str) -> str:
        """Return a file of text, such as the output of the demo; "not measured" where there is none."""
        path = self.folder / name
        return path.read_text(encoding="utf-8").rstrip("\n") if path.exists() else NOT_MEASURED

    @cached_property
    def quality(self) -> dict[str, ModelQuality]:
        """The models of the quality benchmark by letter, each at its best rate."""
        path = self.folder / "quality.jsonl"
        runs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        models = {}
        for model in sorted({run["model"] for run in runs}):
            of_model = [run for run in runs if run["model"] == model]
            best = min((run for run in of_model if run["seed"] == 1), key=lambda run: run["nats"])
            seeds = [run for run in of_model if run["rate"] == best["rate"]]
            nats = sum(run["nats"] for run in seeds) / len(seeds)
            size = best["size"]
            models[model] = ModelQuality(
                model, best["rate"], nats, len(seeds), size["bytes"] * MEGA, round(size["active"])
            )
        return models


def format_number(value: float | None) -> str:
    """Return a figure as the documents show it: three digits, whole numbers from 1,000 on."""
    if value is None:
        return NOT_MEASURED
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
