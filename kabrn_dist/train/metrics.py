"""What a run says of itself: a console line and a bar for people, log.jsonl and TensorBoard for later."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from kabrn_dist.draw.figure import to_pixels


class Metrics:
    """Writes on the first rank only; on the others every call does nothing.

    Args:
        folder: the run's folder.
        active: True on the rank that writes.
        step: steps done before this session; what TensorBoard holds beyond them (an earlier session's lost steps) is
            hidden.
        steps: last step of the run.
    """

    def __init__(self, folder: Path, active: bool, step: int, steps: int) -> None:
        self.folder, self.active = folder, active
        if not active:
            return
        self._open(step)
        # A pipe or a file gets whole lines; only a terminal is folded to its width and gets the bar.
        self._console = Console(width=None if Console().is_terminal else 200, highlight=False)
        columns = (TextColumn("step"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._progress.add_task("step", total=steps, completed=step)
        self._progress.start()

    def _open(self, step: int) -> None:
        _truncate_log(self.folder / "log.jsonl", step)
        self._log = (self.folder / "log.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def rewind(self, step: int) -> None:
        """Take back what was written of the steps after `step`: the run goes on from there another way."""
        if self.active:
            self._log.close()
            self._board.close()
            self._open(step)
            self.advance(step)

    def say(self, text: str) -> None:
        """A line for people."""
        if self.active:
            self._console.print(text, markup=False)

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self.active:
            self._progress.update(self._task, completed=step)

    def write(
        self, step: int, values: Mapping[str, float], line: str, lists: Mapping[str, list[object]] | None = None
    ) -> None:
        """One object in log.jsonl, one scalar a value in TensorBoard, one console line; `lists` go to the log only.

        Values that are not finite are left out: JSON has no name for them.
        """
        if not self.active:
            return
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        entry = {"step": step, "time": round(time.time(), 3), **values, **(lists or {})}
        self._log.write(json.dumps(entry) + "\n")
        self._log.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self.say(line)

    def write_figure(self, step: int, name: str, draw: Callable[[], Figure]) -> None:
        """An image in TensorBoard. Drawing takes up to seconds, so `draw` is called where it is written only."""
        if self.active:
            self._board.add_image(name, to_pixels(draw()), step, dataformats="HWC")

    def write_text(self, name: str, text: str) -> None:
        """Text in TensorBoard."""
        if self.active:
            self._board.add_text(name, f"```\n{text}\n```", 0)

    def close(self) -> None:
        if self.active:
            self._progress.stop()
            self._log.close()
            self._board.close()


def memory_gib(device: torch.device) -> float:
    """Most memory this process has held: on its card, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status").read_text(encoding="ascii") if Path("/proc/self/status").exists() else ""
    kib = next((line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")), "0")
    return int(kib) / 2**20


def _truncate_log(path: Path, step: int) -> None:
    """Drop what a lost session logged beyond the checkpoint that this one starts from."""
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _logged_step(line) <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


def _logged_step(line: str) -> float:
    try:
        entry: Any = json.loads(line)
        return float(entry["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
