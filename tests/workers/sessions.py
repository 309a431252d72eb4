"""One of N processes that runs several training sessions one after another in one process group.

The argument is a JSON file with a list of [config path, resume, stop_after].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kabrn_dist.config.file import load_config
from kabrn_dist.distributed.launch_env import read_launch_env
from kabrn_dist.distributed.mesh import init_distributed, make_mesh
from kabrn_dist.train.datasets import open_datasets
from kabrn_dist.train.expert_balance import resolve_placement
from kabrn_dist.train.trainer import Trainer


def main(jobs: str) -> None:
    place = read_launch_env()
    with init_distributed(place) as device:
        for path, resume, stop_after in json.loads(Path(jobs).read_text()):
            config = load_config(path)
            config.check_world_size(place.world_size)
            mesh = make_mesh(
                place,
                device,
                config.parallel.expert_parallel,
                config.parallel.sequence_parallel,
                config.parallel.ranks_per_node,
            )
            config = resolve_placement(config, mesh)
            session = Trainer(config, mesh, open_datasets(config), resume)
            session.run(stop_after)
            session.engine.close()


if __name__ == "__main__":
    main(sys.argv[1])
