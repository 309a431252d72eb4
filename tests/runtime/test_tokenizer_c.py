"""The tokenizer in C gives the ids of the library that the trainer uses, on every text."""

from __future__ import annotations

import json
import random
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import AddedToken

from data_prep.train_tokenizer import train_tokenizer
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.runtime.build import CSRC
from kabrn_dist.runtime.native import NativeModel
from kabrn_dist.runtime.tokenizer_section import encode_tokenizer
from kabrn_dist.runtime.unicode_classes import format_class_table, list_character_classes
from kabrn_dist.utils.errors import UserError
from tests.support.text_models import PRE_TOKENIZERS, train_bpe, write_text_model

ROOT = Path(__file__).parents[2]
FILES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("tests/data*/*.py"))[:20]]
TEXTS = [text for file in FILES if (text := file.read_text(encoding="utf-8"))]
ADDED = [
    AddedToken("<|im_start|>", special=True),
    AddedToken("<tool>", special=False),
    AddedToken("<tool>a", special=True, normalized=True),
    AddedToken("|>x", special=False, normalized=False),
    AddedToken("<|im", special=False, normalized=False),
    AddedToken("the", special=False),
    AddedToken("the ", special=False),
    AddedToken("  ", special=False),
    AddedToken("漢", special=False),
]
# Where patterns of words differ, and where characters have surprising classes.
PARTS = [
    *("'s", "'T", "'re", "'VE", "'ll", "'LL", "'ſ", "'d", "'M", "'", "''", "123", "1", "²", "Ⅷ", "٣", "\U0001ed00"),
    *("\U00011de0", "<|document|>", "<|doc", "|>x", "<|im_start|>", "<tool>a", "<", "a", "the", " the", "the "),
    *("\r\n", "\n", "\n\n", " ", "  ", "\t", "\u00a0", "\u3000", "\u0085", "\u2028", "\x00", "\x1c", "\u180e"),
    *("\u200b", "\ufeff", "ſ", "İ", "é", "e\u0301", "👩\u200d💻", "漢", "\u01c5", "\u02b0", "ª"),
]
SCRIPTS = [
    *[(0x20, 0x7F)] * 6,
    *((0, 0x20), (0x80, 0x180), (0x370, 0x400), (0x400, 0x500), (0x590, 0x700), (0x900, 0xE00), (0xE00, 0x1000)),
    *((0x1100, 0x1200), (0x1680, 0x1690), (0x1780, 0x1A00), (0x2000, 0x2070), (0x2070, 0x2200), (0x2460, 0x2500)),
    *((0x3000, 0x3100), (0x4E00, 0x9FFF), (0xA000, 0xB000), (0xAC00, 0xD7A4), (0xF900, 0x10000), (0x10000, 0x12000)),
    *((0x16000, 0x17000), (0x1D400, 0x1D800), (0x1F300, 0x1FA00), (0x20000, 0x2A6E0), (0xE0000, 0xE0200)),
    *((0x10FFF0, 0x110000), (0, 0xD800), (0xE000, 0x110000)),
]


def make_text(rng: random.Random) -> str:
    """A text of one to four scripts, parts that are hard to divide, and pieces of files."""
    scripts = [rng.choice(SCRIPTS) for _ in range(rng.randint(1, 4))]
    parts: list[str] = []
    for _ in range(rng.randint(0, rng.choice([2, 6, 20, 50]))):
        kind = rng.random()
        if kind < 0.35:
            parts.append(rng.choice(PARTS))
        elif kind < 0.5:
            text = rng.choice(TEXTS)
            start = rng.randrange(len(text))
            parts.append(text[start : start + rng.randint(1, 20)])
        else:
            low, high = rng.choice(scripts)
            points = [rng.randrange(low, high) for _ in range(rng.randint(1, 6))]
            parts.append("".join(chr(point) for point in points if not 0xD800 <= point < 0xE000))
    return "".join(parts)


def make_tokenizers() -> Iterator[tuple[str, Tokenizer]]:
    yield "bytes", Tokenizer.of_bytes()
    yield "the project's own", train_tokenizer(TEXTS, 3000)
    for kind in PRE_TOKENIZERS:
        for ignore_merges in (False, True):
            bpe = train_bpe(kind, TEXTS, 1500 if ignore_merges else 700, ignore_merges)
            for token in ADDED if ignore_merges else ADDED[::-3]:
                (bpe.add_special_tokens if token.special else bpe.add_tokens)([token])
            yield f"{kind}, {ignore_merges}", Tokenizer(bpe.to_str().encode())


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Tokenizer, NativeModel]]:
    """Tokenizers of the library, each with the model file that holds it."""
    folder = tmp_path_factory.mktemp("tokenizers")
    found = []
    for number, (name, tokenizer) in enumerate(make_tokenizers()):
        write_text_model(folder / f"{number}.mkb", tokenizer)
        found.append((name, tokenizer, NativeModel(folder / f"{number}.mkb")))
    return found


Pairs = list[tuple[str, Tokenizer, NativeModel]]


@pytest.mark.slow
def test_random_texts_of_all_scripts_have_the_same_ids(pairs: Pairs) -> None:
    rng = random.Random(7)
    for name, tokenizer, model in pairs:
        # 16 tokenizers × 1,400 texts. Some words are as long as those that are merged in another way.
        texts = [make_text(rng) for _ in range(1380)]
        texts += ["".join(rng.choice("abet i1") for _ in range(rng.randint(30, 200))) for _ in range(10)]
        texts += [rng.choice(["x", "the", "\n ", "  \n", "ab", "1", " "]) * rng.randint(10, 200) for _ in range(10)]
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            assert model.tokenize(text) == ids, (name, text)


