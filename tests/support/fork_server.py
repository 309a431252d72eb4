"""Start the ranks of a test in milliseconds: a server that has imported torch and DeepSpeed forks them.

The server has a single thread and never joins a process group, so its children equal the processes of a launcher: each
has the launcher's environment variables, can be killed on its own, and reports its exit code. No free port is needed:
as with torchrun, the ranks meet at a TCP store, here in the test process.
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
# How long each session tries how fast the machine multiplies: no test depends on how exact that is.
MATMUL_SECONDS = 0.02
# Everything that a training process imports, at its start or later.
PRELOADED = (
    "launch.train",
    "kabrn_dist.train.trainer",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.module_inject.auto_ep_layer",
    "fairscale.nn.checkpoint",
    "torch.utils.tensorboard",
    "kabrn_dist.plots.experts",
    "kabrn_dist.plots.functions",
    "kabrn_dist.plots.weights",
    "matplotlib.font_manager",
)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class GroupResult:
    """Result of a group of ranks that has ended.

    Attributes:
        exit_codes: exit code of each rank; negative: the signal that ended it.
        exit_code: exit code of the rank that failed first; 0 if none did.
        output: stdout and stderr of all ranks, in one text.
    """

    exit_codes: tuple[int, ...]
    exit_code: int
    output: str


class RankGroup:
    """Ranks that were started together. Leaving the context kills those that still run."""

    def __init__(self, server: ForkServer, target: str, arguments: Sequence[Any], world: int, **variables: str) -> None:
        self._server = server
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        with tempfile.NamedTemporaryFile(prefix="kabrn-ranks-", suffix=".txt", delete=False) as out:
            self._out = Path(out.name)
        common = {
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            # DeepSpeed would start `numactl` to count devices for each reduction of ZeRO 3; without it there is one.
            "LOCAL_SIZE": "1",
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
        """Return the exit code of each rank, None while it runs."""
        # The server reaps a process only here: until then its id cannot be given to another process.
        codes: list[int | None] = self._server.request(poll=self.pids)
        for rank, code in enumerate(codes):
            if code and self._codes[rank] is None and not self._first_failure:
                self._first_failure = code
        self._codes = codes
        return codes

    def kill(self, rank: int | None = None, signal_number: int = signal.SIGKILL) -> None:
        """Send a signal to one rank, or to all ranks that still run."""
        ranks = range(len(self.pids)) if rank is None else [rank]
        for target in ranks:
            if self._codes[target] is None:
                os.kill(self.pids[target], signal_number)

    def output(self) -> str:
        """Return what all ranks have written up to now."""
        return self._out.read_text(errors="replace")

    def wait(self, timeout: float = 300.0, grace: float | None = 10.0) -> GroupResult:
        """Wait until all ranks have ended; kill those that still run after `timeout` seconds.

        As with a launcher, the first rank that fails ends the others: SIGTERM, then SIGKILL after `grace` seconds.
        With `grace` None the others go on.
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
    """Client of a fork server process, which lives as long as this process."""

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
        """Send a request and return the answer."""
        self._lines.write(json.dumps(request) + "\n")
        self._lines.flush()
        answer = self._lines.readline()
        assert answer, "the fork server has ended"
        return json.loads(answer)

    def close(self) -> None:
        """End the server and every process of it that still runs."""
        self._lines.close()
        self._process.wait()


@cache
def shared_server() -> ForkServer:
    """Return the fork server of this process; the first call starts it."""
    return ForkServer()


def start_ranks(target: str, arguments: Sequence[Any] = (), world: int = 1, **variables: str) -> RankGroup:
    """Start `world` processes that call `target` ("module:function") with `arguments` (JSON) each.

    An int that the function returns becomes the exit code. torch computes on one thread in each process.
    """
    return RankGroup(shared_server(), target, arguments, world, **variables)


def run_ranks(
    target: str, arguments: Sequence[Any] = (), world: int = 1, timeout: float = 300.0, **variables: str
) -> GroupResult:
    """Start ranks as `start_ranks` does and wait for their end; a hang ends after `timeout` seconds."""
    with start_ranks(target, arguments, world, **variables) as group:
        return group.wait(timeout)


def _serve(channel: socket.socket) -> None:
    """Fork ranks and report exit codes until the client closes its end of `channel`."""
    for name in PRELOADED:
        importlib.import_module(name)
    importlib.import_module("kabrn_dist.train.throughput").MATMUL_SECONDS = MATMUL_SECONDS  # type: ignore[attr-defined]
    # DeepSpeed runs compilers when this is first read.
    _ = importlib.import_module("deepspeed.ops").__compatible_ops__
    assert threading.active_count() == 1 and len(os.listdir("/proc/self/task")) == 1, "threads do not survive a fork"
    # These objects never become garbage; if the collector visited them, every child would copy all their pages.
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
                # The system may give a process id a second time: forget the exit code of the first process.
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
        # If the server ends, for whatever reason, so do its children.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        os.close(channel.fileno())
        # Under nohup, tests would send ranks a signal that all of them ignore.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        _become_rank(order, variables)
    return pid


def _become_rank(order: dict[str, Any], variables: dict[str, str]) -> NoReturn:
    """Run the target in a forked child and exit: a child must never return into the server's loop."""
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
        # The order in which the interpreter ends: threads first, then exit handlers.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
