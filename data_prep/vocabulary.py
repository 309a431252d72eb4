"""Stage 4: the tokenizer of the mix, and with it how the streams are cut into shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_prep.recipe import Recipe
from data_prep.sorted_runs import RunReader, StoredDocument, merge_sorted
from data_prep.streams import ShardTask, SizeHistogram, Stream, cut, take_census
from data_prep.tokens import Encoder
from data_prep.train_tokenizer import SAMPLE_CHARACTERS, train_tokenizer
from kabrn_dist.data.index import dtype_for
from kabrn_dist.data.tokenizer import Tokenizer

_MEASURED_BYTES = 1 << 18


def choose_tokenizer(recipe: Recipe) -> Tokenizer | None:
    """The tokenizer that the recipe names; None: one is to be trained. Raises UserError when it cannot be used."""
    choice = recipe.tokenizer
    if choice.bytes:
        return Tokenizer.of_bytes()
    return Tokenizer.load(choice.file) if choice.file is not None else None


def plan_shards(
    recipe: Recipe, runs: Path, streams: Sequence[Stream], dropped: np.ndarray, tokenizer: Tokenizer | None
) -> tuple[Tokenizer, list[ShardTask]]:
    """Train the tokenizer where there is none, measure what it makes of each stream, and cut the streams.

    Raises UserError when a stream has nothing to train on.
    """
    censuses = [take_census(runs, stream, dropped, recipe.validation_share) for stream in streams]
    reader = RunReader(runs)
    if tokenizer is None:
        assert recipe.tokenizer.train is not None
        texts = _sample(reader, runs, streams, censuses, dropped)
        tokenizer = train_tokenizer(texts, recipe.tokenizer.train)
    encoder = Encoder(tokenizer)
    item_bytes = np.dtype(dtype_for(tokenizer.vocab_size)).itemsize
    tasks: list[ShardTask] = []
    for number, (stream, census) in enumerate(zip(streams, censuses, strict=True)):
        measured = list(_first(reader, runs, stream, census, dropped, _MEASURED_BYTES))
        tokens = sum(len(document.tokens) for document in encoder.encode(measured))
        text_bytes_a_token = sum(len(document.text) for document in measured) / tokens
        tasks += cut(number, census, recipe.shard_mb * 1e6 / item_bytes * text_bytes_a_token)
    reader.close()
    return tokenizer, tasks


def sizes_of_sample(budget: int, weights: Sequence[float], available: Sequence[int]) -> list[int]:
    """Share `budget` bytes by weight among streams that have no more than `available`; the others take up the rest."""
    sizes = [0] * len(weights)
    waiting = {number for number, weight in enumerate(weights) if weight > 0}
    while waiting:
        total = sum(weights[number] for number in waiting)
        left = budget - sum(sizes)
        full = {number for number in waiting if available[number] <= left * weights[number] / total}
        for number in full or waiting:
            sizes[number] = available[number] if full else int(left * weights[number] / total)
        waiting = waiting - full if full else set()
    return sizes


def _sample(
    reader: RunReader, runs: Path, streams: Sequence[Stream], censuses: Sequence[SizeHistogram], dropped: np.ndarray
) -> Iterator[str]:
    """Yield training texts from the front of each stream, its share of the mix of them."""
    weights = [sum(source.weight for source in stream.sources) for stream in streams]
    sizes = sizes_of_sample(SAMPLE_CHARACTERS, weights, [int(census.train.sum()) for census in censuses])
    for stream, census, size in zip(streams, censuses, sizes, strict=True):
        for document in _first(reader, runs, stream, census, dropped, size):
            # A token is some characters long: half a character at the end is left out, not a reason to fail.
            yield document.text.decode("utf-8", "ignore")


def _first(
    reader: RunReader, runs: Path, stream: Stream, census: SizeHistogram, dropped: np.ndarray, size: int
) -> Iterator[StoredDocument]:
    """Yield the first `size` bytes of a stream's training texts, the last document cut."""
    left = size
    for run, row in merge_sorted(runs, stream.runs, census.limit, census.reach(size), dropped):
        if left <= 0:
            return
        document = reader.read(run, row)
        yield document._replace(text=document.text[:left]) if len(document.text) > left else document
        left -= len(document.text)
