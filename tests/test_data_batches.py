"""Batches: document boundaries, the same rows for every layout, cursors, slices."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.prepare import Plan, collect, prepare
from data_prep.sources import Document
from kabrn_dist.data.batches import Batch, Batches, Cursor, make_batch, make_batch_naive, sequence_slice
from kabrn_dist.data.index import Source, read_index
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.data.tokens import stream_naive
from kabrn_dist.errors import UserError

D = 256
LENGTH = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("batches") / "set"
    random = np.random.default_rng(1)
    letters = np.array(list("abcdefgh ijkl\n"))
    texts = ["".join(random.choice(letters, random.integers(1, 1500))) for _ in range(150)]
    plan = Plan(out, Source(name="random", options={}), Tokenizer.of_bytes(), 0, 0.1, 50_000, False)
    prepare(plan, collect((Document(str(n), text) for n, text in enumerate(texts)), 0.1))
    return out


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
            assert equal(make_batch(streams, D), make_batch_naive(streams, D))


def test_sequences_tile_the_stream(folder: Path) -> None:
    batches = Batches(folder, "validation", LENGTH, seed=0, ordered=False)
    whole = stream_naive(folder, read_index(folder), "validation")
    assert batches.sequences == (len(whole) - 1) // LENGTH
    batch = batches.rows(range(batches.sequences))
    assert np.array_equal(batch.tokens.reshape(-1), whole[: batches.sequences * LENGTH])
    assert np.array_equal(batch.targets.reshape(-1), whole[1 : batches.sequences * LENGTH + 1])
    for bad in (-1, batches.sequences):
        with pytest.raises(IndexError):
            batches.rows([bad])
    assert batches.rows([]).tokens.shape == (0, LENGTH)


def test_an_epoch_holds_every_sequence_once(folder: Path) -> None:
    batches = Batches(folder, "train", LENGTH, seed=5)
    straight = Batches(folder, "train", LENGTH, seed=5, ordered=False)
    n = batches.sequences
    wanted = sorted(straight.rows(range(n)).tokens.tolist())
    for epoch in range(2):
        assert sorted(batches.rows(range(epoch * n, epoch * n + n)).tokens.tolist()) == wanted


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_rows_are_the_same_for_every_world_and_after_any_cursor(folder: Path, world: int) -> None:
    global_batch, steps = 24, 6
    whole = Batches(folder, "train", LENGTH, seed=5).rows(range(global_batch * steps))
    for resumed_at in (0, 1, 4):
        ranks = [Batches(folder, "train", LENGTH, seed=5) for _ in range(world)]
        consumed = ranks[0].cursor(resumed_at * global_batch).consumed
        for step in range(resumed_at, steps):
            positions = range(consumed, consumed + global_batch)
            for rank, batches in enumerate(ranks):
                mine = batches.rows(positions[rank::world])
                expected = Batch(*(part[step * global_batch :][:global_batch][rank::world] for part in whole))
                assert equal(mine, expected)
            consumed += global_batch


def test_slices_join_to_the_whole_and_keep_global_numbers(folder: Path) -> None:
    batch = Batches(folder, "train", LENGTH, seed=5).rows(range(8))
    for degree in (1, 2, 4, 64):
        slices = [sequence_slice(batch, rank, degree) for rank in range(degree)]
        assert equal(Batch(*(torch.cat(parts, dim=1) for parts in zip(*slices, strict=True))), batch)
        assert all(part.is_contiguous() for part in slices[-1])
    with pytest.raises(UserError, match="64 columns do not split evenly over a sequence degree of 3"):
        sequence_slice(batch, 0, 3)
    assert equal(batch.to("cpu"), batch)


def test_a_cursor_goes_on_with_the_same_stream_only(folder: Path, tmp_path: Path) -> None:
    batches = Batches(folder, "train", LENGTH, seed=5)
    cursor = Cursor(**asdict(batches.cursor(48)))
    cursor.check(batches)
    for changed, expected in (
        (replace(cursor, seed=6), "seed: the checkpoint has 6, the run 5. Set it back"),
        (
            replace(cursor, sequence_length=32),
            "sequence_length: the checkpoint has 32, the run 64. Set it back",
        ),
        (replace(cursor, fingerprint="f" * 64), "trained on data ffffffffffff, the folder holds"),
    ):
        with pytest.raises(UserError, match=expected):
            changed.check(batches)


def test_too_little_data_is_said_at_once(folder: Path) -> None:
    tokens = read_index(folder).validation.tokens
    assert Batches(folder, "validation", tokens - 1, seed=0).sequences == 1
    with pytest.raises(UserError, match=rf"validation split has {tokens} tokens.*needs {tokens + 1}.*Shorten"):
        Batches(folder, "validation", tokens, seed=0)
    with pytest.raises(UserError, match="sequence_length: 0"):
        Batches(folder, "train", 0, seed=0)
