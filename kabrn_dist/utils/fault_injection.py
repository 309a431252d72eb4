"""Failures on purpose, for tests: a named point of the code at which this process dies, sleeps, fails or is told.

Off unless KABRN_FAULT is set, to entries `point[@rank][#count]:action` with commas between them, such as
`save.before_rename@1#2:kill`: on rank 1, the second time that it gets there, SIGKILL.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter

VARIABLE = "KABRN_FAULT"

_passed: Counter[str] = Counter()


def inject_fault(point: str) -> bool:
    """Suffer what KABRN_FAULT asks for at `point`; True where it only asks the caller to pretend (action `mark`).

    Actions: kill (SIGKILL), raise (a RuntimeError), sleep (an hour), full (OSError: no space left), mark.
    """
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return False
    _passed[point] += 1
    return any(_strike(point, entry) for entry in wanted.split(","))


def _strike(point: str, entry: str) -> bool:
    place, _, action = entry.rpartition(":")
    place, _, count = place.partition("#")
    name, _, rank = place.partition("@")
    if name != point or (rank and rank != os.environ.get("RANK", "0")) or (count and int(count) != _passed[point]):
        return False
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "raise":
        raise RuntimeError(f"a failure on purpose at {point}")
    elif action == "sleep":
        time.sleep(3600)
    elif action == "full":
        raise OSError(28, "No space left on device")
    return action == "mark"
