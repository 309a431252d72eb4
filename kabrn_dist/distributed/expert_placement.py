"""Which rank of an expert group holds which experts.

One path leads from the configuration to a placement: `plan_expert_counts` answers from the configuration alone; where
`experts_per_rank: auto` leaves the answer to a measurement, `train/expert_balance.py` measures once and writes the
numbers into the configuration; `ExpertPlacement.from_config` reads them for this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kabrn_dist.config import Config
from kabrn_dist.utils.errors import UserError


@dataclass(frozen=True)
class ExpertPlacement:
    """Contiguous experts on each rank of an expert group; ranks may hold different numbers of them.

    Attributes:
        counts: experts on each rank of the group; their sum is the number of routed experts.
        rank: this process's rank in the group.

    Example:
        >>> placement = ExpertPlacement(counts=(1, 3), rank=1)
        >>> placement.total, placement.local
        (4, range(1, 4))
    """

    counts: tuple[int, ...]
    rank: int

    @classmethod
    def single(cls, num_experts: int) -> ExpertPlacement:
        """Return the placement of all experts on one rank."""
        return cls((num_experts,), 0)

    @classmethod
    def from_config(cls, config: Config, expert_rank: int) -> ExpertPlacement:
        """Return the placement that a configuration gives a rank of an expert group.

        Args:
            config: `parallel.experts_per_rank: auto` has been replaced by numbers where they are measured.
            expert_rank: the rank in its expert group.
        """
        counts = plan_expert_counts(config)
        assert counts is not None, "resolve_placement comes first"
        return cls(counts, expert_rank)

    @property
    def total(self) -> int:
        """Number of routed experts."""
        return sum(self.counts)

    @property
    def local(self) -> range:
        """Global numbers of the experts on this rank."""
        first = sum(self.counts[: self.rank])
        return range(first, first + self.counts[self.rank])


def plan_expert_counts(config: Config) -> tuple[int, ...] | None:
    """Return the number of experts on each rank of an expert group; None where it will be measured at the start.

    Raises:
        UserError: `parallel.rank_weights` are given for fewer experts than ranks.
    """
    parallel, num_experts = config.parallel, config.model.experts.num_experts
    if parallel.experts_per_rank is None or parallel.expert_parallel == 1:
        return (num_experts // parallel.expert_parallel,) * parallel.expert_parallel
    if parallel.experts_per_rank != "auto":
        return parallel.experts_per_rank
    return None if parallel.rank_weights is None else allocate_experts(num_experts, parallel.rank_weights)


def allocate_experts(
    num_experts: int, rank_weights: Sequence[float], max_experts: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Allocate experts to ranks, at least one each, so that the slowest rank finishes as early as possible.

    A rank with n experts of equal load takes a time of n / weight. One after another, experts go to the rank that would
    then finish first (the lower one of equals), which makes the longest time the shortest possible: D'Hondt's method.

    Args:
        num_experts: experts to allocate.
        rank_weights: positive, of each rank; only their ratios matter.
        max_experts: experts that each rank can hold; None where memory sets no limit.

    Returns:
        Number of experts of each rank.

    Raises:
        UserError: there are fewer experts than ranks, or less room than experts.

    Example:
        >>> allocate_experts(8, rank_weights=[1, 3])
        (2, 6)
    """
    ranks = len(rank_weights)
    room = [num_experts] * ranks if max_experts is None else list(max_experts)
    if num_experts < ranks:
        raise UserError(
            f"model.experts.num_experts {num_experts} is too few for the {ranks} ranks of an expert group, each of "
            f"which holds one or more; set parallel.expert_parallel to {num_experts} or less"
        )
    if sum(room) < num_experts or min(room) < 1:
        raise UserError(
            f"the ranks of an expert group have room for {room} experts of model.experts.num_experts {num_experts}, "
            "and each must hold one or more; raise parallel.expert_parallel or parallel.zero_stage, or set "
            "parallel.experts_per_rank to numbers if you know better"
        )
    counts = [1] * ranks
    for _ in range(num_experts - ranks):
        free = [rank for rank in range(ranks) if counts[rank] < room[rank]]
        counts[min(free, key=lambda rank: (counts[rank] + 1) / rank_weights[rank])] += 1
    return tuple(counts)
