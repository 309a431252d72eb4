"""Watch over the launcher: ranks that outlive it would train on where nobody sees or stops them."""

from __future__ import annotations

import os
from pathlib import Path

# Words of the command lines of launchers. A shell that started the ranks by hand may end: they are to go on.
_LAUNCHERS = ("deepspeed.launcher.launch", "torchrun", "torch.distributed.run", "torch.distributed.launch")
# DeepSpeed's launcher starts the parent of the ranks in a process of its own.
_RUNNERS = ("deepspeed.launcher.runner", "deepspeed")


class LauncherWatch:
    """Notices when a launcher that was there at the start has gone, as a killed one does without a signal to its ranks.

    Without a launcher, in a single process or under mpirun, which ends its ranks itself, there is nothing to notice.
    """

    def __init__(self) -> None:
        self._parents: dict[int, int] = {}
        parent = os.getppid()
        if _is_one_of(_LAUNCHERS, parent):
            self._parents[os.getpid()] = parent
            above = _parent_of(parent)
            if _is_one_of(_RUNNERS, above):
                self._parents[parent] = above

    def is_gone(self) -> bool:
        """Return True once a process has another parent than at the start."""
        return any(_parent_of(process) != parent for process, parent in self._parents.items())


def _parent_of(process: int) -> int:
    """Return the parent's number; 0 if it is not known."""
    if process == os.getpid():
        return os.getppid()
    try:
        # The name before it, in parentheses, may hold anything.
        return int(Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _is_one_of(programs: tuple[str, ...], process: int) -> bool:
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    return any(word.rpartition("/")[2] in programs for word in words)
