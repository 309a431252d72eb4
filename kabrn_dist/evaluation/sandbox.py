"""Programs that a model wrote, each run by a process that has next to nothing.

Of three layers, two keep such a program from files and two from the network:

- `seccomp`: a filter of system calls. No sockets, no processes or threads, no signals to anyone. Nothing replaces it.
- `landlock` (Linux 5.13): reads Python's own files, writes in its own empty folder, and opens nothing else.
- `namespaces`: sees nothing but Python's own files, read-only, and a folder of limited size; no network device.

To these come limits of processor time, memory, files and output, and a limit of time after which it is killed. A
program has no child that could outlive it, no environment, no input and no open file but its output.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

from kabrn_dist.evaluation import sandbox_child
from kabrn_dist.evaluation.sandbox_child import SandboxJob
from kabrn_dist.evaluation.sandbox_filter import build_filter
from kabrn_dist.utils.errors import UserError

SANDBOX_LAYERS = ("namespaces", "landlock", "seccomp")
ProgramStatus = Literal["passed", "assertion", "exception", "time-out", "memory", "forbidden", "exit", "crashed"]

# What importing a module of the standard library may read, besides that library.
_SYSTEM_FILES = (
    "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo",
    "/dev/null", "/dev/zero", "/dev/urandom",
)  # fmt: skip
_REPORT_BYTES = 1 << 16
_READ_BYTES = 1 << 16


@dataclass(frozen=True)
class ProgramLimits:
    """What a program may use.

    Attributes:
        cpu_seconds: Processor time, whole seconds.
        wall_seconds: Time, of a machine that may be busy with other things.
        memory_bytes: Address space.
        file_bytes: Size of a file that it writes.
        folder_bytes: Size of its folder, with namespaces.
        open_files: Files that are open at once.
        output_bytes: Output that is kept; the rest is thrown away.
    """

    cpu_seconds: int = 3
    wall_seconds: float = 10.0
    memory_bytes: int = 1 << 29
    file_bytes: int = 1 << 23
    folder_bytes: int = 1 << 26
    open_files: int = 64
    output_bytes: int = 1 << 16

    def to_rlimits(self) -> dict[str, int]:
        """Return name of the kernel's limit → number."""
        return {
            "CPU": self.cpu_seconds,
            "AS": self.memory_bytes,
            "FSIZE": self.file_bytes,
            "NOFILE": self.open_files,
            "NPROC": 0,
            "CORE": 0,
        }


@dataclass(frozen=True)
class ProgramOutcome:
    """How a program ended.

    Attributes:
        status: "passed" if it ran to its end; "forbidden" if it did what is not allowed; "exit" if it ended itself.
        particulars: Type and message of an exception, the signal of a crash, the limit that was exceeded.
        output: Beginning of what it printed.
        seconds: Time that it took, with the start of Python.
    """

    status: ProgramStatus
    particulars: str
    output: str
    seconds: float

    def describe(self) -> str:
        """Return status and particulars in one line."""
        return " ".join(f"{self.status}: {self.particulars}".split()) if self.particulars else self.status


