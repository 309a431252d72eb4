"""One of the other processes of `--workers N`: data_prep.workers starts it with a socket to the first, and a job."""

from __future__ import annotations

import signal
import socket
import sys

from data_prep.prepare import prepare
from data_prep.recipe import Recipe
from data_prep.workers import Worker
from kabrn_dist.utils.errors import UserError


def main(descriptor: int, rank: int, world: int) -> int:
    """Work until the end. An error is told to the first process, which reports it."""
    # Ctrl-C reaches all processes of a terminal; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    team = Worker(rank, world, socket.socket(fileno=descriptor))
    job = team.receive()
    try:
        prepare(Recipe.model_validate(job["recipe"]), team, job["force"])
    except UserError:
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
