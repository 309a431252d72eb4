"""The time at which a user started this program, of which the start of a process under a launcher is only a part."""

from __future__ import annotations

import os
import time
from pathlib import Path

# Words in the command lines of processes that start others of one run.
LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed.run", "mpirun", "mpiexec", "hydra", "orted", "prterun")


def launch_time() -> float:
    """Return when this process or the launcher above it was started, in seconds since 1970.

    Where the system does not tell, the time of this call.
    """
    now = time.time()
    pid, age = os.getpid(), 0.0
    while pid > 1:
        try:
            # The name of a program, in parentheses, may hold blanks.
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
            age = max(age, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
            pid = int(fields[1])
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        except (OSError, ValueError, IndexError, AttributeError):
            break
        if not any(word in command for word in LAUNCHERS):
            break
    return now - age
