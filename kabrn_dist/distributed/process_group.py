"""Start and end of torch.distributed in this process, and what failures of other ranks look like."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from kabrn_dist.distributed.launch_env import LaunchEnv, free_port
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.malloc import keep_freed_memory

# Shortest time that a rank waits for another in a collective before it raises.
DEFAULT_TIMEOUT_S = 600.0

# Messages of gloo and NCCL on the ranks that are left when another one is gone.
_PEER_FAILURE_MESSAGES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Socket closed",
    "recvValue failed",
    "Timed out waiting",
    "remote process exited",
    "NCCL error",
    "NCCL communicator was aborted",
)


@contextmanager
def init_distributed(env: LaunchEnv, timeout_s: float = DEFAULT_TIMEOUT_S) -> Iterator[torch.device]:
    """Join the default process group, and leave it at the end. Collective. Yields this process's device.

    Args:
        env: this process's rank and the number of processes.
        timeout_s: seconds that a rank waits for another in a collective before it raises.

    Raises:
        UserError: if the processes cannot meet, such as at a port that is in use.
    """
    device = _choose_device(env)
    if env.world_size == 1:
        # A process without a launcher; DeepSpeed reads these variables too.
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
        os.environ.setdefault("LOCAL_RANK", "0")
    # As its own launcher does: without it, DeepSpeed on a CPU starts numactl in each reduction of ZeRO 3.
    os.environ.setdefault("LOCAL_SIZE", str(env.local_world_size))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, rank=env.rank, world_size=env.world_size, timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as error:
        raise _explain_no_meeting(env, error) from error
    try:
        yield device
    except UserError:
        # All ranks raise it, so all leave.
        dist.destroy_process_group()
        raise
    # After any other exception this rank leaves alone: destroying groups could wait for the others for ever, and
    # would show them a closed connection before this rank has printed what happened.
    dist.destroy_process_group()


def _explain_no_meeting(env: LaunchEnv, error: Exception) -> UserError:
    """What an error means that comes before there is a group: no other rank has gone, as none has arrived."""
    address, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    if not address or not port:
        return UserError(
            f"WORLD_SIZE is {env.world_size}, but MASTER_ADDR {address!r} and MASTER_PORT {port!r} do not say where "
            "the processes meet; start them with --processes, deepspeed, torchrun or mpirun, or unset WORLD_SIZE"
        )
    remedy = "start with another one: --master_port N of deepspeed and torchrun, or MASTER_PORT=N"
    if "EADDRINUSE" in str(error) or "in use" in str(error):
        return UserError(f"port {port} of {address} is in use by another process; {remedy}")
    reason = str(error).partition("\n")[0][:300]
    return UserError(
        f"rank {env.rank} could not meet the others at {address}, port {port} ({reason}); see that all of them were "
        f"started and can reach that address, or {remedy}"
    )


def is_peer_failure(error: BaseException) -> bool:
    """Return whether an exception, or one that caused it, only says that another rank is gone."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, dist.DistBackendError | dist.DistNetworkError):
            return True
        # Not OSError: a connection that this process opened itself, for its data, is no other rank.
        if isinstance(cause, RuntimeError) and any(text in str(cause) for text in _PEER_FAILURE_MESSAGES):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _choose_device(env: LaunchEnv) -> torch.device:
    if torch.cuda.is_available():
        device = torch.device("cuda", env.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // env.local_world_size))
    keep_freed_memory()
    return torch.device("cpu")
