"""One of two processes that train, and count the tensors that are alive between steps.

The argument is a JSON file with a list of config paths.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch

from kabrn_dist.config.file import load_config
from kabrn_dist.distributed.launch_env import read_launch_env
from kabrn_dist.distributed.mesh import init_distributed, make_mesh
from kabrn_dist.train.datasets import open_datasets
from kabrn_dist.train.trainer import Trainer


def main(jobs: str) -> None:
    place = read_launch_env()
    with init_distributed(place) as device:
        for path in json.loads(Path(jobs).read_text()):
            config = load_config(path)
            mesh = make_mesh(place, device, config.parallel.expert_parallel, config.parallel.sequence_parallel)
            session = Trainer(config, mesh, open_datasets(config), "never")
            # What only a garbage collector would free, if it ever ran, counts as kept: it cannot see all of a graph.
            gc.collect()
            gc.disable()
            alive = []
            for _ in range(config.training.steps - 1):
                session._train_step()
                alive.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
            gc.enable()
            assert max(alive[3:]) <= min(alive[3:]) + 2, f"{Path(path).stem}: {alive}"
            session._train_step()
            session._finish(0)
            session.watchdog.stop()
            session.metrics.close()
            session.engine.close()


if __name__ == "__main__":
    main(sys.argv[1])
