"""Workers that share the work: one process, several of this machine, or those that mpirun started.

Nothing is sent between them but short texts at meetings. What there is to do is a list that all of them hold, and
who makes the file of a task first does the task: results go to files, so who did what leaves no trace in them.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from kabrn_dist.utils.errors import UserError

Task = TypeVar("Task")

_STOP = "stop"
_PATIENCE_SECONDS = 10


class WorkerGroup:
    """One process that works alone; the base of those that work with others."""

    rank = 0
    world = 1

    def all_gather(self, text: str) -> list[str]:
        """Wait for all workers; return every worker's text, by rank. Raises UserError when one has died."""
        return [text]

    def barrier(self, problem: str = "") -> None:
        """Wait for all workers. Raises UserError on all of them with the first `problem` that is not empty."""
        problems = [text for text in self.all_gather(problem) if text]
        if problems:
            raise UserError(problems[0])

    def require_same(self, text: str, message: str) -> None:
        """Raise UserError with the message `otherwise` on all workers unless all bring the same text."""
        if len(set(self.all_gather(text))) > 1:
            raise UserError(message)

    def all_true(self, flag: bool) -> bool:
        """True on all workers where it is true on all: the way to decide anything together."""
        return all(text == "yes" for text in self.all_gather("yes" if flag else ""))

    def on_all(self, function: Callable[[], None]) -> None:
        """Call `do` on every worker; a UserError of one is raised on all."""
        problem = ""
        try:
            function()
        except UserError as error:
            problem = str(error)
        self.barrier(problem)

    def on_main(self, function: Callable[[], None]) -> None:
        """Call `do` on rank 0 while the others wait; its UserError is raised on all."""
        self.on_all(function if self.rank == 0 else lambda: None)

    def map_tasks(self, lock_folder: Path, stage: str, tasks: Sequence[Task], function: Callable[[Task], None]) -> None:
        """Do all `tasks` of a stage, each on the worker that comes to it first, and wait for one another.

        Put the largest first. `folder` is seen by all workers and `clear_claims` has emptied it. A UserError of one
        worker is raised on all, which stop at their next task.
        """
        self.on_all(lambda: self._run_tasks(lock_folder, stage, tasks, function))

    def _run_tasks(
        self, lock_folder: Path, stage: str, tasks: Sequence[Task], function: Callable[[Task], None]
    ) -> None:
        for number, task in enumerate(tasks):
            if (lock_folder / _STOP).exists():
                return
            if self.world > 1 and not _lock_task(lock_folder / f"{stage}-{number}"):
                continue
            try:
                function(task)
            except UserError:
                # Only haste: on a full disk the others go on to the end of the stage.
                with contextlib.suppress(OSError):
                    (lock_folder / _STOP).touch()
                raise


def clear_folder(folder: Path) -> None:
    """Forget who took what, before a run begins."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()


def _lock_task(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}. Free some space there.") from error
    return True


class Coordinator(WorkerGroup):
    """Rank 0 of several processes of this machine; it started the others."""

    def __init__(self, world: int, job: dict[str, Any], keep_open: Sequence[int]) -> None:
        self.world = world
        self._workers: list[tuple[subprocess.Popen[bytes], Any]] = []
        for rank in range(1, world):
            self._workers.append(_start_worker(rank, world, job, keep_open))

    def all_gather(self, text: str) -> list[str]:
        texts = [text]
        for rank, (process, stream) in enumerate(self._workers, start=1):
            line = stream.readline()
            if not line:
                process.wait(_PATIENCE_SECONDS)
                raise UserError(
                    f"worker {rank} {describe_exit(process.returncode)}. Run again: what is finished is kept."
                )
            texts.append(json.loads(line))
        answer = (json.dumps(texts) + "\n").encode()
        for _, stream in self._workers:
            # One that has died since is found at the next meeting.
            with contextlib.suppress(OSError):
                stream.write(answer)
                stream.flush()
        return texts

    def close(self, succeeded: bool) -> None:
        """Wait for the workers to end, or end them."""
        for process, stream in self._workers:
            if not succeeded:
                process.kill()
            with contextlib.suppress(OSError):
                stream.close()
            process.wait()


class Worker(WorkerGroup):
    """One of the others: rank ≥ 1, with a socket to rank 0. It ends at once when rank 0 does."""

    def __init__(self, rank: int, world: int, connection: socket.socket) -> None:
        self.rank, self.world = rank, world
        self._stream = connection.makefile("rwb")
        self._answers: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def receive(self) -> Any:
        """The next message of rank 0."""
        return json.loads(self._answers.get())

    def all_gather(self, text: str) -> list[str]:
        self._stream.write((json.dumps(text) + "\n").encode())
        self._stream.flush()
        return list(self.receive())

    def _listen(self) -> None:
        while line := self._stream.readline():
            self._answers.put(line)
        os._exit(3)


class MpiWorkerGroup(WorkerGroup):
    """One of the processes that mpirun started."""

    def __init__(self) -> None:
        try:
            from mpi4py import MPI
        except ImportError:
            raise UserError("started by mpirun, but mpi4py is not installed; pip install mpi4py mpich") from None
        self._everyone = MPI.COMM_WORLD
        self._byte = MPI.BYTE
        self.rank, self.world = self._everyone.rank, self._everyone.size

    def all_gather(self, text: str) -> list[str]:
        content = text.encode()
        sizes = np.empty(self.world, np.int64)
        self._everyone.Allgather(np.array([len(content)], np.int64), sizes)
        gathered = bytearray(int(sizes.sum()))
        self._everyone.Allgatherv([content, self._byte], [gathered, sizes.tolist(), self._byte])
        ends = np.cumsum(sizes)
        return [gathered[end - size : end].decode() for end, size in zip(ends, sizes, strict=True)]

    def abort(self) -> None:
        """End all processes: this one cannot go on and the others would wait for ever."""
        self._everyone.Abort(1)


def under_mpirun() -> bool:
    """Whether a launcher of MPI started this process."""
    return any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))


@contextlib.contextmanager
def start_workers(world: int, job: dict[str, Any], keep_open: Sequence[int] = ()) -> Iterator[WorkerGroup]:
    """The team of `workers` processes, this one among them: `data_prep.worker` gets `job` (JSON) in the others.

    The file descriptors `keep_open` stay open in them. Whatever ends the block ends the others.
    """
    limit_tokenizer_threads(world)
    if world == 1:
        yield WorkerGroup()
        return
    leader = Coordinator(world, job, keep_open)
    ended_well = False
    try:
        yield leader
        ended_well = True
    finally:
        leader.close(ended_well)


def limit_tokenizer_threads(workers: int) -> None:
    # The tokenizer takes all processors, which is right for one worker alone.
    if workers > 1:
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, count // workers)))


def _start_worker(
    rank: int, world: int, job: dict[str, Any], keep_open: Sequence[int]
) -> tuple[subprocess.Popen[bytes], Any]:
    mine, yours = socket.socketpair()
    path = [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-m", "data_prep.worker", str(yours.fileno()), str(rank), str(world)],
        stdin=subprocess.DEVNULL,
        pass_fds=[yours.fileno(), *keep_open],
        env={**os.environ, "RANK": str(rank), "PYTHONPATH": os.pathsep.join(path)},
    )
    yours.close()
    stream = mine.makefile("rwb")
    mine.close()
    with contextlib.suppress(OSError):
        stream.write((json.dumps(job) + "\n").encode())
        stream.flush()
    return process, stream


def describe_exit(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed (out of memory?)"
    return f"ended with signal {-code}" if code < 0 else f"ended with exit code {code}"
