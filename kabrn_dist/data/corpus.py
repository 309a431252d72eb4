"""Corpus of a run: the sources of one or several shard sets, with their weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from kabrn_dist.config import DataConfig
from kabrn_dist.data.index import Source, SplitName
from kabrn_dist.data.open_files import OpenFiles
from kabrn_dist.data.remote import open_shard_set
from kabrn_dist.data.shard_set import ShardSet, open_shard_folder
from kabrn_dist.data.shard_verifier import ShardVerifier
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.utils.errors import UserError


class WeightedSource(NamedTuple):
    """A source as a run draws from it.

    Attributes:
        name: Unique in the run.
        shards: Shard set that holds the source.
        source: Its entry in the index.
        weight: Fraction of the training sequences in any unit; 0 to leave it out of training.
        epochs: Passes after which it is exhausted; None for never.
    """

    name: str
    shards: ShardSet
    source: Source
    weight: float
    epochs: float | None


@dataclass(frozen=True)
class Corpus:
    """Sources of shard sets that have the same tokenizer.

    Attributes:
        sets: Shard sets, at least one.
        sources: Sources of all sets, in their order.
        cache_bytes: Limit on the cache of sets behind a URL.
        files: Open files of all sets. Whoever opened the corpus may use them in one thread at a time.
    """

    sets: tuple[ShardSet, ...]
    sources: tuple[WeightedSource, ...]
    cache_bytes: float = 0.0
    files: OpenFiles = field(default_factory=OpenFiles)

    @property
    def names(self) -> list[str]:
        """Names of the sources."""
        return [source.name for source in self.sources]

    @property
    def document_token(self) -> int:
        """Id of the token that begins each document."""
        return self.sets[0].index.document_token

    @property
    def location(self) -> str:
        """Folders and URLs of the sets, for messages."""
        return ", ".join(shards.location for shards in self.sets)

    @property
    def is_remote(self) -> bool:
        """Whether a set lies behind a URL."""
        return any(shards.is_remote for shards in self.sets)

    @property
    def tokenizer_sha256(self) -> str:
        """Hash of `tokenizer.json`."""
        return self.sets[0].index.tokenizer.sha256

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the sets, with the chat template of the first that has one.

        Raises:
            UserError: if it is not the one that made the shards.
        """
        has_template = (each for each in self.sets if each.index.tokenizer.chat_template_sha256 is not None)
        return next(has_template, self.sets[0]).tokenizer()

    def num_tokens(self, split: SplitName) -> int:
        """Return the number of tokens of a split, over all sources."""
        return sum(shards.index.tokens(split) for shards in self.sets)

    def gzip_bits_per_byte(self) -> float:
        """Return the size of the validation texts after `gzip -9` in bits per byte of text; 0 if it is not recorded."""
        gzip_bytes = sum(shards.index.gzip9_bytes("validation") for shards in self.sets)
        return 8 * gzip_bytes / max(1, sum(shards.index.text_bytes("validation") for shards in self.sets))


def open_corpus(data_config: DataConfig) -> Corpus:
    """Open all shard sets of a configuration.

    Raises:
        UserError: if one cannot be read or is wrong, they have different tokenizers, or `weights` and `epochs` name an
            unknown source or leave nothing to draw from.
    """
    extra_sets = data_config.extra_sets
    paths = [data_config.path, *(extra.path for extra in extra_sets)]
    sets = [open_shard_set(path, data_config.cache_dir, data_config.cache_size_gb) for path in paths]
    _check_tokenizers(sets, "data.extra_sets")
    factors = [1.0, *(extra.weight for extra in extra_sets)]
    sources: dict[str, WeightedSource] = {}
    for shards, factor in zip(sets, factors, strict=True):
        for source in shards.index.sources:
            name = _free_name(source.name, sources)
            sources[name] = WeightedSource(name, shards, source, factor * source.weight, source.epochs)
    weights, epochs = data_config.weights, data_config.epochs
    for key, overrides in (("weights", weights), ("epochs", epochs)):
        for name in overrides:
            if name not in sources:
                raise UserError(f"data.{key}: unknown source {name!r}; use one of {', '.join(sources)}")
    weighted = tuple(
        source._replace(weight=weights.get(name, source.weight), epochs=epochs.get(name, source.epochs))
        for name, source in sources.items()
    )
    total = sum(source.weight for source in weighted)
    if not 0 < total < math.inf:
        raise UserError(
            f"data.weights: the weights of {', '.join(sources)} sum to {total:g}, so there is nothing to draw from; "
            "give at least one source a weight above 0"
        )
    return Corpus(tuple(sets), weighted, data_config.cache_size_gb * 1e9, OpenFiles(ShardVerifier()))


def open_folder_corpus(folder: Path) -> Corpus:
    """Open one shard folder with the weights of its index.

    Raises:
        UserError: if the index or a shard is missing or wrong.
    """
    shards = open_shard_folder(folder)
    sources = (WeightedSource(s.name, shards, s, s.weight, s.epochs) for s in shards.index.sources)
    return Corpus((shards,), tuple(sources))


def mix_corpora(corpus: Corpus, other: Corpus, fraction: float, key: str) -> Corpus:
    """Return a corpus of which a fraction of the training sequences comes from another one's sources.

    Args:
        corpus: What the rest comes from; its open files are used for both.
        other: Sources that come last; they are renamed where a name is taken.
        fraction: Above 0 and below 1.
        key: What names the other one in the configuration, for messages.

    Raises:
        UserError: if they have different tokenizers.
    """
    _check_tokenizers([*corpus.sets, *other.sets], key)
    sources: dict[str, WeightedSource] = {}
    for part, share in ((corpus, 1 - fraction), (other, fraction)):
        total = sum(source.weight for source in part.sources)
        for source in part.sources:
            name = _free_name(source.name, sources)
            sources[name] = source._replace(name=name, weight=share * source.weight / total)
    return replace(corpus, sets=(*corpus.sets, *other.sets), sources=tuple(sources.values()))


def _check_tokenizers(sets: list[ShardSet], key: str) -> None:
    first = sets[0]
    for other in sets[1:]:
        hashes = [shards.index.tokenizer.sha256 for shards in (other, first)]
        if hashes[0] != hashes[1]:
            raise UserError(
                f"{key}: {other.location} has tokenizer {hashes[0][:12]}, {first.location} has "
                f"{hashes[1][:12]}; prepare both with the same (--tokenizer of `mixkabrn prepare`)"
            )
        templates = [shards.index.tokenizer.chat_template_sha256 for shards in sets]
        if len({template for template in templates if template is not None}) > 1:
            raise UserError(
                f"{key}: {other.location} and others have different chat templates, so a model would learn "
                "to write conversations in two ways; prepare all with the same (chat_template in a recipe)"
            )
        # The first set is compared with the tokenizer itself.
        for field_name in ("vocabulary", "document_token"):
            ours, theirs = getattr(other.index, field_name), getattr(first.index, field_name)
            if ours != theirs:
                raise UserError(
                    f"{key}: {other.location} has {field_name} {ours}, {first.location} has {theirs} with the same "
                    "tokenizer, so one index is wrong; copy both again"
                )


def _free_name(name: str, taken: Mapping[str, WeightedSource]) -> str:
    """Return `name`, or `name.2`, `name.3` and so on if it is taken."""
    candidates = (name if number == 1 else f"{name}.{number}" for number in itertools.count(1))
    return next(candidate for candidate in candidates if candidate not in taken)
