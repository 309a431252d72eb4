"""Rank, world size and rendezvous address of this process, from the launcher's environment."""

from __future__ import annotations

import os
import random
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass

from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.mpi import import_mpi, is_under_mpirun


@dataclass(frozen=True)
class LaunchEnv:
    """Place of this process among those that the launcher started.

    Attributes:
        rank: this process among all.
        world_size: number of processes.
        local_rank: this process among those of its node.
        local_world_size: number of processes on its node.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def read_launch_env() -> LaunchEnv:
    """Read the variables of deepspeed or torchrun, or ask MPI under mpirun; without a launcher there is one process.

    Under mpirun the processes agree through mpi4py on a rendezvous address, and write it to the environment.

    Raises:
        UserError: started by mpirun, but mpi4py is not installed; or a variable is not a number.

    Example:
        >>> read_launch_env()
        LaunchEnv(rank=0, world_size=1, local_rank=0, local_world_size=1)
    """
    if "RANK" not in os.environ and is_under_mpirun():
        _ask_mpi()
    rank, world = read_number("RANK", 0), read_number("WORLD_SIZE", 1)
    if not 0 <= rank < world:
        raise UserError(f"RANK {rank} is not one of the WORLD_SIZE {world} processes; set both, or neither")
    local_world = read_number("LOCAL_WORLD_SIZE", read_number("LOCAL_SIZE", 1))
    return LaunchEnv(rank, world, read_number("LOCAL_RANK", 0), max(1, local_world))


def read_number(variable: str, default: int) -> int:
    """Return the number in a launcher's environment variable; one that is not set, or set to nothing, has the default.

    Raises:
        UserError: for anything else than a number.
    """
    text = os.environ.get(variable, "").strip()
    if not text:
        return default
    if not text.isdecimal() or len(text) > 9:
        raise UserError(f"{variable}={text[:40]!r} in the environment is not a number of processes; unset it")
    return int(text)


def _ask_mpi() -> None:
    mpi = import_mpi()
    world = mpi.COMM_WORLD
    neighbors = world.Split_type(mpi.COMM_TYPE_SHARED)
    rendezvous = bytearray(256)
    if world.rank == 0:
        text = f"{find_address(neighbors.size == world.size)} {free_port()}".encode()
        rendezvous[: len(text)] = text
    world.Bcast([rendezvous, mpi.BYTE])
    address, port = rendezvous.rstrip(b"\0").decode().split()
    os.environ.update(
        RANK=str(world.rank),
        WORLD_SIZE=str(world.size),
        LOCAL_RANK=str(neighbors.rank),
        LOCAL_WORLD_SIZE=str(neighbors.size),
        MASTER_ADDR=address,
        MASTER_PORT=port,
    )


def find_address(is_one_machine: bool) -> str:
    """Return an address of this machine at which the other processes can reach it.

    Host names cannot be relied on: one may not resolve, or to an address that only this machine knows (127.0.1.1). What
    is chosen in its place is printed.

    Args:
        is_one_machine: True if all processes run on this machine.
    """
    if is_one_machine:
        return LOOPBACK
    name = socket.gethostname()
    with suppress(OSError):
        address = socket.gethostbyname(name)
        if not address.startswith("127."):
            return address
    address = _interface_address()
    print(
        f"the host name {name} has no address for other machines; they meet at {address}", file=sys.stderr, flush=True
    )
    return address


def _interface_address() -> str:
    """The address of the interface that leads to other machines; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return LOOPBACK


LOOPBACK = "127.0.0.1"
# Below the ephemeral ports of Linux and others, and without the launchers' 29500.
_PORTS = range(20_000, 29_000)


def free_port() -> int:
    """Return a TCP port of this machine on which nobody listens.

    It is not one that the system would choose: any new connection could be given the same one in the seconds that pass
    until a process has started and listens.

    Raises:
        UserError: all ports of the range are taken.
    """
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("", port))
            return port
    raise UserError(f"no free TCP port among {_PORTS.start} to {_PORTS.stop - 1}; end what listens there")
