"""Stage 4: the tokenizer of the mix, and with it how the streams are cut into shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_prep.recipe import Recipe
from data_prep.sorted_runs import RunReader, StoredDocument, merge_sorted
from data_prep.streams import ShardTask, SizeHistogram, Stream, count_sizes, plan_stream
from data_prep.tokens import DocumentEncoder
from data_prep.train_tokenizer import TRAINING_CHARACTERS, train_tokenizer
from kabrn_dist.data.index import dtype_for
from kabrn_dist.data.tokenizer import Tokenizer

_MEASURED_BYTES = 1 << 18


def load_tokenizer(recipe: Recipe) -> Tokenizer | None:
    """The tokenizer that the recipe names; None: one is to be trained. Raises UserError when it cannot be used."""
    choice = recipe.tokenizer
    if choice.bytes:
        return Tokenizer.of_bytes()
    return Tokenizer.load(choice.file) if choice.file is not None else None


def plan_shards(
    recipe: Recipe, run_folder: Path, streams: Sequence[Stream], dropped: np.ndarray, tokenizer: Tokenizer | None
) -> tuple[Tokenizer, list[ShardTask]]:
    """Train the tokenizer where there is none, measure what it makes of each stream, and cut the streams.

    Raises UserError when a stream has nothing to train on.
    """
    censuses = [count_sizes(run_folder, stream, dropped, recipe.validation_share) for stream in streams]
    reader = RunReader(run_folder)
    if tokenizer is None:
        assert recipe.tokenizer.train is not None
        texts = _sample(reader, run_folder, streams, censuses, dropped)
        tokenizer = train_tokenizer(texts, recipe.tokenizer.train)
    encoder = DocumentEncoder(tokenizer)
    item_bytes = np.dtype(dtype_for(tokenizer.vocab_size)).itemsize
    tasks: list[ShardTask] = []
    for number, (stream, census) in enumerate(zip(streams, censuses, strict=True)):
        measured = list(_read_train_texts(reader, run_folder, stream, census, dropped, _MEASURED_BYTES))
        tokens = sum(len(document.tokens) for document in encoder.encode(measured))
        text_bytes_a_token = sum(len(document.text) for document in measured) / tokens
        tasks += plan_stream(number, census, recipe.shard_mb * 1e6 / item_bytes * text_bytes_a_token)
    reader.close()
    return tokenizer, tasks


def allocate_bytes(budget: int, weights: Sequence[float], available: Sequence[int]) -> list[int]:
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
    reader: RunReader, runs: Path, streams: Sequence[Stream], histograms: Sequence[SizeHistogram], dropped: np.ndarray
) -> Iterator[str]:
    """Yield training texts from the front of each stream, its share of the mix of them."""
    weights = [sum(source.weight for source in stream.sources) for stream in streams]
    sizes = allocate_bytes(TRAINING_CHARACTERS, weights, [int(census.train.sum()) for census in histograms])
    for stream, census, size in zip(streams, histograms, sizes, strict=True):
        for document in _read_train_texts(reader, runs, stream, census, dropped, size):
            # A token is some characters long: half a character at the end is left out, not a reason to fail.
            yield document.text.decode("utf-8", "ignore")


def _read_train_texts(
    reader: RunReader, runs: Path, stream: Stream, histogram: SizeHistogram, dropped: np.ndarray, size: int
) -> Iterator[StoredDocument]:
    """Yield the first `size` bytes of a stream's training texts, the last document cut."""
    left = size
    for run, row in merge_sorted(runs, stream.runs, histogram.first_train_key, histogram.key_after(size), dropped):
        if left <= 0:
            return
        document = reader.read(run, row)
        yield document._replace(text=document.text[:left]) if len(document.text) > left else document
        left -= len(document.text)
