"""What a run says of itself: a console line and a bar for people, log.jsonl and TensorBoard for later."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from kabrn_dist.metrics.writer import LogWriter
from kabrn_dist.plots.figure import to_pixels


class MetricsLogger:
    """Writes on the first rank only; on the others every call does nothing.

    Args:
        folder: the run's folder.
        active: True on the rank that writes.
        step: steps done before this session; what TensorBoard holds beyond them (an earlier session's lost steps) is
            hidden.
        steps: last step of the run.

    Raises:
        UserError: where the files cannot be opened.
    """

    def __init__(self, folder: Path, active: bool, step: int, steps: int) -> None:
        self.active = active
        if not active:
            return
        self._journal = LogWriter(folder, step)
        # A pipe or a file gets whole lines; only a terminal is folded to its width and gets the bar.
        self._console = Console(width=None if Console().is_terminal else 200, highlight=False)
        columns = (TextColumn("step"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._progress.add_task("step", total=steps, completed=step)
        self._progress.start()

    def truncate_after(self, step: int) -> None:
        """Take back what was written of the steps after `step`: the run goes on from there another way."""
        if self.active:
            self._journal.truncate_after(step)
            self.advance(step)

    def print_line(self, text: str) -> None:
        """A line for people."""
        if self.active:
            # Where stdout is a file on a full disk, that is no reason to end.
            with suppress(OSError):
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
        self._journal.write(entry)

        def add(board: SummaryWriter) -> None:
            for name, value in values.items():
                board.add_scalar(name, value, step)

        self._journal.log_tensorboard(step, add)
        self.print_line(line)

    def write_figure(self, step: int, name: str, draw: Callable[[], Figure]) -> None:
        """An image in TensorBoard. Drawing takes up to seconds, so `draw` is called where it is written only."""
        if self.active:
            pixels = to_pixels(draw())
            self._journal.log_tensorboard(step, lambda board: board.add_image(name, pixels, step, dataformats="HWC"))

    def write_text(self, name: str, text: str) -> None:
        """Text in TensorBoard."""
        if self.active:
            self._journal.log_tensorboard(0, lambda board: board.add_text(name, f"```\n{text}\n```", 0))

    def close(self) -> None:
        if self.active:
            self._progress.stop()
            self._journal.close()


def memory_gib(device: torch.device) -> float:
    """Most memory this process has held: on its card, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status").read_text(encoding="ascii") if Path("/proc/self/status").exists() else ""
    kib = next((line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")), "0")
    return int(kib) / 2**20
