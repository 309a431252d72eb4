"""One of two processes that train and count the tensors that are alive between steps.

The argument is a JSON file with a list of configuration files.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch

from tests.support.trainers import open_trainers, read_jobs


def main(jobs: str) -> None:
    paths = read_jobs(jobs)
    for path, trainer in zip(paths, open_trainers([(path, "never") for path in paths]), strict=True):
        # What only a garbage collector would free, if it ever ran, counts as alive: it cannot see all of a graph.
        gc.collect()
        gc.disable()
        alive = []
        for _ in range(trainer.config.training.steps - 1):
            trainer.train_step()
            alive.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
        gc.enable()
        assert max(alive[3:]) <= min(alive[3:]) + 2, f"{Path(path).stem}: {alive}"
        trainer.train_step()
        trainer.finish()


if __name__ == "__main__":
    main(sys.argv[1])
