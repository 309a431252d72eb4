"""Which rank of an expert group holds which experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kabrn_dist.config import Config
from kabrn_dist.utils.errors import UserError


@dataclass(frozen=True)
class ExpertPlacement:
    """Contiguous runs of experts on the ranks of an expert group; the runs may differ in length.

    Attributes:
        counts: experts on each rank of the group; their sum is the number of routed experts.
        rank: this process's rank in the group.
    """

    counts: tuple[int, ...]
    rank: int

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def local(self) -> range:
        """Global numbers of the experts that live on this rank."""
        first = sum(self.counts[: self.rank])
        return range(first, first + self.counts[self.rank])


def allocate_experts(
    num_experts: int, rank_weights: Sequence[float], max_experts: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Whole experts for each rank, at least one, so that the slowest rank is done as early as possible.

    A rank with n experts of equal load takes a time of n / weight. One after another, experts go to the rank that would
    then be done first (the lower one of equals), which makes the longest time the shortest possible: D'Hondt's method.

    Args:
        weights: positive, of each rank; only their ratios matter.
        most: experts that each rank can hold; None where memory sets no limit.

    Raises:
        UserError: where there are fewer experts than ranks, or less room than experts.
    """
    ranks = len(rank_weights)
    room = [num_experts] * ranks if max_experts is None else list(max_experts)
    if num_experts < ranks:
        raise UserError(
            f"model.experts.num_experts {num_experts} is too few for the {ranks} ranks of an expert group, which each hold "
            f"one or more; set parallel.expert_parallel to {num_experts} or less"
        )
    if sum(room) < num_experts or min(room) < 1:
        raise UserError(
            f"the ranks of an expert group have room for {room} experts of model.experts.num_experts {num_experts}, and each "
            "must hold one or more; raise parallel.expert_parallel or parallel.zero_stage, or name the shares in "
            "parallel.experts_per_rank if you know better"
        )
    counts = [1] * ranks
    for _ in range(num_experts - ranks):
        free = [rank for rank in range(ranks) if counts[rank] < room[rank]]
        counts[min(free, key=lambda rank: (counts[rank] + 1) / rank_weights[rank])] += 1
    return tuple(counts)


def plan_expert_counts(config: Config) -> tuple[int, ...] | None:
    """Experts on each rank of an expert group, as far as the configuration alone tells; None where it is measured."""
    parallel = config.parallel
    if parallel.experts_per_rank != "auto" or parallel.expert_parallel == 1:
        return config.expert_counts()
    if parallel.rank_weights is None:
        return None
    return allocate_experts(config.model.experts.num_experts, parallel.rank_weights)
