"""Where a run's metrics go: the console and its progress bar, and through `LogWriter` log.jsonl and TensorBoard."""

from __future__ import annotations

import errno
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kabrn_dist.metrics.writer import LogWriter
from kabrn_dist.utils.terminal import discard_output

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter


class _LastingConsole(Console):
    """A console whose reader may go away: rich would end the process, and with it the run."""

    def on_broken_pipe(self) -> None:
        """Go on in silence: the log has all that the console shows."""
        self.quiet = True
        discard_output(sys.stdout)

    @contextmanager
    def surviving(self) -> Iterator[None]:
        """Go on if stdout is a file on a full disk, or a terminal that has been closed: neither is a reason to end."""
        try:
            yield
        except OSError as error:
            if error.errno == errno.EIO:
                self.on_broken_pipe()


class MetricsLogger:
    """Writes on the first rank only; on the others every call does nothing.

    Args:
        folder: the run's folder.
        active: True on the rank that writes.
        step: steps done before this session; log entries beyond them, which an earlier session lost, are removed.
        steps: last step of the run.

    Raises:
        UserError: if the files cannot be opened.
    """

    def __init__(self, folder: Path, active: bool, step: int, steps: int) -> None:
        self.active = active
        if not active:
            return
        self._writer = LogWriter(folder, step)
        # A pipe or a file gets whole lines; only a terminal is folded to its width and gets the bar.
        self._console = _LastingConsole(width=None if Console().is_terminal else 200, highlight=False)
        columns = (TextColumn("step"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._progress.add_task("step", total=steps, completed=step)
        self._progress.start()

    def truncate_after(self, step: int) -> None:
        """Remove what was written of the steps after `step`: the run continues from there with other data."""
        if self.active:
            self._writer.truncate_after(step)
            self.advance(step)

    def print_line(self, text: str) -> None:
        """Print a line on the console."""
        if self.active:
            with self._console.surviving():
                self._console.print(text, markup=False, soft_wrap=not self._console.is_terminal)

    def advance(self, step: int) -> None:
        """Move the progress bar to `step`."""
        if self.active:
            self._progress.update(self._task, completed=step)

    def write(
        self, step: int, values: Mapping[str, float], line: str, lists: Mapping[str, list[object]] | None = None
    ) -> None:
        """Write one object to log.jsonl, one scalar per value to TensorBoard, and one line to the console.

        Args:
            step: steps done.
            values: scalars by name. Those that are not finite are left out: JSON has no name for them.
            line: the console's line.
            lists: what goes to log.jsonl only.
        """
        if not self.active:
            return
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        entry = {"step": step, "time": round(time.time(), 3), **values, **(lists or {})}
        self._writer.write(entry)

        def add(board: SummaryWriter) -> None:
            for name, value in values.items():
                board.add_scalar(name, value, step)

        self._writer.log_tensorboard(step, add)
        self.print_line(line)

    def write_figure(self, step: int, name: str, draw: Callable[[], Figure]) -> None:
        """Write an image to TensorBoard.

        Args:
            step: steps done.
            name: the image's tag.
            draw: makes the figure. It takes up to seconds and needs matplotlib, so only the writing rank calls it.
        """
        if self.active:
            from kabrn_dist.plots.figure import to_pixels

            pixels = to_pixels(draw())
            self._writer.log_tensorboard(step, lambda board: board.add_image(name, pixels, step, dataformats="HWC"))

    def write_text(self, step: int, name: str, text: str) -> None:
        """Write a text to TensorBoard, as it is."""
        if self.active:
            # Markdown: four spaces in front of each line keep all else from having a meaning.
            block = "\n".join(f"    {line}" for line in text.split("\n"))
            self._writer.log_tensorboard(step, lambda board: board.add_text(name, block, step))

    def close(self) -> None:
        """Stop the progress bar and close the files. A second call does nothing."""
        if self.active:
            with self._console.surviving():
                self._progress.stop()
            self._writer.close()


def memory_gib(device: torch.device) -> float:
    """Return the most memory this process has held, in GiB: on its card, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status").read_text(encoding="ascii") if Path("/proc/self/status").exists() else ""
    kib = next((line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")), "0")
    return int(kib) / 2**20
