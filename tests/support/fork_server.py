"""Processes for tests in milliseconds: a server that has imported torch and DeepSpeed forks one for each rank.

The server has one thread and never touches a process group, so its children are what a launcher would start: each has
the launcher's variables, can be killed by itself, and its exit code is seen. Nobody looks for a free port: the ranks
meet at a store in the process that asked for them, as those of torchrun do.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from torch.distributed import TCPStore

ROOT = Path(__file__).parents[2]
# What a training process imports at its start and on its way.
PRELOADED = (
    "launch.train",
    "kabrn_dist.train.trainer",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.module_inject.auto_ep_layer",
    "fairscale.nn.checkpoint",
)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class GroupResult:
    """What a group of processes left behind.

    Attributes:
        codes: exit code of each rank; negative: the signal that ended it.
        code: of the rank that failed first; 0 if none did.
        out: what all of them wrote, stdout and stderr together.
    """

    exit_codes: tuple[int, ...]
    exit_code: int
    output: str


class RankGroup:
    """Processes started together. A context: at its end none of them is left."""

    def __init__(self, server: ForkServer, target: str, arguments: Sequence[Any], world: int, **variables: str) -> None:
        self._server = server
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        with tempfile.NamedTemporaryFile(prefix="kabrn-ranks-", suffix=".txt", delete=False) as out:
            self._out = Path(out.name)
        common = {
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            **variables,
        }
        order = {"target": target, "arguments": list(arguments), "out": out.name}
        ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
        self.pids: list[int] = server.request(start=order | {"ranks": ranks})
        self._codes: list[int | None] = [None] * world
        self._first_failure = 0

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.kill()
        while None in self.exit_codes():
            time.sleep(0.002)
        self._out.unlink(missing_ok=True)

    def exit_codes(self) -> list[int | None]:
        """Exit code of each rank; None while it runs."""
        # Until a code is asked for the process is at least a zombie: its id never becomes another's.
        codes: list[int | None] = self._server.request(poll=self.pids)
        for rank, code in enumerate(codes):
            if code and self._codes[rank] is None and not self._first_failure:
                self._first_failure = code
        self._codes = codes
        return codes

    def kill(self, rank: int | None = None, signal_number: int = signal.SIGKILL) -> None:
        """Send a signal to one rank, or to all that still run."""
        chosen = range(len(self.pids)) if rank is None else [rank]
        for one in chosen:
            if self._codes[one] is None:
                os.kill(self.pids[one], signal_number)

    def output(self) -> str:
        """What all ranks have written up to now."""
        return self._out.read_text(errors="replace")

    def wait(self, timeout: float = 300.0, grace: float | None = 10.0) -> GroupResult:
        """Until all have ended; after `timeout` seconds those that still run are killed, which is their exit code.

        The first that fails takes the others with it, as with a launcher: SIGTERM, and SIGKILL after `grace` seconds.
        None: the others are left alone.
        """
        deadline, warned = time.monotonic() + timeout, False
        while None in self.exit_codes():
            if self._first_failure and grace is not None and not warned:
                self.kill(signal_number=signal.SIGTERM)
                deadline, warned = min(deadline, time.monotonic() + grace), True
            if time.monotonic() > deadline:
                self.kill()
            time.sleep(0.005)
        codes = tuple(code for code in self._codes if code is not None)
        return GroupResult(codes, self._first_failure, self.output())


class ForkServer:
    """The client's end of a fork server, which lives as long as this process."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.fork_server", str(theirs.fileno())],
            cwd=ROOT,
            env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        self._lines = ours.makefile("rw", encoding="utf-8")
        ours.close()
        atexit.register(self.close)

    def request(self, **request: Any) -> Any:
        """Send a request, return the answer."""
        self._lines.write(json.dumps(request) + "\n")
        self._lines.flush()
        answer = self._lines.readline()
        assert answer, "the fork server has ended"
        return json.loads(answer)

    def close(self) -> None:
        """End the server, and whatever it has started and still runs."""
        self._lines.close()
        self._process.wait()


@cache
def shared_server() -> ForkServer:
    """This process's fork server, started at the first call."""
    return ForkServer()


def start_ranks(target: str, arguments: Sequence[Any] = (), world: int = 1, **variables: str) -> RankGroup:
    """Start `world` processes that call `target` ("module:function") with `arguments` (JSON) each.

    An int that the function returns is the exit code. Each has one thread for its products.
    """
    return RankGroup(shared_server(), target, arguments, world, **variables)


def run_ranks(
    target: str, arguments: Sequence[Any] = (), world: int = 1, timeout: float = 300.0, **variables: str
) -> GroupResult:
    """Start them and wait for their end; a hang is a failure, not a wait for ever."""
    with start_ranks(target, arguments, world, **variables) as group:
        return group.wait(timeout)


def _serve(channel: socket.socket) -> None:
    """Until the client closes its end: fork, or tell who has ended."""
    for name in PRELOADED:
        importlib.import_module(name)
    # DeepSpeed tries compilers when it is first asked for these.
    _ = importlib.import_module("deepspeed.ops").__compatible_ops__
    assert threading.active_count() == 1 and len(os.listdir("/proc/self/task")) == 1, "threads do not survive a fork"
    # What there is now never becomes garbage; looking for it would copy each of its pages in every child.
    gc.collect()
    gc.freeze()
    started: set[int] = set()
    codes: dict[int, int] = {}
    lines = channel.makefile("rw", encoding="utf-8")
    for line in lines:
        request = json.loads(line)
        if "start" in request:
            answer: list[Any] = [_fork(request["start"], rank, channel) for rank in request["start"]["ranks"]]
            started.update(answer)
            for pid in answer:
                # A number that an earlier child had: its code is not this one's.
                codes.pop(pid, None)
        else:
            answer = [_poll(pid, codes) for pid in request["poll"]]
        lines.write(json.dumps(answer) + "\n")
        lines.flush()
    for pid in started - set(codes):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _poll(pid: int, codes: dict[int, int]) -> int | None:
    if pid not in codes:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended:
            return None
        codes[pid] = os.waitstatus_to_exitcode(status)
    return codes[pid]


def _fork(order: dict[str, Any], variables: dict[str, str], channel: socket.socket) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        # The server's end, and with it this process's: whatever happens, nobody is left.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        os.close(channel.fileno())
        _become_rank(order, variables)
    return pid


def _become_rank(order: dict[str, Any], variables: dict[str, str]) -> NoReturn:
    """The rest of a child's life. It never returns into the server's loop."""
    code = 1
    try:
        out = os.open(order["out"], os.O_WRONLY | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        os.environ.update(variables)
        module, _, function = order["target"].partition(":")
        sys.argv = [module]
        code = getattr(importlib.import_module(module), function)(*order["arguments"]) or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        # As the interpreter ends: threads first, then what was registered.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
