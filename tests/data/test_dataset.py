"""Batches: document boundaries, the same rows for every layout, cursors, slices."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kabrn_dist.data.corpus import Corpus, open_folder_corpus
from kabrn_dist.data.dataset import Batch, TokenDataset, make_batch, make_batch_naive, sequence_slice
from kabrn_dist.data.index_io import read_index
from kabrn_dist.data.state import DataState
from kabrn_dist.data.token_stream import mask_naive, stream_naive
from kabrn_dist.utils.errors import UserError
from tests.support.shard_sets import Texts, make_set

D = 256
LENGTH = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("batches") / "set"
    make_set(out, Texts("random", train=150, validation=12, sizes=(2, 1500)))
    return out


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    out = tmp_path_factory.mktemp("mixed") / "set"
    make_set(
        out,
        Texts("web", weight=2),
        Texts("math", train=20, masked=True),
        Texts("code", train=40, validation=0, epochs=2),
        Texts("notes", train=12, validation=1, sizes=(200, 201), masked=True, weight=0.25),
    )
    return open_folder_corpus(out)


def equal(a: Batch, b: Batch) -> bool:
    return all(x.dtype == y.dtype == torch.int64 and torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("stream", "documents", "positions"),
    [
        ([D, 1, 2, 3, 4], [0, 0, 0, 0], [0, 1, 2, 3]),
        ([9, 1, 2, 3, 4], [0, 0, 0, 0], [0, 1, 2, 3]),
        ([9, 1, D, 3, 4], [0, 0, 1, 1], [0, 1, 0, 1]),
        ([9, 1, 2, D, 4], [0, 0, 0, 1], [0, 1, 2, 0]),
        ([9, 1, 2, 3, D], [0, 0, 0, 0], [0, 1, 2, 3]),
        ([9, D, D, D, 5], [0, 1, 2, 3], [0, 0, 0, 0]),
        ([D, D, 1, D, D], [0, 1, 1, 2], [0, 0, 1, 0]),
        ([D, D, D, D, D], [0, 1, 2, 3], [0, 0, 0, 0]),
    ],
    ids=[
        "from-first",
        "throughout",
        "middle",
        "last-column",
        "ends-on-last",
        "one-token",
        "mixed",
        "all-starts",
    ],
)
def test_document_boundaries(stream: list[int], documents: list[int], positions: list[int]) -> None:
    for make in (make_batch, make_batch_naive):
        batch = make(np.array([stream]), D)
        assert batch.tokens.tolist() == [stream[:-1]] and batch.targets.tolist() == [stream[1:]]
        assert batch.documents.tolist() == [documents] and batch.positions.tolist() == [positions]


def test_fast_and_naive_batches_agree() -> None:
    random = np.random.default_rng(2)
    for share in (0.0, 0.02, 0.3, 1.0):
        for length in (1, 2, 17):
            streams = np.where(random.random((5, length + 1)) < share, D, random.integers(0, D, (5, length + 1)))
            used, sources = random.random((5, length)) < 0.5, random.integers(0, 3, 5)
            assert equal(make_batch(streams, D), make_batch_naive(streams, D))
            batch = make_batch(streams, D, used, sources)
            assert equal(batch, make_batch_naive(streams, D, used, sources))
            assert ((batch.targets.numpy() == -100) == ~used).all() and batch.sources.tolist() == sources.tolist()


def test_sequences_tile_the_stream(folder: Path) -> None:
    batches = TokenDataset(open_folder_corpus(folder), "validation", LENGTH, seed=0, ordered=False)
    whole = stream_naive(folder, read_index(folder), "validation")
    assert batches.num_sequences == (len(whole) - 1) // LENGTH
    batch = batches.get(range(batches.num_sequences))
    assert np.array_equal(batch.tokens.reshape(-1), whole[: batches.num_sequences * LENGTH])
    assert np.array_equal(batch.targets.reshape(-1), whole[1 : batches.num_sequences * LENGTH + 1])
    for bad in (-1, batches.num_sequences):
        with pytest.raises(IndexError):
            batches.get([bad])
    assert batches.get([]).tokens.shape == (0, LENGTH)


def test_an_epoch_holds_every_sequence_once(folder: Path) -> None:
    batches = TokenDataset(open_folder_corpus(folder), "train", LENGTH, seed=5)
    straight = TokenDataset(open_folder_corpus(folder), "train", LENGTH, seed=5, ordered=False)
    n = batches.num_sequences
    wanted = sorted(straight.get(range(n)).tokens.tolist())
    for epoch in range(2):
        assert sorted(batches.get(range(epoch * n, epoch * n + n)).tokens.tolist()) == wanted


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_rows_are_the_same_for_every_world_and_after_any_cursor(folder: Path, world: int) -> None:
    global_batch, steps = 24, 6
    whole = TokenDataset(open_folder_corpus(folder), "train", LENGTH, seed=5).get(range(global_batch * steps))
    for resumed_at in (0, 1, 4):
        ranks = [TokenDataset(open_folder_corpus(folder), "train", LENGTH, seed=5) for _ in range(world)]
        consumed = ranks[0].state(resumed_at * global_batch).consumed
        for step in range(resumed_at, steps):
            positions = range(consumed, consumed + global_batch)
            for rank, batches in enumerate(ranks):
                mine = batches.get(positions[rank::world])
                expected = Batch(*(part[step * global_batch :][:global_batch][rank::world] for part in whole))
                assert equal(mine, expected)
            consumed += global_batch


def test_slices_join_to_the_whole_and_keep_global_numbers(folder: Path) -> None:
    batch = TokenDataset(open_folder_corpus(folder), "train", LENGTH, seed=5).get(range(8))
    for degree in (1, 2, 4, 64):
        slices = [sequence_slice(batch, rank, degree) for rank in range(degree)]
        columns = [torch.cat(parts, dim=1) for parts in list(zip(*slices, strict=True))[:-1]]
        assert equal(Batch(*columns, slices[-1].sources), batch)
        assert all(part.is_contiguous() for part in slices[-1])
    with pytest.raises(UserError, match="64 columns do not split evenly over a sequence degree of 3"):
        sequence_slice(batch, 0, 3)
    assert equal(batch.to("cpu"), batch)


def test_a_cursor_goes_on_with_the_same_stream_only(folder: Path, tmp_path: Path) -> None:
    batches = TokenDataset(open_folder_corpus(folder), "train", LENGTH, seed=5)
    state = DataState(**asdict(batches.state(48)))
    state.check(batches)
    for changed, expected in (
        (replace(state, seed=6), "run.seed: the checkpoint has 6, the run 5; set run.seed to 6"),
        (
            replace(state, sequence_length=32),
            "data.sequence_length: the checkpoint has 32, the run 64; set data.sequence_length to 32",
        ),
        (replace(state, fingerprint="f" * 64), "trained on data ffffffffffff, the run has"),
    ):
        with pytest.raises(UserError, match=expected):
            changed.check(batches)


def test_too_little_data_is_said_at_once(folder: Path) -> None:
    tokens = read_index(folder).tokens("validation")
    assert TokenDataset(open_folder_corpus(folder), "validation", tokens - 1, seed=0).num_sequences == 1
    with pytest.raises(UserError, match=rf"validation split has {tokens} tokens.*needs {tokens + 1}.*shorten"):
        TokenDataset(open_folder_corpus(folder), "validation", tokens, seed=0)
    with pytest.raises(UserError, match="sequence_length: 0"):
        TokenDataset(open_folder_corpus(folder), "train", 0, seed=0)


def rows_naive(corpus: Corpus, split: str, source: int, sequence: int) -> tuple[list[int], list[int]]:
    """Tokens and targets of one sequence, from unpacked tars."""
    name, shards = corpus.sources[source].name, corpus.sets[0]
    stream = stream_naive(shards.folder, shards.index, split, name)  # type: ignore[attr-defined]
    start = sequence * LENGTH
    tokens, targets = stream[start : start + LENGTH], stream[start + 1 : start + LENGTH + 1]
    if corpus.sources[source].source.masked:
        used = mask_naive(shards.folder, shards.index, split, name)  # type: ignore[attr-defined]
        targets = np.where(used[start + 1 : start + LENGTH + 1], targets, -100)
    return tokens.tolist(), targets.tolist()


def test_validation_reads_the_sources_in_turn_with_their_masks(mixed: Corpus) -> None:
    batches = TokenDataset(mixed, "validation", LENGTH, seed=0, ordered=False)
    assert (
        batches.sequences_per_source[2] == 0
        and batches.sequences_per_source[3] == 3
        and batches.num_positions == batches.num_sequences
    )
    batch = batches.get(range(batches.num_sequences))
    assert torch.bincount(batch.sources, minlength=4).tolist() == batches.sequences_per_source
    places = [(source, number) for source, count in enumerate(batches.sequences_per_source) for number in range(count)]
    for row, (source, number) in enumerate(places):
        assert batch.sources[row] == source
        assert (batch.tokens[row].tolist(), batch.targets[row].tolist()) == rows_naive(
            mixed, "validation", source, number
        )
    share = (batch.targets[batch.sources == 1] >= 0).float().mean()
    assert 0.2 < share < 0.4 and (batch.targets[batch.sources == 0] >= 0).all()


def test_what_is_scored_is_spread_evenly_over_the_sources(mixed: Corpus) -> None:
    batches = TokenDataset(mixed, "validation", LENGTH, seed=0, ordered=False)
    web, math, _, notes = batches.sequences_per_source
    for count in (1, 2, 3, 8, 10, 3 + 2 * min(web, math), 10**6):
        positions = batches.validation_positions(count)
        found = torch.bincount(batches.get(positions).sources, minlength=4).tolist()
        assert len(set(positions)) == sum(found) == min(count, batches.num_sequences)
        assert found[2] == 0 and found[3] == min(notes, found[3])
        fair = max(found)
        assert all(n >= min(there, fair - 1) for n, there in zip(found, batches.sequences_per_source, strict=True))
    assert positions == list(range(batches.num_sequences))


@pytest.mark.slow
def test_training_draws_every_source_by_its_weight_and_its_own_order(mixed: Corpus) -> None:
    batches = TokenDataset(mixed, "train", LENGTH, seed=5)
    n = 4096
    batch = batches.get(range(n))
    counts = torch.bincount(batch.sources, minlength=4).tolist()
    # code leaves after two passes; before, shares are 2 : 1 : 1 : 0.25.
    first = torch.bincount(batch.sources[:400], minlength=4) / 400 * 4.25
    assert (first - torch.tensor([2, 1, 1, 0.25])).abs().max() < 0.02
    assert counts[2] == 2 * batches.sequences_per_source[2] and sum(counts) == n
    assert batches.sequences_drawn(n) == counts and batches.sequences_drawn(0) == [0] * 4
    for source in range(4):
        rows = batch.tokens[batch.sources == source].tolist()
        count = batches.sequences_per_source[source]
        whole = [rows_naive(mixed, "train", source, number)[0] for number in range(count)]
        for epoch in range(len(rows) // count):
            assert sorted(rows[epoch * count : (epoch + 1) * count]) == sorted(whole)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_mixed_rows_are_the_same_for_every_world(mixed: Corpus, world: int) -> None:
    whole = TokenDataset(mixed, "train", LENGTH, seed=5).get(range(600))
    for rank in range(world):
        mine = TokenDataset(mixed, "train", LENGTH, seed=5).get(range(240 + rank, 600, world))
        assert equal(mine, Batch(*(part[240 + rank :: world] for part in whole)))


def test_a_cursor_names_what_changed(mixed: Corpus) -> None:
    batches = TokenDataset(mixed, "train", LENGTH, seed=5)
    state = batches.state(48)
    DataState(**json.loads(json.dumps(asdict(state)))).check(batches)

    def changed(number: int, **fields: float | None) -> TokenDataset:
        sources = list(mixed.sources)
        sources[number] = sources[number]._replace(**fields)
        return TokenDataset(replace(mixed, sources=tuple(sources)), "train", LENGTH, seed=5)

    # In another unit the same weights are the same.
    same = tuple(drawn._replace(weight=8 * drawn.weight) for drawn in mixed.sources)
    state.check(TokenDataset(replace(mixed, sources=same), "train", LENGTH, seed=5))
    for other, expected in (
        (changed(1, weight=3.0), r"math: data \w+, no end, 964 of 4096 draws, now data \w+, no end, 1966 of 4096"),
        (changed(2, epochs=None), r"\(code: data \w+, 2 epochs, 964 of 4096 draws, now data \w+, no end, 964 of"),
        (changed(2, weight=0.0), "code: .*now not drawn.*resume with the old data, data.extra_sets, data.weights"),
    ):
        with pytest.raises(UserError, match=expected):
            state.check(other)


def test_the_end_of_the_data_is_known_at_the_start(mixed: Corpus) -> None:
    sources = tuple(drawn._replace(epochs=1.5) for drawn in mixed.sources)
    batches = TokenDataset(replace(mixed, sources=sources), "train", LENGTH, seed=5)
    assert batches.num_positions == sum(round(1.5 * count) for count in batches.sequences_per_source)
    batches.check_length(batches.num_positions)
    with pytest.raises(
        UserError, match=rf"{batches.num_positions + 1:,} sequences, the data has {batches.num_positions:,} .*web 1.5"
    ):
        batches.check_length(batches.num_positions + 1)
    with pytest.raises(UserError, match=r"lower training\.steps"):
        batches.get([batches.num_positions])
    with pytest.raises(IndexError):
        batches.get([-1])
    assert batches.sequences_drawn(batches.num_positions) == [
        round(1.5 * count) for count in batches.sequences_per_source
    ]
    TokenDataset(mixed, "train", LENGTH, seed=5).check_length(10**12)


def test_a_source_that_is_too_short_can_be_left_out(mixed: Corpus) -> None:
    length = 3000
    with pytest.raises(UserError, match=r"train split of source notes has 2400 tokens.*data.weights.notes to 0"):
        TokenDataset(mixed, "train", length, seed=0)
    sources = (*mixed.sources[:3], mixed.sources[3]._replace(weight=0.0))
    without = TokenDataset(replace(mixed, sources=sources), "train", length, seed=0)
    assert without.sequences_per_source[3] == 0 and 3 not in without.get(range(200)).sources
