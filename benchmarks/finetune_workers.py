"""Processes that train: each made ready with one thread, and with what the trainer needs."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from kabrn_dist.config import Config
from kabrn_dist.distributed.launch_env import read_launch_env
from kabrn_dist.distributed.mesh import make_mesh
from kabrn_dist.distributed.process_group import init_distributed
from kabrn_dist.train.datasets import open_datasets
from kabrn_dist.train.expert_balance import resolve_placement
from kabrn_dist.train.trainer import Trainer
from kabrn_dist.utils.malloc import keep_freed_memory

T = TypeVar("T")


def begin(log: Path) -> None:
    """Make this process ready to train with one thread, and let it say what it says in a file."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    keep_freed_memory()
    # Left open, as DeepSpeed keeps groups of the first one: the process ends when it has done its part.
    init_distributed(read_launch_env()).__enter__()


class Workers:
    """Processes with one thread, made ready by `begin`.

    Args:
        jobs: how many at once.
        log: for what they say.
        keep: whether a process goes on with further calls; if not, each call has one of its own, as what DeepSpeed
            keeps of an engine ends with its process.
    """

    def __init__(self, jobs: int, log: Path, keep: bool) -> None:
        self._log = log
        self._kept = _open_processes(jobs, log) if keep else None
        self._waiting = ThreadPoolExecutor(jobs)

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Call a function of a module in a process."""
        if self._kept is not None:
            return self._kept.submit(function, *arguments)
        return self._waiting.submit(self._call, function, *arguments)

    def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        with _open_processes(1, self._log) as processes:
            return processes.submit(function, *arguments).result()

    def __enter__(self) -> Workers:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Wait for calls that have begun, and give up the others."""
        for executor in (self._kept, self._waiting):
            if executor is not None:
                executor.shutdown(cancel_futures=True)


def _open_processes(jobs: int, log: Path) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=begin, initargs=(log,))


def train_run(config: Config) -> None:
    """Train a run to its end in this process, which `begin` has made ready."""
    env, parallel = read_launch_env(), config.parallel
    mesh = make_mesh(env, torch.device("cpu"), parallel.expert_parallel, parallel.sequence_parallel)
    with Trainer.create(resolve_placement(config, mesh), mesh, open_datasets(config)) as trainer:
        trainer.run()
    trainer.engine.close()
