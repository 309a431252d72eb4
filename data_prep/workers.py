"""Processes that share the work of a preparation: one, several on this machine, or those that mpirun started.

Workers exchange nothing but short texts at barriers. They all hold the same list of tasks; a worker claims a task by
creating its lock file. Results go to files that do not depend on who made them.
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
from kabrn_dist.utils.mpi import import_mpi

Work = TypeVar("Work")

_STOP = "stop"
_EXIT_TIMEOUT_S = 10


class WorkerGroup:
    """A single process; base class of the groups of several.

    Attributes:
        rank: number of this worker.
        world: number of workers.
    """

    rank = 0
    world = 1

    def all_gather(self, text: str) -> list[str]:
        """Wait for all workers and return every worker's text, by rank. Collective.

        Raises:
            UserError: a worker has died.
        """
        return [text]

    def barrier(self, problem: str = "") -> None:
        """Wait for all workers. Collective.

        Raises:
            UserError: on all workers, with the first `problem` that is not empty.
        """
        problems = [text for text in self.all_gather(problem) if text]
        if problems:
            raise UserError(problems[0])

    def require_same(self, text: str, message: str) -> None:
        """Check that all workers pass the same text. Collective.

        Raises:
            UserError: on all workers, with `message`, if they do not.
        """
        if len(set(self.all_gather(text))) > 1:
            raise UserError(message)

    def all_true(self, flag: bool) -> bool:
        """Return on all workers whether `flag` is true on all of them. Collective."""
        return all(text == "yes" for text in self.all_gather("yes" if flag else ""))

    def on_all(self, function: Callable[[], None]) -> None:
        """Call `function` on every worker. Collective.

        Raises:
            UserError: on all workers, if one of them raised it.
        """
        problem = ""
        try:
            function()
        except UserError as error:
            problem = str(error)
        self.barrier(problem)

    def on_main(self, function: Callable[[], None]) -> None:
        """Call `function` on rank 0 while the others wait. Collective.

        Raises:
            UserError: on all workers, if rank 0 raised it.
        """
        self.on_all(function if self.rank == 0 else lambda: None)

    def map_tasks(self, lock_folder: Path, stage: str, tasks: Sequence[Work], function: Callable[[Work], None]) -> None:
        """Call `function` once for every task, each on the worker that claims it first. Collective.

        Args:
            lock_folder: folder that all workers see, emptied by `clear_folder` before the run.
            stage: name of the stage, unique within the run.
            tasks: the same list on all workers, the largest tasks first.
            function: does one task.

        Raises:
            UserError: on all workers, if one of them raised it; the others stop before their next task.
        """
        self.on_all(lambda: self._run_tasks(lock_folder, stage, tasks, function))

    def claim_task(self, lock_folder: Path, stage: str, number: int) -> bool:
        """Return whether a task of a stage is this worker's to do, ahead of `map_tasks`, which then passes it over.

        Args:
            lock_folder: as for `map_tasks`.
            stage: as for `map_tasks`.
            number: place of the task in the list of `map_tasks`.

        Raises:
            UserError: the disk refuses.
        """
        return self.world == 1 or _lock_task(lock_folder / f"{stage}-{number}")

    def _run_tasks(
        self, lock_folder: Path, stage: str, tasks: Sequence[Work], function: Callable[[Work], None]
    ) -> None:
        for number, task in enumerate(tasks):
            if (lock_folder / _STOP).exists():
                return
            if not self.claim_task(lock_folder, stage, number):
                continue
            try:
                function(task)
            except UserError:
                # The file only saves time: if the disk is full, the others work on to the end of the stage.
                with contextlib.suppress(OSError):
                    (lock_folder / _STOP).touch()
                raise


def clear_folder(folder: Path) -> None:
    """Make `folder` if it is not there, and delete the files in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()


def _lock_task(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); free some space there") from error
    return True


