"""One of N processes that runs several training sessions one after another in one process group.

The argument is a JSON file with a list of [config path, resume, stop_after].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kabrn_dist.config.file import load_config
from kabrn_dist.distributed.launch_env import find_place
from kabrn_dist.distributed.mesh import join_processes, make_mesh
from kabrn_dist.train.datasets import open_splits
from kabrn_dist.train.expert_balance import resolve_placement
from kabrn_dist.train.trainer import Session


def main(jobs: str) -> None:
    place = find_place()
    with join_processes(place) as device:
        for path, resume, stop_after in json.loads(Path(jobs).read_text()):
            config = load_config(path)
            config.check_world(place.world)
            mesh = make_mesh(place, device, config.parallel.expert, config.parallel.sequence, config.parallel.node)
            config = resolve_placement(config, mesh)
            session = Session(config, mesh, open_splits(config), resume)
            session.run(stop_after)
            session.engine.close()


if __name__ == "__main__":
    main(sys.argv[1])
