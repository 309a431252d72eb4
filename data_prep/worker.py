"""Entry point of the other processes of `--workers N`, which `data_prep.workers` starts with a socket to rank 0."""

from __future__ import annotations

import signal
import socket
import sys

from data_prep.prepare import prepare
from data_prep.recipe import Recipe
from data_prep.workers import Worker
from kabrn_dist.utils.errors import UserError


def main(descriptor: int, rank: int, world: int) -> int:
    """Run the preparation that rank 0 sends.

    Args:
        descriptor: file descriptor of the socket to rank 0.
        rank: number of this worker.
        world: number of workers.

    Returns:
        Exit code: 2 after a UserError, which rank 0 reports; else 0.
    """
    # Ctrl-C reaches all processes of a terminal; rank 0 ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    workers = Worker(rank, world, socket.socket(fileno=descriptor))
    job = workers.receive()
    try:
        prepare(Recipe.model_validate(job["recipe"]), workers, job["force"])
    except UserError:
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
