"""Fault injection for tests: named points in the code at which this process can be made to fail.

Off unless KABRN_FAULT is set, to entries `point[@rank][#count]:action` separated by commas, such as
`save.before_rename@1#2:kill`: SIGKILL on rank 1, the second time that it reaches the point.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter

VARIABLE = "KABRN_FAULT"

_visits: Counter[str] = Counter()


def inject_fault(point: str) -> bool:
    """Trigger the fault that KABRN_FAULT requests at `point`, if any.

    Actions: kill (SIGKILL), raise (a RuntimeError), sleep (an hour), full (OSError: no space left), mark.

    Args:
        point: name of the point.

    Returns:
        True for the action `mark`, with which the caller pretends a fault of its own.
    """
    requested = os.environ.get(VARIABLE)
    if not requested:
        return False
    _visits[point] += 1
    return any(_trigger(point, entry) for entry in requested.split(","))


def _trigger(point: str, entry: str) -> bool:
    location, _, action = entry.rpartition(":")
    location, _, count = location.partition("#")
    name, _, rank = location.partition("@")
    if name != point or (rank and rank != os.environ.get("RANK", "0")) or (count and int(count) != _visits[point]):
        return False
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "raise":
        raise RuntimeError(f"injected fault at {point}")
    elif action == "sleep":
        time.sleep(3600)
    elif action == "full":
        raise OSError(28, "No space left on device")
    return action == "mark"
