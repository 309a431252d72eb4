"""One of N processes that train with ternary matrices shared out, and compare their codes after every step.

The argument is a JSON file with a list of config paths.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from kabrn_dist.backend.ternary_sharding import TernaryShard
from kabrn_dist.config.file import load_config
from kabrn_dist.distributed.launch_env import read_launch_env
from kabrn_dist.distributed.mesh import Mesh, init_distributed, make_mesh
from kabrn_dist.train.datasets import open_datasets
from kabrn_dist.train.expert_balance import resolve_placement
from kabrn_dist.train.trainer import Trainer


def main(jobs: str) -> None:
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
            session = Trainer(resolve_placement(config, mesh), mesh, open_datasets(config), "never")
            assert session.engine.shards is not None
            before: list[Tensor] = []
            for _ in range(config.training.steps):
                session._train_step()
                session.engine.refresh()
                shards = session.engine.shards
                codes = [check_codes(shard, mesh) for shard in shards.by_name.values()]
                assert not before or any(not torch.equal(a, b) for a, b in zip(codes, before, strict=True))
                before = codes
                latents = sum(shard.ranks * shard.size for shard in shards.by_name.values())
                assert shards.resident_bytes() <= 0.3 * latents
            session._finish(0)
            session.watchdog.stop()
            session.metrics.close()
            session.engine.close()


def check_codes(shard: TernaryShard, mesh: Mesh) -> Tensor:
    """A hash of this matrix's codes and scales, after comparing it over all ranks that share it."""
    weights = torch.arange(1, len(shard.packed) + 1) % 2_147_483_629
    mine = torch.stack([(shard.packed.long() * weights).sum(), shard.gamma.view(torch.int32).long().sum()])
    if shard.group is None:
        return mine
    found = torch.empty(shard.ranks, 2, dtype=torch.int64)
    dist.all_gather_into_tensor(found.view(-1), mine, group=shard.group)
    assert bool((found == mine).all()), found
    return mine


if __name__ == "__main__":
    main(sys.argv[1])
