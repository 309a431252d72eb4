"""Where a run stands in its data, and whether another session goes on with the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kabrn_dist.data.corpus import Corpus, WeightedSource
from kabrn_dist.utils.errors import UserError


class HasDataState(Protocol):
    """What has cursors: see `Batches`."""

    def state(self, consumed: int) -> DataState: ...


@dataclass(frozen=True)
class DataState:
    """Where a run stands in its data: `consumed` sequences over all ranks since its start, and of what.

    `fingerprint` covers the sets and their weights; `drawn` says the same in words, source by source.
    """

    consumed: int
    seed: int
    sequence_length: int
    fingerprint: str
    drawn: dict[str, str] = field(default_factory=dict)

    def check(self, data: HasDataState) -> None:
        """Raise UserError when `data` would not go on with the stream that this cursor was taken from."""
        now = data.state(self.consumed)
        if self.fingerprint != now.fingerprint:
            names = [name for name in {**self.drawn, **now.drawn} if self.drawn.get(name) != now.drawn.get(name)]
            changes = "; ".join(
                f"{name}: {self.drawn.get(name, 'not drawn')}, now {now.drawn.get(name, 'not drawn')}" for name in names
            )
            raise UserError(
                f"the checkpoint was trained on data {self.fingerprint[:12]}, the run has {now.fingerprint[:12]}"
                f"{f' ({changes})' if changes else ''}. Resume with the old data, data.extra_sets, data.weights and "
                "data.epochs, or start a new run."
            )
        for key, then, here in (
            ("seed", self.seed, now.seed),
            ("sequence_length", self.sequence_length, now.sequence_length),
        ):
            if then != here:
                raise UserError(f"{key}: the checkpoint has {then}, the run {here}. Set it back, or start a new run.")


def describe_sources(corpus: Corpus, slots_per_period: Sequence[int]) -> dict[str, str]:
    """Say, for each source that is drawn from, all that decides about the order; `slots` of a period are its own."""
    return {
        drawn.name: f"{_describe_one(drawn)}, {count} of {sum(slots_per_period)} draws"
        for drawn, count in zip(corpus.sources, slots_per_period, strict=True)
        if count
    }


def data_fingerprint(corpus: Corpus, drawn: dict[str, str]) -> str:
    """Return the index's fingerprint of a single source, else one over all that `describe` says."""
    if len(corpus.sources) == 1:
        return corpus.sets[0].index.fingerprint
    return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()


def _describe_one(drawn: WeightedSource) -> str:
    passes = "no end" if drawn.epochs is None else f"{drawn.epochs:g} epochs"
    return f"data {drawn.shards.index.fingerprint[:16]}, {passes}"
