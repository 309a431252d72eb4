"""Where this process stands among those that were started together, and where they meet."""

from __future__ import annotations

import os
import random
import socket
from contextlib import suppress
from dataclasses import dataclass

from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.mpi import import_mpi, is_under_mpirun


@dataclass(frozen=True)
class LaunchEnv:
    """Where this process stands among those that were started, read from the launcher's variables."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def read_launch_env() -> LaunchEnv:
    """Read the launcher's variables (deepspeed, torchrun), ask MPI under mpirun, or stand alone.

    Under mpirun the processes agree through mpi4py on the address where they will meet.
    """
    if "RANK" not in os.environ and is_under_mpirun():
        _ask_mpi()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1)))
    return LaunchEnv(rank, world, int(os.environ.get("LOCAL_RANK", 0)), local_world)


def _ask_mpi() -> None:
    mpi = import_mpi()
    everyone = mpi.COMM_WORLD
    neighbors = everyone.Split_type(mpi.COMM_TYPE_SHARED)
    meeting = bytearray(256)
    if everyone.rank == 0:
        text = f"{socket.gethostbyname(socket.gethostname())} {free_port()}".encode()
        meeting[: len(text)] = text
    everyone.Bcast([meeting, mpi.BYTE])
    address, port = meeting.rstrip(b"\0").decode().split()
    os.environ.update(
        RANK=str(everyone.rank),
        WORLD_SIZE=str(everyone.size),
        LOCAL_RANK=str(neighbors.rank),
        LOCAL_WORLD_SIZE=str(neighbors.size),
        MASTER_ADDR=address,
        MASTER_PORT=port,
    )


# Below those that Linux and others hand out to connections, and beside the launchers' 29500.
_PORTS = range(20_000, 29_000)


def free_port() -> int:
    """A TCP port of this machine where nobody listens.

    Not one that the system would choose: whoever connects to anything could be given the same one in the seconds that
    pass until a process has started and listens.

    Raises:
        UserError: all such ports are taken.
    """
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("", port))
            return port
    raise UserError(f"no free TCP port among {_PORTS.start} to {_PORTS.stop - 1}; end what listens there")
