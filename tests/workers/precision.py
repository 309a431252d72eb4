"""One process that starts sessions and says, for each, the dtypes of the model's working copies.

The argument is a JSON file with a list of config paths; the answer is written beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kabrn_dist.config.file import load_config
from kabrn_dist.distributed.launch_env import read_launch_env
from kabrn_dist.distributed.mesh import init_distributed, make_mesh
from kabrn_dist.train.datasets import open_datasets
from kabrn_dist.train.trainer import Trainer


def main(jobs: str) -> None:
    found = []
    place = read_launch_env()
    with init_distributed(place) as device:
        for path in json.loads(Path(jobs).read_text()):
            config = load_config(path)
            mesh = make_mesh(
                place,
                device,
                config.parallel.expert_parallel,
                config.parallel.sequence_parallel,
                config.parallel.ranks_per_node,
            )
            session = Trainer(config, mesh, open_datasets(config), "never")
            dtypes = {name: str(p.dtype) for name, p in session.engine.model.named_parameters()}
            states = {name: str(value.dtype) for name, value in session.engine.model.routers.named().items()}
            session.run(None)
            session.engine.close()
            found.append(dtypes | states)
    Path(jobs).with_name("dtypes.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
