"""Texts of files, folders and shard sets, and the tasks that score or fill documents with them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from kabrn_dist.evaluation.missing import MissingSplit
from kabrn_dist.evaluation.requests import ContinuationRequest, TextRequest, TextScore
from kabrn_dist.evaluation.tasks.last_word import LastWord
from kabrn_dist.evaluation.tasks.long_context import LongContext
from kabrn_dist.evaluation.tasks.perplexity import Perplexity
from kabrn_dist.evaluation.tasks.recall import GeneratedRecall, Recall
from kabrn_dist.evaluation.texts import read_texts
from kabrn_dist.utils.errors import UserError
from tests.evaluation.task_files import PASSAGE, write_own_texts
from tests.support.shard_sets import Texts, make_set


def test_texts_of_a_folder_belong_to_the_split_that_their_names_say(tmp_path: Path) -> None:
    write_own_texts(tmp_path)
    texts = read_texts(tmp_path / "notes", "validation")
    assert [(each.source, each.name) for each in texts] == [
        ("harbor.txt", "notes/harbor.txt:1"),
        *(("letters.jsonl", f"notes/letters.jsonl:{n}") for n in (1, 2, 3)),
    ]
    assert texts[0].text == PASSAGE and texts[3].text == "Dear reader, letter 2 is short."
    assert [each.source for each in read_texts(tmp_path / "notes", "test")] == ["weather.test.txt"]
    with pytest.raises(MissingSplit, match="found test, validation; use --split test"):
        read_texts(tmp_path / "notes", "train")


def test_a_file_that_is_named_is_read_whatever_its_name(tmp_path: Path) -> None:
    for name in ("essay.test.txt", "essay.tex", "essay"):
        (tmp_path / name).write_text("é" * 10)
        assert [each.text for each in read_texts(tmp_path / name, "validation")] == ["é" * 10]
    (tmp_path / "image.txt").write_bytes(b"\0\1\2" * 100)
    with pytest.raises(UserError, match=r"image\.txt cannot be read as text \(binary"):
        read_texts(tmp_path / "image.txt", "validation")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no texts there; found nothing"):
        read_texts(tmp_path / "empty", "validation")


def test_documents_of_a_shard_set_come_back_as_texts_by_source(tmp_path: Path) -> None:
    index = make_set(tmp_path / "set", Texts("a", validation=5), Texts("b", validation=7, per_shard=3))
    texts = read_texts(tmp_path / "set", "validation")
    assert {name: sum(each.source == name for each in texts) for name in "ab"} == {"a": 5, "b": 7}
    size = sum(len(each.text) for each in texts)
    assert 0 < size <= index.text_bytes("validation")  # random bytes are not all characters
    assert len(read_texts(tmp_path / "set", "train")) == 60
    with pytest.raises(MissingSplit, match="no texts of split test there; found train, validation"):
        read_texts(tmp_path / "set", "test")


def test_bits_per_byte_is_a_quotient_of_sums(tmp_path: Path) -> None:
    write_own_texts(tmp_path)
    task = Perplexity()
    examples = task.load(tmp_path / "notes", "validation")
    assert task.requests(examples[0], ()) == [TextRequest(PASSAGE)]
    short = task.score(examples[1], [TextScore(np.array([math.log(2)] * 4), np.array([0, 1, 1, 2]))])
    long = task.score(examples[0], [TextScore(np.array([3 * math.log(2)] * 8), np.array([0, 1, 1, 2, 1, 1, 1, 1]))])
    assert short["bits_per_byte"] == pytest.approx(1.0) and long["bits_per_byte"] == pytest.approx(3.0)
    both = task.combine([short, long])
    assert both["bits_per_byte"] == pytest.approx(28 / 12)
    assert both["nats_per_token"] == pytest.approx(28 / 12 * math.log(2))


def test_long_documents_are_joined_and_scored_by_position(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(4):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"{number} é" * 500)
    (tmp_path / "all.txt").write_text("né " * 5000)
    task = LongContext(length=4099)
    examples = task.load(tmp_path / "all.txt", "validation")
    sizes = [len(each.record["text"].encode()) for each in examples]
    assert len(examples) == 4 and all(4098 <= size <= 4099 for size in sizes)
    assert len(task.load(tmp_path / "texts", "validation")) == 4  # shorter than a document, but all there is
    # One token a byte, of 2 bits in the first 1,024 positions and 1 bit after them, behind the document token.
    nats = np.where(np.arange(sizes[0]) < 1024, 2.0, 1.0) * math.log(2)
    score = TextScore(np.append(0.0, nats), np.append(0, np.ones(sizes[0], np.int64)))
    combined = task.combine([task.score(examples[0], [score])] * 3)
    assert combined["bits_per_byte_512_1023"] == pytest.approx(2.0)
    assert combined["bits_per_byte_1024_2047"] == pytest.approx(1.0)
    assert combined["bits_per_byte"] == pytest.approx((2048 + sizes[0] - 1024) / sizes[0])
    assert "bits_per_byte_8192_16383" not in combined


def test_a_planted_number_lies_where_it_should(tmp_path: Path) -> None:
    (tmp_path / "filler.txt").write_text(PASSAGE)
    examples = Recall().load(tmp_path / "filler.txt", "validation")
    assert len(examples) == 7 * 5 * 4 and {each.groups["depth"] for each in examples} == {
        "0.00",
        "0.25",
        "0.50",
        "0.75",
        "1.00",
    }
    for each in examples:
        context, answer = each.record["context"], each.record["answer"]
        length, depth = int(each.groups["length"].split()[0]), float(each.groups["depth"])
        assert length * 0.95 - 30 < len(context) <= length
        assert context.count(answer) == 1 and each.record["choices"].count(answer) == 1
        assert abs(context.index(answer) / len(context) - depth) < 0.12, each.id
        fact = next(line for line in context.split("\n") if answer in line)
        assert context.endswith(f"\n{fact.partition(f' {answer}')[0]}")
    assert [each.record for each in GeneratedRecall().load(tmp_path / "filler.txt", "validation")] == [
        each.record for each in examples
    ]


def test_a_model_that_prefers_no_number_recalls_none(tmp_path: Path) -> None:
    (tmp_path / "filler.txt").write_text(PASSAGE)
    task = Recall()
    [example, *_] = task.load(tmp_path / "filler.txt", "validation")
    same = [answer._replace(logprob=-1.0) for answer in task.gold_answers(example)]  # type: ignore[union-attr]
    assert task.score(example, same) == {"acc": 0.0}


def test_last_words_follow_the_last_blank_and_have_a_perplexity(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("the cat sat on the mat\n\n  a dog ran to the door  \n")
    task = LastWord()
    examples = task.load(tmp_path / "own.txt", "test")
    assert [task.requests(each, ()) for each in examples] == [
        [ContinuationRequest("the cat sat on the", " mat")],
        [ContinuationRequest("a dog ran to the", " door")],
    ]
    scores = [{"acc": 1.0, "nats": math.log(2)}, {"acc": 0.0, "nats": math.log(8)}]
    assert task.combine(scores) == {"acc": 0.5, "perplexity": pytest.approx(4.0)}
    (tmp_path / "own.txt").write_text("the cat sat on the mat\nalone\n")
    with pytest.raises(UserError, match="line 2"):
        task.load(tmp_path / "own.txt", "test")
