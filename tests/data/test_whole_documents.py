"""Sources that keep documents whole: each is seen from its beginning, in one sequence, and learned as its mask says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kabrn_dist.data import whole_documents
from kabrn_dist.data.corpus import Corpus, open_folder_corpus
from kabrn_dist.data.dataset import TokenDataset, sequence_slice
from kabrn_dist.data.index import Index
from kabrn_dist.data.index_io import write_index
from kabrn_dist.data.token_stream import mask_naive, stream_naive
from kabrn_dist.data.whole_documents import describe_documents, plan_whole_documents_naive
from kabrn_dist.train.datasets import describe_cut_documents
from kabrn_dist.utils.errors import UserError
from tests.support.models import make_model, make_model_config
from tests.support.shard_sets import DOCUMENT, Texts, make_set


def make_whole_set(folder: Path, *texts: Texts, whole: tuple[str, ...] = ("chats",)) -> Corpus:
    """Write a set in which the sources of some names keep their documents whole."""
    index = make_set(folder, *texts)
    sources = [source.model_copy(update={"whole": source.name in whole}) for source in index.sources]
    write_index(folder, index.model_copy(update={"sources": tuple(sources), "fingerprint": ""}))
    return open_folder_corpus(folder)


def read_documents(folder: Path, index: Index, name: str) -> list[tuple[list[int], list[bool]]]:
    """Ids and mask of each training document of a masked source."""
    stream, mask = stream_naive(folder, index, "train", name), mask_naive(folder, index, "train", name)
    edges = np.flatnonzero(stream == DOCUMENT)[1:]
    return [(a.tolist(), b.tolist()) for a, b in zip(np.split(stream, edges), np.split(mask, edges), strict=True)]


@pytest.mark.parametrize("length", [40, 97, 300, 5000])
def test_each_document_is_in_one_sequence_with_its_own_mask(
    length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_documents, "_CHUNK_TOKENS", 61)
    monkeypatch.setattr(whole_documents, "_MAX_LOST", 1.0)
    chats = Texts("chats", train=60, sizes=(1, 120), masked=True, targets=0.1)
    corpus = make_whole_set(tmp_path / "set", Texts("before", sizes=(20, 90), train=2), chats, Texts("after", train=9))
    found = read_documents(tmp_path / "set", corpus.sets[0].index, "chats")
    data = TokenDataset(corpus, "train", length, 0, ordered=False)
    plan, start = data.whole[1], int(data._stream.edges[1])
    expected = plan_whole_documents_naive([(len(ids), mask) for ids, mask in found], start, length)
    assert list(zip(plan.starts.tolist(), plan.targets.tolist(), strict=True)) == expected
    assert [each.tokens for each in plan.cut] == [len(ids) for ids, _ in found if len(ids) > length]
    # What is trained on, token by token, is what the masks say of the documents up to where they are cut.
    rows = data.get(range(data._first_positions[1], data._first_positions[2]))
    trained = sorted(rows.targets[rows.targets >= 0].tolist())
    following = [mask[0] for _, mask in found[1:]] + [False]
    wanted = [t for ids, mask in found for t, used in list(zip(ids, mask, strict=True))[1 : length + 1] if used]
    kept = {start for start, _ in expected}
    places = np.cumsum([0, *(len(ids) for ids, _ in found)]) + start
    ends = sum(
        used and len(ids) <= length and any(a <= place < a + n for a, n in expected)
        for (ids, _), place, used in zip(found, places.tolist(), following, strict=False)
    )
    assert kept and [t for t in trained if t != DOCUMENT] == sorted(wanted) and trained.count(DOCUMENT) <= ends


def test_documents_without_targets_are_never_a_sequence(tmp_path: Path) -> None:
    chats = Texts("chats", train=30, sizes=(50, 60), masked=True, targets=0.01)
    data = TokenDataset(make_whole_set(tmp_path / "set", chats), "train", 64, 0)
    assert 0 < data.num_sequences < 30
    counts = (data.get(range(data.num_sequences)).targets >= 0).sum(1)
    assert int(counts.min()) > 0


def test_a_stream_shorter_than_a_sequence_is_filled_up(tmp_path: Path) -> None:
    chats = Texts("chats", train=3, validation=2, sizes=(20, 30), masked=True)
    corpus = make_whole_set(tmp_path / "set", chats)
    found = read_documents(tmp_path / "set", corpus.sets[0].index, "chats")
    batch = TokenDataset(corpus, "train", 400, 0).get([0])
    assert batch.tokens.shape == (1, 400)
    size = sum(len(ids) for ids, _ in found)
    assert batch.tokens[0, :size].tolist() == [id for ids, _ in found for id in ids]
    targets = [id if used else -100 for ids, mask in found for id, used in zip(ids, mask, strict=True)][1:]
    assert batch.targets[0].tolist() == targets + [-100] * (400 - len(targets))
    assert TokenDataset(corpus, "validation", 400, 0, ordered=False).num_sequences == 1


def test_lost_documents_are_counted_named_and_fatal_above_a_share(tmp_path: Path) -> None:
    chats = Texts("chats", train=40, sizes=(90, 120), masked=True, targets=0.005)
    corpus = make_whole_set(tmp_path / "set", chats)
    with pytest.raises(
        UserError, match=r"data.sequence_length 60: \d+ of 40 documents of source chats are longer"
    ) as error:
        TokenDataset(corpus, "train", 60, 0)
    assert "chats-train-00000.tar document 0" in str(error.value) and "raise it, or remove them" in str(error.value)
    unused = [source._replace(weight=0.0) for source in corpus.sources]
    plan = TokenDataset(Corpus(corpus.sets, tuple(unused)), "train", 60, 0, ordered=False).whole[0]
    assert len(plan.cut) == 40 and sum(each.is_lost for each in plan.cut) > 2
    shown = describe_documents(unused[0].source.train.shards, plan.cut[9:])
    assert shown.startswith("chats-train-00000.tar document 9: ") and "chats-train-00001.tar document 0: " in shown
    assert shown.endswith("; and 28 more")


def test_cut_documents_are_told_when_a_run_begins(tmp_path: Path) -> None:
    chats = Texts("chats", train=40, sizes=(90, 120), masked=True)
    corpus = make_whole_set(tmp_path / "set", chats)
    longer = sum(len(ids) > 100 for ids, _ in read_documents(tmp_path / "set", corpus.sets[0].index, "chats"))
    (warning,) = describe_cut_documents(TokenDataset(corpus, "train", 100, 0))
    assert f"{longer} of 40 documents of source chats are longer than data.sequence_length 100 and cut there" in warning
    assert "of 0 of them nothing that carries loss is left" in warning and "chats-train-0000" in warning
    assert describe_cut_documents(TokenDataset(corpus, "train", 200, 0)) == []


def test_every_layout_reads_the_same_targets(tmp_path: Path) -> None:
    chats = Texts("chats", train=30, sizes=(5, 60), masked=True)
    corpus = make_whole_set(tmp_path / "set", chats, Texts("texts", sizes=(100, 400)))
    data = TokenDataset(corpus, "train", 64, 0)
    whole = data.get(range(8))
    alone = [data.get([position]) for position in range(8)]
    assert torch.equal(whole.targets, torch.cat([each.targets for each in alone]))
    for world in (2, 4):
        slices = [sequence_slice(whole, rank, world) for rank in range(world)]
        assert torch.equal(torch.cat([each.targets for each in slices], 1), whole.targets)
    assert {0, 1} == set(whole.sources.tolist())


def test_the_loss_of_a_document_does_not_depend_on_its_neighbors(tmp_path: Path) -> None:
    chats = Texts("chats", train=8, sizes=(20, 60), masked=True)
    corpus = make_whole_set(tmp_path / "set", chats)
    model = make_model(make_model_config("model.layers=RAR", "model.short_conv_size=4"))
    packed = TokenDataset(corpus, "train", 200, 0)
    alone = TokenDataset(corpus, "train", 60, 0)
    with torch.no_grad():
        losses = {}
        for data in (packed, alone):
            for position in range(data.num_sequences):
                batch = data.get([position])
                for document in sorted(set(batch.documents[0].tolist())):
                    inside = (batch.documents == document) & (batch.targets >= 0) & (batch.targets != DOCUMENT)
                    ids = batch.tokens[batch.documents == document]
                    if int(ids[0]) == DOCUMENT and bool(inside.any()):
                        only = batch._replace(targets=batch.targets.where(inside, -100))
                        losses.setdefault(tuple(ids.tolist()), []).append(float(model(only).language))
    both = [values for values in losses.values() if len(values) > 1]
    assert len(both) >= 5
    for values in both:
        assert max(values) - min(values) <= 1e-4 * max(values)


def test_indexes_without_whole_sources_are_written_as_before(tmp_path: Path) -> None:
    index = make_set(tmp_path / "set", Texts("a"))
    content = (tmp_path / "set" / "index.json").read_text()
    assert "whole" not in content and "chat_template" not in content
    assert index.fingerprint == open_folder_corpus(tmp_path / "set").sets[0].index.fingerprint
