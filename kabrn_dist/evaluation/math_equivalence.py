"""Whether two answers are the same number, set, interval, matrix, …: by the package math-verify, in another process."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from importlib.util import find_spec

from kabrn_dist.utils.errors import UserError

# Importing sympy takes a second; more on a slow disk.
_START_SECONDS = 120.0
_MEMORY_BYTES = 4 << 30
# A process that gets a smaller part of a processor than one in so many is ended as well.
_MOST_SHARED = 20
# A longer answer is no answer. The longest of MATH has 200 characters.
MAX_CHARACTERS = 20_000


class UnfinishedComparison(Exception):
    """A comparison exceeded its limit of time, memory or length."""


class MathComparer:
    """Compares answers in a process that is started when it is needed, and again after it had to be ended.

    Threads may share it: one comparison at a time.

    Args:
        seconds: Limit of a comparison, in processor time, rounded up by at most 1 s: what else the machine does must
            not decide about an answer.
    """

    def __init__(self, seconds: int = 5) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._at_exit: weakref.finalize | None = None
        self._failures: dict[tuple[str, str], str] = {}

    def equal(self, right: str, given: str) -> bool:
        r"""Return whether two texts, in LaTeX between dollars or in `\boxed{}`, hold the same answer.

        Args:
            right: The right answer: math-verify is not symmetric.
            given: The model's.

        Raises:
            UnfinishedComparison: if it exceeds its limits, or the process dies of it.
            UserError: if math-verify is not installed, or does not start.
        """
        if not (failure := self.failure(right, given)):
            with self._lock:
                process = self._process or self._start()
                try:
                    return self._ask(process, json.dumps([right, given]).encode() + b"\n")
                except UnfinishedComparison as error:
                    self._end()
                    failure = self._failures[right, given] = str(error)
                except BaseException:
                    self._end()
                    raise
        raise UnfinishedComparison(failure)

    def failure(self, right: str, given: str) -> str:
        """Return why an earlier comparison was not finished, or a comparison cannot begin; "" otherwise."""
        if max(len(right), len(given)) > MAX_CHARACTERS:
            return f"the answer has more than {MAX_CHARACTERS} characters"
        return self._failures.get((right, given), "")

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _ask(self, process: subprocess.Popen[bytes], line: bytes) -> bool:
        assert process.stdin is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
        except BrokenPipeError as error:
            raise UnfinishedComparison("its process has died") from error
        answer = _read_line(process, self._seconds * _MOST_SHARED)
        if answer is None or (not answer and process.wait() == -signal.SIGXCPU):
            raise UnfinishedComparison(f"not finished in {self._seconds} s")
        if answer not in (b"true", b"false"):
            raise UnfinishedComparison("out of memory, or nested too deep")
        return answer == b"true"

    def _start(self) -> subprocess.Popen[bytes]:
        if find_spec("math_verify") is None:
            raise UserError("math: metric math_verify needs the package math-verify; pip install 'kabrn_dist[eval]'")
        command = [sys.executable, "-m", "kabrn_dist.evaluation.math_worker"]
        process = subprocess.Popen(
            [*command, str(self._seconds), str(_MEMORY_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self._process = process
        self._at_exit = weakref.finalize(self, _kill, process)
        if _read_line(process, _START_SECONDS) != b"ready":
            self._end()
            raise UserError(f"math: the process of math-verify does not start; try: {' '.join(command)} 5 4294967296")
        return process

    def _end(self) -> None:
        if self._at_exit is not None:
            self._at_exit()
        self._process = self._at_exit = None


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def _read_line(process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    """Return a line that a process writes, b"" if it ends, None if it takes longer."""
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    content = b""
    deadline = time.monotonic() + seconds
    while not content.endswith(b"\n"):
        if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return None
        if not (part := os.read(descriptor, 64)):
            return b""
        content += part
    return content.strip()
