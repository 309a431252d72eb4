"""What a run draws from: several sets, names, weights, and every way of getting them wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from kabrn_dist.config import DataConfig
from kabrn_dist.data.corpus import Corpus, open_corpus
from kabrn_dist.data.dataset import TokenDataset
from kabrn_dist.data.index import TokenizerInfo
from kabrn_dist.data.index_io import read_index, write_index
from kabrn_dist.utils.errors import UserError
from tests.support.shard_sets import Texts, make_set


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets that both have a source `web`."""
    top = tmp_path_factory.mktemp("corpus")
    make_set(top / "one", Texts("web", weight=2), Texts("math", masked=True, epochs=3))
    make_set(top / "two", Texts("web"), Texts("code", weight=0.5), seed=1)
    return top


def open_sets(folder: Path, *also: tuple[str, float], **more: object) -> Corpus:
    sets = [{"path": str(folder / name), "weight": weight} for name, weight in also]
    return open_corpus(
        DataConfig.model_validate({"path": str(folder / "one"), "sequence_length": 32, "extra_sets": sets, **more})
    )


def test_sets_add_up_and_names_stay_apart(folder: Path) -> None:
    corpus = open_sets(folder, ("two", 4.0), ("one", 0.5))
    assert corpus.names == ["web", "math", "web.2", "code", "web.3", "math.2"]
    assert [drawn.weight for drawn in corpus.sources] == [2, 1, 4, 2, 1, 0.5]
    assert [drawn.epochs for drawn in corpus.sources] == [None, 3, None, None, None, 3]
    assert corpus.num_tokens("train") == sum(each.index.tokens("train") for each in corpus.sets)
    batch = TokenDataset(corpus, "train", 32, seed=1).get(range(4096))
    counts = torch.bincount(batch.sources, minlength=6)
    assert (counts[:1] / 4096 - 2 / 10.5).abs().max() < 0.05 and counts[5] > 0
    # The same texts under two names are walked in two orders.
    first, again = (batch.tokens[batch.sources == number] for number in (0, 4))
    assert not torch.equal(first[: len(again)], again)


def test_weights_and_epochs_of_the_run_override_the_index(folder: Path) -> None:
    corpus = open_sets(folder, ("two", 4.0), weights={"web.2": 0.0, "math": 7.0}, epochs={"math": 1.5, "web": 2.0})
    assert [drawn.weight for drawn in corpus.sources] == [2, 7, 0, 2]
    assert [drawn.epochs for drawn in corpus.sources] == [2, 1.5, None, None]
    batches = TokenDataset(corpus, "train", 32, seed=1)
    sources = batches.get(range(3000)).sources
    assert batches.sequences_per_source[2] == 0 and 2 not in sources
    assert int((sources == 1).sum()) == round(1.5 * batches.sequences_per_source[1])
    # Validation scores also what is not trained on.
    assert TokenDataset(corpus, "validation", 32, seed=1, ordered=False).sequences_per_source[2] > 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"weights": {"wbe": 1.0}}, "data.weights: unknown source 'wbe'; use one of web, math"),
        ({"epochs": {"code": 1.0}}, "data.epochs: unknown source 'code'; use one of web, math"),
        ({"weights": {"web": 0.0, "math": 0.0}}, "the weights of web, math sum to 0"),
    ],
)
def test_nonsense_is_refused(folder: Path, settings: dict[str, object], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        open_sets(folder, **settings)
    assert expected in str(caught.value)


def test_sets_of_different_tokenizers_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "two", tmp_path / "two")
    changed = read_index(tmp_path / "two").model_copy(
        update={"tokenizer": TokenizerInfo(kind="bytes", sha256="f" * 64)}
    )
    write_index(tmp_path / "two", changed)
    shutil.copytree(folder / "one", tmp_path / "one")
    with pytest.raises(UserError, match=r"data.extra_sets: .*two has tokenizer ffffffffffff, .*one has .*prepare both"):
        open_sets(tmp_path, ("two", 1.0))
    with pytest.raises(UserError, match=r"nowhere/index.json: cannot be read .No such file"):
        open_sets(tmp_path, ("nowhere", 1.0))
