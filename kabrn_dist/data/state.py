"""Position of a run in its data, and the check that a later session continues with the same data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kabrn_dist.data.corpus import Corpus, WeightedSource
from kabrn_dist.utils.errors import UserError


class HasDataState(Protocol):
    """Data with a position that can be stored, such as `TokenDataset`."""

    def state(self, consumed: int) -> DataState:
        """Return the state after `consumed` sequences."""


@dataclass(frozen=True)
class DataState:
    """Position of a run in its data. The fields are part of the checkpoint format.

    Attributes:
        consumed: Sequences read over all ranks since the start of the run.
        seed: Seed of the order.
        sequence_length: Tokens of a sequence.
        fingerprint: Hash over the shard sets and their weights.
        drawn: For each source that is drawn from, a description of all that decides about the order.
    """

    consumed: int
    seed: int
    sequence_length: int
    fingerprint: str
    drawn: dict[str, str] = field(default_factory=dict)

    def check(self, data: HasDataState) -> None:
        """Check that `data` continues the stream of sequences that this state is from.

        Raises:
            UserError: if it does not, with the differences.
        """
        current = data.state(self.consumed)
        if self.fingerprint != current.fingerprint:
            changes = "; ".join(
                f"{name}: {self.drawn.get(name, 'not drawn')}, now {current.drawn.get(name, 'not drawn')}"
                for name in {**self.drawn, **current.drawn}
                if self.drawn.get(name) != current.drawn.get(name)
            )
            raise UserError(
                f"the checkpoint was trained on data {self.fingerprint[:12]}, the run has {current.fingerprint[:12]}"
                f"{f' ({changes})' if changes else ''}; resume with the old data, data.extra_sets, data.weights and "
                "data.epochs, or start a new run"
            )
        for key, before, now in (
            ("run.seed", self.seed, current.seed),
            ("data.sequence_length", self.sequence_length, current.sequence_length),
        ):
            if before != now:
                raise UserError(
                    f"{key}: the checkpoint has {before}, the run {now}; set {key} to {before}, or start a new run"
                )


def describe_sources(corpus: Corpus, slots_per_period: Sequence[int]) -> dict[str, str]:
    """Return, for each source that is drawn from, a description of all that decides about the order.

    Args:
        corpus: Sources of the run.
        slots_per_period: Slots of each source in a period of the mixture.
    """
    return {
        source.name: f"{_describe_one(source)}, {count} of {sum(slots_per_period)} draws"
        for source, count in zip(corpus.sources, slots_per_period, strict=True)
        if count
    }


def data_fingerprint(corpus: Corpus, descriptions: dict[str, str]) -> str:
    """Return the fingerprint of the index for a single source, else a hash over `describe_sources`."""
    if len(corpus.sources) == 1:
        return corpus.sets[0].index.fingerprint
    return hashlib.sha256(json.dumps(descriptions, sort_keys=True).encode()).hexdigest()


def _describe_one(source: WeightedSource) -> str:
    passes = "no end" if source.epochs is None else f"{source.epochs:g} epochs"
    return f"data {source.shards.index.fingerprint[:16]}, {passes}"
