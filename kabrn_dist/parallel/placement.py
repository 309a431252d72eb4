"""Which rank of an expert group holds which experts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
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
