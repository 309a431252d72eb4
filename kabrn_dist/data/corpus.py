"""What a run draws from: the sources of one shard set or several, with their weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from kabrn_dist.data.index import Source, SplitName
from kabrn_dist.data.remote import open_shard_set
from kabrn_dist.data.shard_set import ShardSet, open_shard_folder
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.utils.errors import UserError


class ExtraSetSettings(Protocol):
    """One more shard set: see `data.extra_sets` of the configuration."""

    @property
    def path(self) -> str: ...
    @property
    def weight(self) -> float: ...


class DataSettings(Protocol):
    """The `data` section of the configuration."""

    @property
    def path(self) -> str: ...
    @property
    def extra_sets(self) -> Sequence[ExtraSetSettings]: ...
    @property
    def weights(self) -> Mapping[str, float]: ...
    @property
    def epochs(self) -> Mapping[str, float]: ...
    @property
    def cache_dir(self) -> Path: ...
    @property
    def cache_size_gb(self) -> float: ...


class WeightedSource(NamedTuple):
    """A source as a run draws from it.

    `name` is unique in the run; `weight` its share in any unit, 0 to leave it out of training; `epochs` the passes
    after which it leaves, None for never.
    """

    name: str
    shards: ShardSet
    source: Source
    weight: float
    epochs: float | None


@dataclass(frozen=True)
class Corpus:
    """Sources of shard sets that share one tokenizer.

    Attributes:
        sets: at least one.
        sources: of all sets, in their order.
        cache_bytes: what may be kept of sets behind a URL.
    """

    sets: tuple[ShardSet, ...]
    sources: tuple[WeightedSource, ...]
    cache_bytes: float = 0.0

    @property
    def names(self) -> list[str]:
        """The sources' names."""
        return [drawn.name for drawn in self.sources]

    @property
    def document_token(self) -> int:
        return self.sets[0].index.document_token

    @property
    def location(self) -> str:
        """The sets' folders and URLs, for messages."""
        return ", ".join(each.location for each in self.sets)

    @property
    def is_remote(self) -> bool:
        """True where a set lies behind a URL."""
        return any(each.is_remote for each in self.sets)

    @property
    def tokenizer_sha256(self) -> str:
        return self.sets[0].index.tokenizer.sha256

    def tokenizer(self) -> Tokenizer:
        """Return the sets' tokenizer. Raises UserError when it is not the one that made the shards."""
        return self.sets[0].tokenizer()

    def num_tokens(self, split: SplitName) -> int:
        """Tokens of a split, over all sources."""
        return sum(each.index.tokens(split) for each in self.sets)

    def gzip_bits_per_byte(self) -> float:
        """What `gzip -9` makes of the validation texts, in bits per byte of them; 0 where nobody says."""
        packed = sum(each.index.gzip9_bytes("validation") for each in self.sets)
        return 8 * packed / max(1, sum(each.index.text_bytes("validation") for each in self.sets))


def open_corpus(settings: DataSettings) -> Corpus:
    """Open all shard sets of a configuration.

    Raises UserError when one cannot be read or is wrong, they have different tokenizers, or `weights` and `epochs` name
    a source that there is not or leave nothing to draw.
    """
    paths = [settings.path, *(each.path for each in settings.extra_sets)]
    sets = [open_shard_set(path, settings.cache_dir, settings.cache_size_gb) for path in paths]
    for other in sets[1:]:
        found, wanted = other.index.tokenizer.sha256, sets[0].index.tokenizer.sha256
        if found != wanted:
            raise UserError(
                f"data.extra_sets: {other.location} has tokenizer {found[:12]}, {sets[0].location} has {wanted[:12]}. "
                "Prepare both with the same (--tokenizer of data_prep)."
            )
    factors = [1.0, *(each.weight for each in settings.extra_sets)]
    sources: dict[str, WeightedSource] = {}
    for each, factor in zip(sets, factors, strict=True):
        for source in each.index.sources:
            name = _free_name(source.name, sources)
            sources[name] = WeightedSource(name, each, source, factor * source.weight, source.epochs)
    for key, given in (("weights", settings.weights), ("epochs", settings.epochs)):
        for name in given:
            if name not in sources:
                raise UserError(f"data.{key}: there is no source {name!r}; there are {', '.join(sources)}.")
    drawn = tuple(
        each._replace(weight=settings.weights.get(name, each.weight), epochs=settings.epochs.get(name, each.epochs))
        for name, each in sources.items()
    )
    total = sum(each.weight for each in drawn)
    if not 0 < total < math.inf:
        raise UserError(
            f"data.weights: the weights of {', '.join(sources)} sum to {total:g}, so there is nothing to draw by; give "
            "at least one source a weight above 0."
        )
    return Corpus(tuple(sets), drawn, settings.cache_size_gb * 1e9)


def open_folder_corpus(folder: Path) -> Corpus:
    """Open one folder as its index says. Raises UserError when the index or a shard is missing or wrong."""
    shards = open_shard_folder(folder)
    drawn = (WeightedSource(s.name, shards, s, s.weight, s.epochs) for s in shards.index.sources)
    return Corpus((shards,), tuple(drawn))


def _free_name(name: str, taken: Mapping[str, WeightedSource]) -> str:
    """`name`, or `name.2`, `name.3` and so on where there is one of that name."""
    candidates = (name if number == 1 else f"{name}.{number}" for number in itertools.count(1))
    return next(free for free in candidates if free not in taken)
