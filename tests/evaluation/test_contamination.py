"""Which examples training shards contain, beside plain Python that does the same slowly."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest

from data_prep.shards import TokenizedDocument, write_tar_shard
from kabrn_dist.data.index import Index, Source, Split, TokenizerInfo
from kabrn_dist.data.index_io import write_index
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.evaluation import contamination, contamination_search
from kabrn_dist.evaluation.contamination import ContaminationReport, find_contamination
from kabrn_dist.utils.errors import UserError

DOCUMENT = 256
QUESTION = "A train leaves the station at noon and travels north at sixty miles an hour for exactly 3 hours"


def write_shards(folder: Path, sources: dict[str, list[str]]) -> Path:
    """Write texts as shards of bytes, three documents in each."""
    folder.mkdir()
    tokenizer = Tokenizer.of_bytes()
    tokenizer.save(folder / "tokenizer.json")
    made = []
    for name, texts in sources.items():
        documents = [TokenizedDocument(np.array([DOCUMENT, *text.encode()]), None) for text in texts]
        shards = tuple(
            write_tar_shard(folder / f"{name}-{at}.tar", documents[at : at + 3], "uint16", False)
            for at in range(0, len(documents), 3)
        )
        tokens = sum(len(document.tokens) for document in documents)
        split = Split(
            shards=shards, documents=len(texts), tokens=tokens, text_bytes=tokens - len(texts), loss_tokens=tokens
        )
        empty = Split(shards=(), documents=0, tokens=0, text_bytes=0, loss_tokens=0)
        made.append(
            Source(
                name=name, kind="text", options={}, weight=1.0, epochs=None, masked=False, train=split, validation=empty
            )
        )
    info = TokenizerInfo(kind="bytes", sha256=tokenizer.sha256)
    index = Index(
        dtype="uint16", vocabulary=257, document_token=DOCUMENT, tokenizer=info, recipe={}, sources=tuple(made)
    )
    write_index(folder, index)
    return folder


def find_naive(sources: dict[str, list[str]], examples: list[str], n: int) -> dict[int, set[tuple[str, int]]]:
    """Number of an example → documents that share n words in a row with it, or the whole of a shorter one."""

    def split(text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())

    found: dict[int, set[tuple[str, int]]] = {}
    for example, words in enumerate(map(split, examples)):
        size = min(n, len(words))
        runs = {tuple(words[at : at + size]) for at in range(len(words) - size + 1)}
        for name, texts in sources.items():
            for number, text in enumerate(map(split, texts)):
                if any(tuple(text[at : at + size]) in runs for at in range(len(text) - size + 1)):
                    found.setdefault(example, set()).add((name, number))
    return found


def places(report: ContaminationReport) -> dict[int, set[tuple[str, int]]]:
    return {int(each.id): {(p.source, p.document) for p in each.places} for each in report.tasks[0].found}


def test_contamination_of_shards_as_plain_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contamination_search, "_MIN_WORDS", 1)
    monkeypatch.setattr(contamination_search, "MAX_PLACES", 100)
    monkeypatch.setattr(contamination, "MAX_PLACES", 100)
    draw = random.Random(3)

    def text(letters: str, most: int) -> str:
        return " ".join(draw.choice(letters) for _ in range(draw.randrange(1, most)))

    for number, (read, part) in enumerate([(1 << 20, 1 << 24), (7, 50), (64, 100), (100, 9)]):
        monkeypatch.setattr(contamination_search, "_READ_TOKENS", read)
        monkeypatch.setattr(contamination_search, "_PART_TOKENS", part)
        sources = {name: [text("abcDE1", 30) for _ in range(7)] for name in ("first", "second")}
        examples = [text("ABCde1", 12) for _ in range(40)]
        shards = write_shards(tmp_path / str(number), sources)
        report = find_contamination(shards, {"task": [(str(n), each) for n, each in enumerate(examples)]}, words=5)
        expected = find_naive(sources, examples, 5)
        assert 0 < len(expected) < 40
        assert places(report) == expected and report.documents == 14
        assert [each.documents for each in report.tasks[0].found] == [len(expected[n]) for n in sorted(expected)]


def test_the_report_says_what_was_found_and_where(tmp_path: Path) -> None:
    texts = ["Nothing of it.", f"Exercise 5. {QUESTION.upper()}. How far?", "漢字 and others", QUESTION + "\x1b[2J"]
    shards = write_shards(tmp_path / "shards", {"books": ["one"], "exercises": texts})
    tasks = {
        "math": [("a", "What is the sum of all the numbers from one to one hundred in base ten?"), ("b", QUESTION)],
        "nq": [("capital", "Paris"), ("far", "how far is the moon today"), ("\x1b[1mc", "nothing of it one two")],
    }
    seen: list[tuple[int, int]] = []
    report = find_contamination(shards, tasks, progress=lambda done, total: seen.append((done, total)))
    math, nq = report.tasks
    assert [(each.id, each.documents) for each in math.found] == [("b", 2)] and nq.found == () and nq.too_short == 1
    first, second = math.found[0].places
    assert (first.source, first.document, second.document) == ("exercises", 1, 3)
    assert first.words == "A TRAIN LEAVES THE STATION AT NOON AND TRAVELS NORTH AT SIXTY MILES"
    assert seen[-1][0] == seen[-1][1] and len(seen) == 2
    table = report.to_table()
    assert "examples that share 13 words in a row with the 5 documents of" in table
    assert f"{'math':<16}{2:>10}{1:>10}{'50.00%':>10}{0:>12}" in table.splitlines()
    assert "math b in exercises document 1 and 1 more: “A TRAIN LEAVES" in table and "\x1b" not in table


def test_a_number_tells_exercises_apart_and_a_shorter_text_is_found_as_a_whole(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", {"a": [QUESTION, "so who wrote the first novel, do you know?"]})
    other = " ".join(QUESTION.replace("3", "4").split()[-13:])
    report = find_contamination(shards, {"t": [("other", other), ("short", "Who wrote the first novel?")]})
    assert [each.id for each in report.tasks[0].found] == ["short"]


@pytest.mark.slow
def test_several_processes_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_shards(tmp_path / "shards", {"a": [f"{n} {QUESTION}" for n in range(9)], "b": [QUESTION]})
    examples = {"t": [("a", QUESTION), ("b", "none of these words are in there at all")]}
    alone = find_contamination(shards, examples)
    monkeypatch.setattr(contamination_search, "_PART_TOKENS", 250)
    assert find_contamination(shards, examples, workers=2) == alone
    assert [place.document for place in alone.tasks[0].found[0].places] == [0, 1, 2]


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"index\.json"):
        find_contamination(tmp_path, {"t": [("a", QUESTION)]})
