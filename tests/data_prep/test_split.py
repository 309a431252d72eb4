"""The share of text that is held out, whatever the number and sizes of the documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.__main__ import main
from kabrn_dist.data.corpus import open_folder_corpus
from kabrn_dist.data.dataset import TokenDataset
from kabrn_dist.data.index import Index
from kabrn_dist.data.shard_set import open_shard_folder
from kabrn_dist.data.token_stream import stream_naive
from tests.support import corpora as data


def prose(seed: int, size: int) -> str:
    random = np.random.default_rng(seed)
    words = np.array(["the", "cat", "é", "sat", "on", "mats", "while", "rats", "ran", "off.\n"])
    return " ".join(random.choice(words, size // 4))[:size]


def prepare(folder: Path, texts: dict[str, Any], *flags: str) -> Index:
    root = data.write_folder(folder / "in", texts)
    arguments = ["--source", "text", "--input", str(root), "--out", str(folder / "set"), "--tokenizer", "bytes", *flags]
    assert main(arguments) == 0
    return open_shard_folder(folder / "set").index


def splits(folder: Path) -> dict[str, list[bytes]]:
    shards = open_shard_folder(folder / "set")
    tokenizer, found = shards.tokenizer(), {}
    for name in ("train", "validation"):
        stream = stream_naive(folder / "set", shards.index, name)  # type: ignore[arg-type]
        documents = np.split(stream, np.flatnonzero(stream == shards.index.document_token))[1:]
        found[name] = [b"".join(tokenizer.token_bytes(id) for id in ids[1:].tolist()) for ids in documents]
    return found


@pytest.mark.parametrize(
    "sizes", [[20_000], [90_000, 4_000, 6_000], [4_000, 90_000], [3_000] * 5, [500_000, 10, 10, 10], [2_000]]
)
@pytest.mark.parametrize("share", [0.05, 0.2, 0.6])
def test_few_documents_are_divided_near_the_share(
    sizes: list[int], share: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {f"{n}.txt": prose(n, size) for n, size in enumerate(sizes)}
    index = prepare(tmp_path, texts, "--validation-share", str(share))
    train, validation = index.text_bytes("train"), index.text_bytes("validation")
    assert 0.5 * share < validation / (train + validation) < 1.5 * share
    found = splits(tmp_path)
    whole = sorted(text.encode() for text in texts.values())
    divided = [text for text in whole if text not in found["train"] + found["validation"]]
    assert len(divided) <= 1 and capsys.readouterr().err == ""
    for text in divided:
        head = next(each for each in found["train"] if text.startswith(each))
        assert text[len(head) :] in found["validation"]
    assert sum(map(len, found["train"] + found["validation"])) == sum(map(len, whole))


def test_one_text_can_be_trained_on_and_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = prepare(tmp_path, {"book.txt": prose(1, 18_000)})
    assert "too few documents to hold out 0.05 of the text as whole documents" in capsys.readouterr().out
    assert (index.documents("train"), index.documents("validation")) == (1, 1)
    assert TokenDataset(open_folder_corpus(tmp_path / "set"), "validation", 32, seed=0, ordered=True).num_sequences > 10


def test_shards_of_a_divided_document_do_not_depend_on_their_number(tmp_path: Path) -> None:
    texts = {f"{n}.txt": prose(n, 40_000 * (n + 1)) for n in range(4)}
    prepare(tmp_path, texts)
    before = splits(tmp_path)
    for path in (tmp_path / "set").iterdir():
        path.unlink()
    index = prepare(tmp_path, texts, "--shard-mb", "0.02")
    assert len(list(index.shards())) > 3 and splits(tmp_path) == before


def test_equal_documents_are_divided_alike(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": prose(1, 9_000)}) + "\n")
    lines = (tmp_path / "a.jsonl").read_text() * 3
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "r.yaml").write_text(
        f"out: {tmp_path}/set\ntokenizer: {{bytes: true}}\nclean: {{quality: 'off', repetition: 'off', exact: false, "
        f"near: false}}\nsources: [{{name: a, kind: jsonl, input: {tmp_path}/a.jsonl}}]\n"
    )
    assert main(["--recipe", str(tmp_path / "r.yaml")]) == 0
    found = splits(tmp_path)
    assert len(found["train"]) == 3 and len(set(found["train"])) == 1, "no text is in both splits"
    assert len(found["validation"]) == 3 and 200 < len(found["validation"][0]) < 500


def test_what_cannot_be_divided_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.jsonl").write_text(data.to_jsonl([{"question": prose(1, 500), "answer": prose(2, 500)}]))
    (tmp_path / "r.yaml").write_text(
        f"out: {tmp_path}/set\ntokenizer: {{bytes: true}}\nclean: {{quality: 'off', repetition: 'off'}}\n"
        f"sources: [{{name: qa, kind: openqa, input: {tmp_path}/train.jsonl, options: {{loss: answer}}}}]\n"
    )
    assert main(["--recipe", str(tmp_path / "r.yaml")]) == 0
    error = capsys.readouterr().err
    assert error.count("warning") == 1, "the same is not told twice"
    assert "warning: no text is held out for validation: validation_share is 0.05, and so few documents" in error


def test_a_share_of_zero_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = prepare(tmp_path, {f"{n}.txt": prose(n, 500) for n in range(4)}, "--validation-share", "0")
    assert index.tokens("validation") == 0
    assert "warning: no text is held out for validation: validation_share is 0; " in capsys.readouterr().err
