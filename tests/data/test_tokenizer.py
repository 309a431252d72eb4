"""Tokenizers: no text is changed, no text becomes the document token, bytes are counted exactly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.train_tokenizer import train_tokenizer
from kabrn_dist.data.tokenizer import DOCUMENT_TOKEN, StreamDecoder, Tokenizer
from kabrn_dist.utils.errors import UserError

TEXTS = [
    "",
    "def f(x):\n    return x  # plain\r\n\t",
    "  leading and trailing  ",
    "naïve café, 漢字かな, Ελληνικά, עברית",
    "👩‍💻🏳️‍🌈 flags 🇩🇪",
    f"{DOCUMENT_TOKEN}a {DOCUMENT_TOKEN} b{DOCUMENT_TOKEN}{DOCUMENT_TOKEN}",
    "e\u0301 \u00a0\u200b\ufeff \x00\x01\x7f \U0010ffff",
]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_tokenizer([*TEXTS, "the cat sat on the mat, the rat sat on the cat " * 20], 300)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest, bpe: Tokenizer) -> Tokenizer:
    return bpe if request.param == "bpe" else Tokenizer.of_bytes()


@pytest.mark.slow
def test_any_text_comes_back(tokenizer: Tokenizer) -> None:
    random = np.random.default_rng(0)
    points = [*range(0xD800), *range(0xE000, 0x110000)]
    texts = TEXTS + ["".join(map(chr, random.choice(points, 200))) for _ in range(20)]
    sizes = tokenizer.bytes_per_token()
    assert sizes.dtype == np.int64 and sizes.shape == (tokenizer.vocab_size,)
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids == tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.document_token not in ids
        assert all(0 <= id < tokenizer.vocab_size for id in ids)
        assert sizes[ids].sum() == len(text.encode())


def test_document_token_is_special(tokenizer: Tokenizer) -> None:
    assert tokenizer.bytes_per_token()[tokenizer.document_token] == 0
    assert tokenizer.decode([tokenizer.document_token]) == DOCUMENT_TOKEN


def test_stream_decoder_gives_complete_characters_only(tokenizer: Tokenizer) -> None:
    text = "".join(TEXTS)
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(id) for id in tokenizer.encode(text)]
    assert "".join(pieces) == text and decoder.finish() == ""
    assert "" in pieces and not any("\ufffd" in piece for piece in pieces)
    cut = StreamDecoder(Tokenizer.of_bytes())
    assert [cut.push(id) for id in "é".encode()[:1]] == [""] and cut.finish() == "\ufffd"


def test_saved_and_loaded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (again.kind, again.sha256, again.vocab_size) == (
        tokenizer.kind,
        tokenizer.sha256,
        tokenizer.vocab_size,
    )
    assert again.encode(TEXTS[3]) == tokenizer.encode(TEXTS[3])
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_training_is_repeatable_and_bounded(bpe: Tokenizer) -> None:
    texts = ["".join(chr(97 + n * k % 26) for k in range(300)) for n in range(200)]
    assert train_tokenizer(texts, 400).content == train_tokenizer(texts, 400).content
    assert bpe.vocab_size == 300
    assert train_tokenizer(["ab"], 4096).vocab_size == 258
    with pytest.raises(UserError, match=r"--vocabulary 257: too small.*258"):
        train_tokenizer(texts, 257)


def change(bpe: Tokenizer, **fields: object) -> bytes:
    return json.dumps(json.loads(bpe.content) | fields).encode()


def test_unusable_files_are_refused(bpe: Tokenizer, tmp_path: Path) -> None:
    model = json.loads(bpe.content)["model"]
    prefix = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    without_a = {token: id for token, id in model["vocab"].items() if token != "A"}
    strange = {**model["vocab"], "漢": 300}
    for content, expected in (
        (b"\xff\xfe", "not JSON"),
        (b"[1, 2", "not JSON"),
        (b"{}", "not a tokenizer.json"),
        (change(bpe, added_tokens=[]), "no special token"),
        (change(bpe, normalizer={"type": "NFC"}), "does not come back unchanged"),
        (change(bpe, pre_tokenizer=prefix), "does not come back unchanged"),
        (change(bpe, model={**model, "vocab": without_a}), "1 of the 256 bytes have no token"),
        (change(bpe, model={**model, "vocab": strange}), "is not byte-level"),
    ):
        path = tmp_path / "mine.json"
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            Tokenizer.load(path)
        assert str(path) in str(caught.value) and expected in str(caught.value)
    with pytest.raises(UserError, match="No such file"):
        Tokenizer.load(tmp_path / "absent.json")


def test_truncation_and_padding_of_a_foreign_file_are_off(bpe: Tokenizer) -> None:
    truncation = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    tokenizer = Tokenizer(change(bpe, truncation=truncation))
    assert tokenizer.encode("a long text " * 9) == bpe.encode("a long text " * 9)