class Coordinator(WorkerGroup):
    """Rank 0 of several processes on this machine. It starts the others and relays their texts."""

    def __init__(self, world: int, job: dict[str, Any], keep_open: Sequence[int]) -> None:
        self.world = world
        self._workers: list[tuple[subprocess.Popen[bytes], Any]] = []
        for rank in range(1, world):
            self._workers.append(_start_worker(rank, world, job, keep_open))

    def all_gather(self, text: str) -> list[str]:
        """Collect a text from every worker and send all of them to every worker."""
        texts = [text]
        for rank, (process, stream) in enumerate(self._workers, start=1):
            line = b""
            # A worker that died before it had read all that was sent to it resets the connection.
            with contextlib.suppress(OSError):
                line = stream.readline()
            if not line:
                process.wait(_EXIT_TIMEOUT_S)
                raise UserError(
                    f"worker {rank} {_describe_exit(process.returncode)}; run the same command again to continue"
                )
            texts.append(json.loads(line))
        answer = (json.dumps(texts) + "\n").encode()
        for _, stream in self._workers:
            # A worker that has died since is noticed at the next barrier.
            with contextlib.suppress(OSError):
                stream.write(answer)
                stream.flush()
        return texts

    def close(self, succeeded: bool) -> None:
        """Wait for the workers to exit; kill them first unless the work succeeded."""
        for process, stream in self._workers:
            if not succeeded:
                process.kill()
            with contextlib.suppress(OSError):
                stream.close()
            process.wait()


class Worker(WorkerGroup):
    """A process that a coordinator started: rank ≥ 1, with a socket to rank 0. It exits when rank 0 does."""

    def __init__(self, rank: int, world: int, connection: socket.socket) -> None:
        self.rank, self.world = rank, world
        self._stream = connection.makefile("rwb")
        self._answers: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def receive(self) -> Any:
        """Return the next message of rank 0."""
        return json.loads(self._answers.get())

    def all_gather(self, text: str) -> list[str]:
        """Send a text to rank 0 and return the texts of all workers."""
        self._stream.write((json.dumps(text) + "\n").encode())
        self._stream.flush()
        return list(self.receive())

    def _listen(self) -> None:
        # A rank 0 that was killed before it had read all resets the connection.
        with contextlib.suppress(OSError):
            while line := self._stream.readline():
                self._answers.put(line)
        os._exit(3)


class MpiWorkerGroup(WorkerGroup):
    """A process that mpirun started."""

    def __init__(self) -> None:
        mpi = import_mpi()
        self._world_group, self._byte = mpi.COMM_WORLD, mpi.BYTE
        self.rank, self.world = self._world_group.rank, self._world_group.size

    def all_gather(self, text: str) -> list[str]:
        """Exchange the texts of all workers through MPI."""
        content = text.encode()
        sizes = np.empty(self.world, np.int64)
        self._world_group.Allgather(np.array([len(content)], np.int64), sizes)
        gathered = bytearray(int(sizes.sum()))
        self._world_group.Allgatherv([content, self._byte], [gathered, sizes.tolist(), self._byte])
        ends = np.cumsum(sizes)
        return [gathered[end - size : end].decode() for end, size in zip(ends, sizes, strict=True)]

    def abort(self) -> None:
        """End all processes: this one cannot continue, and the others would wait for it."""
        self._world_group.Abort(1)


@contextlib.contextmanager
def start_workers(world: int, job: dict[str, Any], keep_open: Sequence[int] = ()) -> Iterator[WorkerGroup]:
    """Start processes that run `data_prep.worker`, and end them with the context.

    Args:
        world: number of workers, this process included.
        job: what each of the others gets, as JSON.
        keep_open: file descriptors that stay open in them.

    Yields:
        The group, seen from rank 0.
    """
    if world == 1:
        yield WorkerGroup()
        return
    coordinator = Coordinator(world, job, keep_open)
    succeeded = False
    try:
        yield coordinator
        succeeded = True
    finally:
        coordinator.close(succeeded)


def _limit_tokenizer_threads(world: int) -> dict[str, str]:
    # By default it uses all processors. Rank 0 still does, since it trains the tokenizer while the others wait.
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"RAYON_NUM_THREADS": os.environ.get("RAYON_NUM_THREADS", str(max(1, count // world)))}


def _start_worker(
    rank: int, world: int, job: dict[str, Any], keep_open: Sequence[int]
) -> tuple[subprocess.Popen[bytes], Any]:
    own_end, worker_end = socket.socketpair()
    path = [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Ctrl-C reaches all processes of a terminal, and a worker can ignore it only once Python has started.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "data_prep.worker", str(worker_end.fileno()), str(rank), str(world)],
            stdin=subprocess.DEVNULL,
            pass_fds=[worker_end.fileno(), *keep_open],
            env={
                **os.environ,
                **_limit_tokenizer_threads(world),
                "RANK": str(rank),
                "PYTHONPATH": os.pathsep.join(path),
            },
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    worker_end.close()
    stream = own_end.makefile("rwb")
    own_end.close()
    with contextlib.suppress(OSError):
        stream.write((json.dumps(job) + "\n").encode())
        stream.flush()
    return process, stream


def _describe_exit(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed (out of memory?)"
    return f"ended with signal {-code}" if code < 0 else f"ended with exit code {code}"
