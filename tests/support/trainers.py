"""Trainers for the processes in tests/workers: several configurations, one after another, in one process group."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kabrn_dist.data.run_config import load_run_config
from kabrn_dist.distributed.launch_env import read_launch_env
from kabrn_dist.distributed.mesh import make_mesh
from kabrn_dist.distributed.process_group import init_distributed
from kabrn_dist.train.datasets import open_datasets
from kabrn_dist.train.expert_balance import resolve_placement
from kabrn_dist.train.trainer import Trainer


def open_trainers(jobs: list[tuple[str, str]]) -> Iterator[Trainer]:
    """Yield a trainer for each (configuration file, resume) of `jobs`, as `launch/train.py` makes it. Collective.

    The caller runs or steps a trainer to its end before it asks for the next, which closes it.
    """
    env = read_launch_env()
    with init_distributed(env) as device:
        for path, resume in jobs:
            config = load_run_config(path)
            config.check_world_size(env.world_size)
            parallel = config.parallel
            mesh = make_mesh(env, device, parallel.expert_parallel, parallel.sequence_parallel, parallel.ranks_per_node)
            with Trainer.create(resolve_placement(config, mesh), mesh, open_datasets(config), resume) as trainer:
                yield trainer
            trainer.engine.close()


def read_jobs(path: str) -> list[Any]:
    """Read the list of jobs that a test wrote for its workers."""
    jobs: list[Any] = json.loads(Path(path).read_text())
    return jobs
