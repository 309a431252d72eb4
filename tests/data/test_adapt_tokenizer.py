"""Tokenizers of other models: the ids of texts stay, texts come back, one id begins each document."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers

from data_prep.__main__ import main
from kabrn_dist.data.adapt_tokenizer import adapt_tokenizer, load_any_tokenizer
from kabrn_dist.data.shard_set import open_shard_folder
from kabrn_dist.data.tokenizer import DOCUMENT_TOKEN, Tokenizer
from kabrn_dist.utils.errors import UserError
from tests.support import foreign_tokenizers as foreign

TEXT = "The café's naïve cat\n\n  sat  on 12345 漢字 👩‍💻 <|endoftext|> <|eot_id|>\t<tool_call> é \x00"
MAKERS = {"gpt2": foreign.make_gpt2, "llama3": foreign.make_llama3, "qwen": foreign.make_qwen}


def content_of(bpe: tokenizers.Tokenizer) -> bytes:
    return str(bpe.to_str()).encode()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_byte_level_bpe_keeps_its_ids_and_gets_one_more(make: Callable[[], tokenizers.Tokenizer]) -> None:
    theirs = make()
    before = theirs.get_vocab(with_added_tokens=True)
    ours, changes = adapt_tokenizer(content_of(theirs), "t.json")
    assert ours.vocab_size == len(before) + 1 and ours.document_token == len(before)
    assert any(f"is added as id {len(before)}" in change for change in changes)
    # The library itself, as it reads what was written.
    again = tokenizers.Tokenizer.from_str(ours.content.decode())
    assert again.get_vocab(with_added_tokens=True) == before | {DOCUMENT_TOKEN: len(before)}
    theirs.encode_special_tokens = True
    assert ours.encode(TEXT) == theirs.encode(TEXT, add_special_tokens=False).ids
    assert ours.decode(ours.encode(TEXT)) == TEXT
    assert adapt_tokenizer(ours.content, "t.json").changes == ()


def test_texts_that_their_normalizer_would_change_come_back_too() -> None:
    theirs = foreign.make_qwen()
    with pytest.raises(UserError):
        Tokenizer(content_of(theirs))
    ours, changes = adapt_tokenizer(content_of(theirs), "t.json")
    assert "the normalizer NFC is left out" in changes[0]
    assert ours.decode(ours.encode("e\u0301")) == "e\u0301"
    assert ours.encode("é") == theirs.encode("é", add_special_tokens=False).ids
    spaced, changes = adapt_tokenizer(content_of(foreign.make_gpt2(add_prefix_space=True)), "t.json")
    assert "no blank is put before a text any more" in changes and spaced.decode(spaced.encode("cat")) == "cat"


@pytest.mark.parametrize(
    ("make", "token"), [(foreign.make_gpt2, "<|endoftext|>"), (foreign.make_llama3, "<|begin_of_text|>")]
)
def test_a_special_token_of_theirs_can_begin_documents(make: Callable[[], tokenizers.Tokenizer], token: str) -> None:
    theirs = make()
    ours, changes = adapt_tokenizer(content_of(theirs), "t.json", token)
    number = theirs.token_to_id(token)
    assert ours.document_token == number and ours.vocab_size == theirs.get_vocab_size()
    assert changes == (f"{token} (id {number}) is now {DOCUMENT_TOKEN}, which begins each document",)
    again = tokenizers.Tokenizer.from_str(ours.content.decode())
    renamed = {DOCUMENT_TOKEN if name == token else name: n for name, n in theirs.get_vocab().items()}
    assert again.get_vocab(with_added_tokens=True) == renamed
    # What puts special tokens around texts puts the same ids.
    assert again.encode("the cat").ids == theirs.encode("the cat").ids
    assert ours.decode(ours.encode(f"a {token} b")) == f"a {token} b"


def test_one_that_is_usable_stays_byte_for_byte(tmp_path: Path) -> None:
    adapted = adapt_tokenizer(content_of(foreign.make_gpt2()), "t.json").tokenizer
    for content in (adapted.content, Tokenizer.of_bytes().content):
        path = tmp_path / "tokenizer.json"
        path.write_bytes(content)
        again, changes = load_any_tokenizer(path)
        assert again.content == content and changes == ()


def refuse(content: bytes, token: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        adapt_tokenizer(content, "t.json", token)
    assert str(caught.value).startswith("t.json: ") and "\n" not in str(caught.value)
    return str(caught.value)


def test_other_kinds_are_refused_with_the_reason() -> None:
    assert "as of SentencePiece (Llama 2, Mistral 7B)" in refuse(content_of(foreign.make_llama2()))
    assert "its model is 'Unigram'" in refuse(content_of(foreign.make_unigram()))
    tree = json.loads(content_of(foreign.make_gpt2()))
    lower = {**tree, "normalizer": {"type": "Lowercase"}}
    assert "text does not come back unchanged" in refuse(json.dumps(lower).encode())
    assert "not JSON" in refuse(b"[1, 2") and "has a model" in refuse(b"{}") and "has a model" in refuse(b"[]")
    assert "added_tokens is no list" in refuse(json.dumps({**tree, "added_tokens": [3]}).encode())
    tree["model"]["vocab"][DOCUMENT_TOKEN] = len(tree["model"]["vocab"])
    assert "is an ordinary token" in refuse(json.dumps(tree).encode())


def test_a_document_token_that_is_none_is_refused() -> None:
    content = content_of(foreign.make_llama3())
    assert "'the' is none of its special tokens; they are <|begin_of_text|>, <|end_of_text|>" in refuse(content, "the")
    ours = adapt_tokenizer(content, "t.json").tokenizer.content
    assert "has <|document|> already" in refuse(ours, "<|eot_id|>")


@pytest.mark.slow
def test_preparation_takes_any_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.json").write_bytes(content_of(foreign.make_qwen()))
    (tmp_path / "texts").mkdir()
    for number in range(9):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"{TEXT[:-1]}{number}", encoding="utf-8")
    given = ["--source", "text", "--input", str(tmp_path / "texts"), "--tokenizer", str(tmp_path / "t.json")]
    assert main([*given, "--out", str(tmp_path / "set")]) == 0
    assert f"t.json: {DOCUMENT_TOKEN} is added as id" in capsys.readouterr().out
    shards = open_shard_folder(tmp_path / "set")
    assert shards.index.document_token == foreign.make_qwen().get_vocab_size()
    # The folder's own tokenizer makes the same set again.
    own = ["--source", "text", "--input", str(tmp_path / "texts"), "--tokenizer", str(tmp_path / "set/tokenizer.json")]
    assert main([*own, "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (tmp_path / "set/tokenizer.json").read_bytes()