class SandboxError(UserError):
    """Error of a machine on which a program cannot be run safely.

    Attributes:
        reason: What is missing and why, without the remedy.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(
            f"{message}; run on Linux with Landlock or user namespaces, or leave out the tasks that run code"
        )
        self.reason = reason or message


@dataclass(frozen=True)
class Sandbox:
    """Runs programs with the given layers, all of which a program has or does not begin.

    Attributes:
        layers: Of `SANDBOX_LAYERS`.
        limits: Of each program.
    """

    layers: tuple[str, ...]
    limits: ProgramLimits = field(default_factory=ProgramLimits)

    def run(self, program: str) -> ProgramOutcome:
        """Run a Python program that has the standard library.

        Args:
            program: Its source; `__name__` is not "__main__" in it.

        Raises:
            SandboxError: if a layer cannot be had.
        """
        folder = tempfile.mkdtemp(prefix="mixkabrn-sandbox-")
        try:
            return self._run_in(os.path.realpath(folder), program)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def run_all(self, programs: Iterable[str], workers: int | None = None) -> list[ProgramOutcome]:
        """Run programs side by side.

        Args:
            programs: Their sources.
            workers: Programs that run at once; None for one per processor core.

        Returns:
            Their outcomes, in the order of the programs.

        Raises:
            SandboxError: as `run`.
        """
        with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
            return list(pool.map(self.run, programs))

    def _run_in(self, folder: str, program: str) -> ProgramOutcome:
        job = SandboxJob(
            token=secrets.token_hex(16),
            folder=folder,
            layers=[*self.layers],
            readable=_list_readable(),
            limits=self.limits.to_rlimits(),
            folder_bytes=self.limits.folder_bytes,
            system_calls=build_filter(platform.machine()) or b"",
            program=program.encode("utf-8", "surrogatepass"),
        )
        # The order of sets is the same in every run. A Python of a cluster may need the path of its libraries.
        environment = {"PYTHONHASHSEED": "0"}
        if "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-s", "-S", "-B", _child_file()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        with process:
            try:
                output, report, in_time = _communicate(process, _encode_job(job), self.limits)
            finally:
                process.kill()
        seconds = time.monotonic() - started
        status, particulars = self._judge(_parse_report(report, job.token), process.returncode, in_time, seconds)
        return ProgramOutcome(status, particulars, output.decode("utf-8", "replace"), seconds)

    def _judge(self, report: list[list[str]], code: int, in_time: bool, seconds: float) -> tuple[ProgramStatus, str]:
        if not report and in_time:
            raise SandboxError(f"no process for a program of the model: Python ended with code {code}")
        if report and (missing := report[0][0]):
            raise SandboxError(f"a program of the model was not run, the sandbox lacks {missing}", missing)
        if not in_time:
            return "time-out", f"more than {self.limits.wall_seconds:g} s"
        # A program may handle the first signal of the limit; the second kills it, as does a machine out of memory.
        if code == -signal.SIGXCPU or (code == -signal.SIGKILL and seconds > self.limits.cpu_seconds):
            return "time-out", f"more than {self.limits.cpu_seconds} s of processor time"
        if code < 0:
            return "crashed", f"by {signal.Signals(-code).name}" if -code in {*signal.Signals} else f"by signal {-code}"
        if len(report) == 1:
            return "exit", f"with code {code} before its end"
        status, particulars = report[1]
        if status == "passed" and particulars:
            return "exception", particulars
        return cast(ProgramStatus, status), particulars


def _encode_job(job: SandboxJob) -> bytes:
    """Return what `SandboxJob.decode` reads."""
    limits = [f"{name} {number}" for name, number in job.limits.items()]
    texts = [job.token, job.folder, *map("\n".join, (job.layers, job.readable, limits)), str(job.folder_bytes)]
    parts = [*map(os.fsencode, texts), job.system_calls, job.program]
    return b" ".join(b"%d" % len(part) for part in parts) + b"\n" + b"".join(parts)


def _list_readable() -> list[str]:
    """Return the files and folders that Python needs, links before what they lead to, without those in others."""
    python = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    python |= {str(Path(sys.base_prefix) / name) for name in ("lib", "lib64")}
    listed = [path for path in (*sorted(python), *_SYSTEM_FILES) if os.path.exists(path)]
    real = {os.path.realpath(path) for path in listed}
    links = [path for path in listed if os.path.islink(path)]
    folders = [path for path in sorted(real) if not any(path.startswith(other + os.sep) for other in real)]
    return [*links, *folders]


def _communicate(process: subprocess.Popen[bytes], job: bytes, limits: ProgramLimits) -> tuple[bytes, bytes, bool]:
    """Return output, report, and whether the process ended in time; it is killed if not."""
    if process.stdin is None or process.stdout is None or process.stderr is None:
        raise RuntimeError("the process was started without pipes")
    deadline = time.monotonic() + limits.wall_seconds
    try:
        process.stdin.write(job)
        process.stdin.close()
    except BrokenPipeError:
        pass
    kept = {process.stdout: bytearray(), process.stderr: bytearray()}
    room = {process.stdout: limits.output_bytes, process.stderr: _REPORT_BYTES}
    with selectors.DefaultSelector() as selector:
        for stream in kept:
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                stream = process.stdout if key.fileobj is process.stdout else process.stderr
                chunk = os.read(stream.fileno(), _READ_BYTES)
                if not chunk:
                    selector.unregister(stream)
                kept[stream] += chunk[: room[stream] - len(kept[stream])]
    try:
        process.wait(max(deadline - time.monotonic(), 0.0))
        in_time = True
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        in_time = False
    return bytes(kept[process.stdout]), bytes(kept[process.stderr]), in_time


def _parse_report(report: bytes, token: str) -> list[list[str]]:
    """Return the lines of a process about itself, which begin with its token, without it."""
    lines = [line.split(b"\0") for line in report.splitlines() if line.startswith(token.encode())]
    # A text may hold the character between texts, written as an escape.
    return [[text.decode("unicode_escape") for text in texts] for _, *texts in lines][:2]


def _child_file() -> str:
    """Return what the process runs: compiled, as importing it has left it, if that could be written."""
    compiled = importlib.util.cache_from_source(sandbox_child.__file__)
    return compiled if os.path.exists(compiled) else sandbox_child.__file__
