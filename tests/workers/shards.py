"""One of N processes that train with sharded ternary matrices and compare their codes after every step.

The argument is a JSON file with a list of configuration files.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor

from kabrn_dist.backend.ternary_sharding import TernaryShard
from kabrn_dist.distributed.mesh import Mesh
from tests.support.trainers import open_trainers, read_jobs


def main(jobs: str) -> None:
    for trainer in open_trainers([(path, "never") for path in read_jobs(jobs)]):
        assert trainer.engine.shards is not None
        before: list[Tensor] = []
        for _ in range(trainer.config.training.steps):
            trainer.train_step()
            trainer.engine.refresh()
            shards = trainer.engine.shards
            codes = [check_codes(shard, trainer.mesh) for shard in shards.by_name.values()]
            assert not before or any(not torch.equal(a, b) for a, b in zip(codes, before, strict=True))
            before = codes
            latents = sum(shard.ranks * shard.size for shard in shards.by_name.values())
            assert shards.resident_bytes() <= 0.3 * latents
        trainer.finish()


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
