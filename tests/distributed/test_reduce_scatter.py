"""Sums at their owners: what a reduce-scatter gives, for half of what gloo's sends."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from benchmarks.wire import sent_by
from kabrn_dist.distributed.launch_env import find_place
from kabrn_dist.distributed.mesh import join_processes
from kabrn_dist.distributed.reduce_scatter import sum_at_owners
from tests.support.runs import ranks


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_each_rank_gets_the_sum_of_its_piece(world: int) -> None:
    ranks(world, "test_reduce")


def main() -> None:
    place = find_place()
    with join_processes(place):
        assert dist.group.WORLD is not None
        for shape in ((), (1,), (7, 3)):
            for dtype, wide in (
                (torch.float64, torch.float64),
                (torch.float32, torch.float32),
                (torch.bfloat16, torch.float32),
                (torch.float16, torch.float32),
            ):
                generator = torch.Generator().manual_seed(5)
                everyone = torch.randn(place.world, place.world, *shape, generator=generator).to(dtype)
                found = sum_at_owners(everyone[place.rank], dist.group.WORLD)
                assert found.dtype == wide
                torch.testing.assert_close(found, everyone[:, place.rank].to(wide).sum(0), atol=0, rtol=0)
        # Not laid out as it is seen.
        turned = torch.arange(6.0 * place.world).view(6, place.world).T
        assert torch.equal(sum_at_owners(turned, dist.group.WORLD), place.world * turned[place.rank])
        large = torch.ones(place.world, 100_000, dtype=torch.bfloat16)
        sent = sent_by(lambda: sum_at_owners(large, dist.group.WORLD))
        assert sent <= 1.02 * (place.world - 1) * large[0].nbytes


if __name__ == "__main__":
    main()