@pytest.mark.slow
def test_files_have_the_same_ids(pairs: Pairs) -> None:
    for name, tokenizer, model in pairs:
        for text in TEXTS:
            assert model.tokenize(text) == tokenizer.encode(text), name


@pytest.mark.slow
def test_special_tokens_are_found_when_asked_for(pairs: Pairs) -> None:
    rng = random.Random(8)
    for name, tokenizer, model in pairs:
        text = "a<|document|>b<|im_start|><|im<tool>a<tool>b|>x " + make_text(rng)
        if tokenizer._bpe is None:
            assert model.tokenize("a<|document|>", special=True) == [97, 256]
            continue
        tokenizer._bpe.encode_special_tokens = False
        expected = tokenizer.encode(text)
        tokenizer._bpe.encode_special_tokens = True
        assert model.tokenize(text, special=True) == expected, name
        assert tokenizer.document_token in expected and tokenizer.document_token not in model.tokenize(text)


@pytest.mark.slow
def test_bytes_that_are_no_text_are_kept(pairs: Pairs) -> None:
    rng = random.Random(9)
    for name, tokenizer, model in pairs:
        for _ in range(200):
            content = bytearray(make_text(rng).encode())
            for _ in range(rng.randint(1, 5)):
                content.insert(rng.randint(0, len(content)), rng.randrange(256))
            ids = model.tokenize(bytes(content))
            assert tokenizer.decode_bytes(ids) == bytes(content), name
            assert len(ids) <= len(content)
    assert [model.tokenize(b"") for *_, model in pairs] == [[]] * len(pairs)


@pytest.mark.slow
def test_a_byte_that_begins_no_character_is_a_word_of_its_own_kind(pairs: Pairs) -> None:
    *_, model = next(pair for pair in pairs if pair[0] == "gpt2, False")
    letters, byte = model.tokenize("the"), model.tokenize(b"\xff")
    # Overlong, a surrogate, beyond Unicode, cut off.
    for bad in (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe6\xbc"):
        single = [id for value in bad for id in model.tokenize(bytes([value]))]
        assert model.tokenize(b"the" + bad + b"the") == letters + single + letters
    assert len(byte) == 1


@pytest.mark.slow
def test_a_word_of_a_million_bytes_takes_seconds(pairs: Pairs) -> None:
    rng = random.Random(10)
    content = bytes(rng.choices(b"abcdefetaoinshr", k=1_000_000))
    for name, tokenizer, model in pairs:
        if "True" in name:
            continue
        for text in (content, b"\n" * 1_000_000):
            start = time.process_time()
            ids = model.tokenize(text)
            assert time.process_time() - start < 10, name
            assert tokenizer.decode_bytes(ids) == text


@pytest.mark.slow
def test_characters_have_the_classes_of_the_library() -> None:
    source = (CSRC / "mixkabrn.c").read_text(encoding="utf-8")
    assert format_class_table(list_character_classes()) in source, "run python -m kabrn_dist.runtime.unicode_classes"


def change(bpe: Tokenizer, **fields: object) -> Tokenizer:
    return Tokenizer(json.dumps(json.loads(bpe.content) | fields).encode())


def test_what_the_runtime_does_not_do_is_refused() -> None:
    bpe = train_tokenizer(TEXTS[:2], 300)
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": r"\p{L}+|\P{L}+"}, "behavior": "Isolated", "invert": False}
    other = change(bpe, pre_tokenizer={"type": "Sequence", "pretokenizers": [split, plain]})
    with pytest.raises(UserError, match=r"mine\.json: pre_tokenizer .*the C runtime has ByteLevel"):
        encode_tokenizer(other, "mine.json")
    normalizer = {"type": "Replace", "pattern": {"String": "never in a text"}, "content": "x"}
    with pytest.raises(UserError, match=r"mine\.json: normalizer Replace.*without a normalizer"):
        encode_tokenizer(change(bpe, normalizer=normalizer), "mine.json")


def test_damaged_sections_are_refused_or_harmless(tmp_path: Path) -> None:
    bpe = train_bpe("gpt2", TEXTS[:3], 400, ignore_merges=True)
    bpe.add_tokens(["<tool>", "<to"])
    path = tmp_path / "m.mkb"
    write_text_model(path, Tokenizer(bpe.to_str().encode()))
    whole = path.read_bytes()
    offset, size = struct.unpack_from("<QQ", whole, 240)
    rng, opened = random.Random(11), 0
    for _ in range(600):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = offset + 4 * (rng.randrange(8) if rng.random() < 0.3 else rng.randrange(size // 4))
            value = rng.choice([0, 1, 401, 0xFFFFFFFF, rng.randrange(403), rng.getrandbits(32)])
            content[at : at + 4] = struct.pack("<I", value)
        path.write_bytes(content)
        try:
            with NativeModel(path, verify=False) as model:
                opened += 1
                ids = model.tokenize(TEXTS[0][:500] + "<tool>\n<to", special=True)
                assert all(len(model.token_bytes(id)) >= 0 for id in ids)
        except UserError as error:
            assert "\n" not in str(error)
    assert 0 < opened < 600
