"""Stage 4: train or load the tokenizer of the mix, and plan the shards of each stream."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_prep.recipe import Recipe
from data_prep.sorted_runs import RunReader, StoredDocument, merge_sorted
from data_prep.split import SizeHistogram, Stream, describe_split, divide_stream
from data_prep.streams import ShardTask, plan_stream
from data_prep.tokens import DocumentEncoder
from data_prep.train_tokenizer import TRAINING_CHARACTERS, train_tokenizer
from kabrn_dist.data.adapt_tokenizer import AdaptedTokenizer, load_any_tokenizer
from kabrn_dist.data.index import dtype_for
from kabrn_dist.data.tokenizer import Tokenizer

_MEASURED_BYTES = 1 << 18


def load_recipe_tokenizer(recipe: Recipe) -> AdaptedTokenizer | None:
    """Return the tokenizer that the recipe names, made usable; None if one has to be trained.

    Raises:
        UserError: the tokenizer cannot be used.
    """
    choice = recipe.tokenizer
    if choice.bytes:
        return AdaptedTokenizer(Tokenizer.of_bytes(), ())
    return load_any_tokenizer(choice.file) if choice.file is not None else None


def plan_shards(
    recipe: Recipe,
    run_folder: Path,
    streams: Sequence[Stream],
    dropped: np.ndarray,
    tokenizer: Tokenizer | None,
    reserved: Sequence[str] = (),
) -> tuple[Tokenizer, list[ShardTask]]:
    """Train the tokenizer if there is none, measure its tokens per byte on each stream, and divide streams into shards.

    Args:
        recipe: the recipe.
        run_folder: folder of the runs.
        streams: all streams.
        dropped: ids of documents to leave out, uint64, sorted.
        tokenizer: the tokenizer; None: train one.
        reserved: special tokens of one that is trained.

    Returns:
        The tokenizer and the shards to make.

    Raises:
        UserError: a stream has nothing to train on.
    """
    histograms = [divide_stream(run_folder, stream, dropped, recipe.validation_share) for stream in streams]
    _say_splits(recipe, streams, histograms)
    reader = RunReader(run_folder)
    if tokenizer is None:
        tokenizer = _train(recipe, reader, run_folder, streams, histograms, dropped, reserved)
    encoder = DocumentEncoder(tokenizer)
    item_bytes = np.dtype(dtype_for(tokenizer.vocab_size)).itemsize
    tasks: list[ShardTask] = []
    for number, (stream, histogram) in enumerate(zip(streams, histograms, strict=True)):
        measured = list(_read_train_texts(reader, run_folder, stream, histogram, dropped, _MEASURED_BYTES))
        tokens = sum(len(document.tokens) for document in encoder.encode(measured))
        bytes_per_token = sum(len(document.text) for document in measured) / tokens
        tasks += plan_stream(number, histogram, recipe.shard_mb * 1e6 / item_bytes * bytes_per_token)
    reader.close()
    return tokenizer, tasks


def _train(
    recipe: Recipe,
    reader: RunReader,
    runs: Path,
    streams: Sequence[Stream],
    histograms: Sequence[SizeHistogram],
    dropped: np.ndarray,
    reserved: Sequence[str],
) -> Tokenizer:
    """Train the tokenizer, and say so: for many seconds nothing else is done."""
    wanted = recipe.tokenizer.train
    assert wanted is not None
    weights = [sum(source.weight for source in stream.sources) for stream in streams]
    sizes = allocate_bytes(TRAINING_CHARACTERS, weights, [int(histogram.train.sum()) for histogram in histograms])
    print(f"training a tokenizer of {wanted:,} ids on {sum(sizes) / 1e6:,.1f} MB of text …", flush=True)
    start = time.monotonic()
    texts = _sample(reader, runs, streams, histograms, dropped, sizes)
    tokenizer = train_tokenizer(texts, wanted, show_progress=sys.stderr.isatty(), reserved=reserved)
    fewer = f"; the texts yield only {tokenizer.vocab_size:,} ids" if tokenizer.vocab_size < wanted else ""
    print(f"trained it in {time.monotonic() - start:,.1f} s{fewer}", flush=True)
    return tokenizer


def _say_splits(recipe: Recipe, streams: Sequence[Stream], histograms: Sequence[SizeHistogram]) -> None:
    share = recipe.validation_share
    if not any(histogram.validation.any() for histogram in histograms):
        remedy = "more documents here" if share else "a validation_share above 0 here"
        print(
            f"warning: no text is held out for validation: validation_share is {share:g}"
            f"{', and so few documents cannot be divided' if share else ''}; a training run that validates needs "
            f"{remedy}, or another shard set",
            file=sys.stderr,
            flush=True,
        )
        return
    for stream, histogram in zip(streams, histograms, strict=True):
        line = describe_split(stream, histogram, share)
        if line:
            print(line, file=sys.stderr if line.startswith("warning") else sys.stdout, flush=True)


def allocate_bytes(budget: int, weights: Sequence[float], available: Sequence[int]) -> list[int]:
    """Divide `budget` bytes by weight among streams.

    Args:
        budget: bytes to divide.
        weights: weight of each stream.
        available: bytes that each stream has. What one cannot supply goes to the others.

    Returns:
        Bytes for each stream.
    """
    sizes = [0] * len(weights)
    pending = {number for number, weight in enumerate(weights) if weight > 0}
    while pending:
        total = sum(weights[number] for number in pending)
        left = budget - sum(sizes)
        full = {number for number in pending if available[number] <= left * weights[number] / total}
        for number in full or pending:
            sizes[number] = available[number] if full else int(left * weights[number] / total)
        pending = pending - full if full else set()
    return sizes


def _sample(
    reader: RunReader,
    runs: Path,
    streams: Sequence[Stream],
    histograms: Sequence[SizeHistogram],
    dropped: np.ndarray,
    sizes: Sequence[int],
) -> Iterator[str]:
    """Yield training texts from the beginning of each stream, `sizes` bytes of it."""
    for stream, histogram, size in zip(streams, histograms, sizes, strict=True):
        for document in _read_train_texts(reader, runs, stream, histogram, dropped, size):
            place = 0
            # What special tokens stand for is no text to learn words from.
            for start, stop in [] if document.marks is None else document.marks.tolist():
                yield document.text[place:start].decode()
                place = stop
            yield document.text[place:].decode()


def _read_train_texts(
    reader: RunReader, runs: Path, stream: Stream, histogram: SizeHistogram, dropped: np.ndarray, size: int
) -> Iterator[StoredDocument]:
    """Yield the first `size` bytes of a stream's training texts; the last document is cut."""
    left = size
    for run, row in merge_sorted(runs, stream.runs, histogram.first_train_key, histogram.key_after(size), dropped):
        if left <= 0:
            return
        document = reader.read(run, row)
        if histogram.cut is not None:
            document = histogram.cut.part_of(row, document, "train")
        yield _cut(document, left) if len(document.text) > left else document
        left -= len(document.text)


def _cut(document: StoredDocument, size: int) -> StoredDocument:
    """Return a document with at most `size` bytes of its text, whole characters and special tokens only."""
    text = document.text[:size].decode("utf-8", "ignore").encode()
    marks = document.marks
    return document._replace(text=text, marks=None if marks is None else marks[marks[:, 1] <= len(text)])
