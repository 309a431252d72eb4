"""Tokenizers of others: refused if they change texts or chance decides, whatever their probe says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.sorted_runs import StoredDocument
from data_prep.tokens import DocumentEncoder
from data_prep.train_tokenizer import train_tokenizer
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.utils.errors import UserError


@pytest.fixture(scope="module")
def tree() -> dict[str, Any]:
    return dict(json.loads(train_tokenizer(iter(["some words to train a tokenizer on " * 50]), 280).content))


def changed(tree: dict[str, Any], **flags: bool) -> dict[str, Any]:
    copy = json.loads(json.dumps(tree))
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    number = max(copy["model"]["vocab"].values()) + 1
    copy["added_tokens"].append({"id": number, "content": "TODO"} | plain | flags)
    return dict(copy)


def test_added_tokens_that_change_the_text_around_them_are_refused(tree: dict[str, Any]) -> None:
    for flag in ("lstrip", "rstrip", "single_word"):
        with pytest.raises(UserError, match=f"added token 'TODO' has {flag}"):
            Tokenizer(json.dumps(changed(tree, **{flag: True})).encode())
    with_normalizer = changed(tree, normalized=True) | {"normalizer": {"type": "Lowercase"}}
    with pytest.raises(UserError, match="'TODO' has normalized"):
        Tokenizer(json.dumps(with_normalizer).encode())
    for flags in ({}, {"normalized": True}, {"special": True, "lstrip": True}):
        tokenizer = Tokenizer(json.dumps(changed(tree, **flags)).encode())
        assert tokenizer.decode(tokenizer.encode("a  TODO \n b")) == "a  TODO \n b"


def test_dropout_is_refused(tree: dict[str, Any]) -> None:
    for dropout in (0.3, 1.0):
        with pytest.raises(UserError, match=r"model.dropout is .*other tokens each time; set it to null"):
            Tokenizer(json.dumps(tree | {"model": tree["model"] | {"dropout": dropout}}).encode())


def test_each_document_is_checked(tree: dict[str, Any]) -> None:
    """A normalizer that the probe does not notice changes one document in a thousand."""
    replace = {"type": "Replace", "pattern": {"String": "colour"}, "content": "color"}
    encoder = DocumentEncoder(Tokenizer(json.dumps(tree | {"normalizer": replace}).encode()))
    documents = [StoredDocument(n, f"{n}.txt", f"text {n}".encode(), None) for n in range(3)]
    assert len(list(encoder.encode(documents))) == 3
    bad = StoredDocument(9, "odd.txt", b"its colour", np.array([[0, 3]]))
    with pytest.raises(UserError, match=r"odd\.txt: the tokenizer does not give back this text"):
        list(encoder.encode([*documents, bad]))


def test_a_foreign_tokenizer_is_refused_before_any_work(tree: dict[str, Any], tmp_path: Path) -> None:
    from data_prep.__main__ import main

    (tmp_path / "t.json").write_text(json.dumps(changed(tree, lstrip=True, rstrip=True)))
    (tmp_path / "a.txt").write_text("First   TODO   item")
    read = ["--source", "text", "--input", str(tmp_path / "a.txt"), "--tokenizer", str(tmp_path / "t.json")]
    assert main([*read, "--out", str(tmp_path / "set")]) == 2 and not (tmp_path / "set").exists()
