"""Each process of tests/distributed/test_reduce_scatter.py."""

from __future__ import annotations

import torch
import torch.distributed as dist

from benchmarks.wire import sent_by
from kabrn_dist.distributed.launch_env import read_launch_env
from kabrn_dist.distributed.process_group import init_distributed
from kabrn_dist.distributed.reduce_scatter import reduce_scatter_sum


def main() -> None:
    place = read_launch_env()
    with init_distributed(place):
        assert dist.group.WORLD is not None
        for shape in ((), (1,), (7, 3)):
            for dtype, wide in (
                (torch.float64, torch.float64),
                (torch.float32, torch.float32),
                (torch.bfloat16, torch.float32),
                (torch.float16, torch.float32),
            ):
                generator = torch.Generator().manual_seed(5)
                everyone = torch.randn(place.world_size, place.world_size, *shape, generator=generator).to(dtype)
                found = reduce_scatter_sum(everyone[place.rank], dist.group.WORLD)
                assert found.dtype == wide
                torch.testing.assert_close(found, everyone[:, place.rank].to(wide).sum(0), atol=0, rtol=0)
        # Not laid out as it is seen.
        turned = torch.arange(6.0 * place.world_size).view(6, place.world_size).T
        assert torch.equal(reduce_scatter_sum(turned, dist.group.WORLD), place.world_size * turned[place.rank])
        large = torch.ones(place.world_size, 100_000, dtype=torch.bfloat16)
        sent = sent_by(lambda: reduce_scatter_sum(large, dist.group.WORLD))
        assert sent <= 1.02 * (place.world_size - 1) * large[0].nbytes


if __name__ == "__main__":
    main()
