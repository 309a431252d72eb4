"""Cleaning document by document: encodings, spans, languages, Gopher's rules, and that all off changes nothing."""

from __future__ import annotations

import pickle
import random
import re
import unicodedata
from collections import Counter

import numpy as np
import pytest
from pydantic import ValidationError

from data_prep.clean.language import tag
from data_prep.clean.pipeline import Cleaner, Kept
from data_prep.clean.quality import judge
from data_prep.clean.removed import Removed
from data_prep.clean.repetition import judge_repetition, repeated_ngrams, repeated_pieces
from data_prep.clean.settings import Clean, Quality, Repetition
from data_prep.clean.unicode import decode, normalize_text
from data_prep.documents import Document, Span
from kabrn_dist.utils.errors import UserError

LETTERS = "aé" + "e\u0301" + "\r\n\t\x00\x85\ufeff ñ漢\U0001f600\u0327Å"
PROSE = (
    "The old harbour lies to the north of the town, and the boats that come in with the tide have their own places "
    "along the wall. In winter it is quiet there; nobody would be out before the bells, but the gulls wake early "
    "and follow anyone who might have bread. A man with a cart sells coffee, which he makes very slowly."
)
QUIET = Clean(quality="off", repetition="off", tag=False)


def text_of(document: Document | Removed) -> str:
    assert isinstance(document, Document)
    assert document.text is not None
    return document.text


# Unicode


def test_line_ends_controls_marks_and_composition() -> None:
    found = normalize_text(Document("a", "\ufeffCafe\u0301\r\nline\rnext\x00\x1b\x7f\tend\n"), QUIET)
    assert text_of(found) == "Caf\u00e9\nline\nnext\tend\n"


def test_each_part_of_the_normalization_is_a_setting() -> None:
    document = Document("a", "e\u0301\r\n\x00")
    assert text_of(normalize_text(document, QUIET.model_copy(update={"unicode": "off"}))) == "e\u0301\n"
    assert text_of(normalize_text(document, QUIET.model_copy(update={"control": False}))) == "\u00e9\r\n\x00"


def test_spans_hold_the_normalized_text_of_what_they_held() -> None:
    draw = random.Random(1)
    for _ in range(300):
        text = "".join(draw.choice(LETTERS) for _ in range(draw.randrange(30)))
        edges = sorted(draw.randrange(len(text) + 1) for _ in range(2 * draw.randrange(3)))
        spans = tuple(Span(*pair) for pair in zip(edges[::2], edges[1::2], strict=True))
        found = normalize_text(Document("a", text, spans, key="k"), QUIET)
        assert isinstance(found, Document)
        assert found.spans is not None and found.text is not None and found.key == "k"
        for before, after in zip(spans, found.spans, strict=True):
            alone = text_of(normalize_text(Document("a", text[slice(*before)]), QUIET))
            assert found.text[slice(*after)] == alone
            assert unicodedata.is_normalized("NFC", alone)


def test_sound_text_comes_back_as_the_same_object() -> None:
    document = Document("a", "Ça va? 漢字 \n")
    assert normalize_text(document, QUIET) is document


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("naïve café – “so”".encode("cp1252"), "naïve café – “so”"),
        # One bad byte does not turn the sound characters around it into mojibake.
        ("漢字 und Straße ".encode() + b"\xe9t\xe9", "漢字 und Straße été"),
        ("été".encode("utf-16"), "été"),
        ("été".encode("utf-32"), "été"),
        (b"\x81 ab cd", "\x81 ab cd"),
        ("Привет, мир".encode("koi8-r"), None),
        (b"plain words " * 20 + b"\xab\xe9", "plain words " * 20 + "«é"),
        ("한국어 text with some ASCII around it".encode("euc-kr"), None),
    ],
)
def test_bytes_that_are_no_utf8(raw: bytes, text: str | None) -> None:
    assert decode(raw) == text


def test_mojibake_is_undone_line_by_line_and_real_text_is_left() -> None:
    broken = "Das schÃ¶ne cafÃ© â€œhereâ€\x9d\nПривет ÅÄÖ 漢字\nplain"
    assert text_of(normalize_text(Document("a", broken), QUIET)) == "Das schöne café “here”\nПривет ÅÄÖ 漢字\nplain"
    sound = "The letter Ã; voilà: 20 €, ½ £, ÇA ALORS – «déjà vu» №5 ±°C\nЁлка, Ψυχή, ñandú"
    document = Document("a", sound)
    assert normalize_text(document, QUIET) is document


def test_surrogates_are_joined_or_replaced() -> None:
    assert text_of(normalize_text(Document("a", "x\ud83d\ude00y\ud800z"), QUIET)) == "x\U0001f600y\ufffdz"


def test_broken_documents_are_refused_or_dropped_by_name() -> None:
    cases = [Document("bad.txt", None, raw=b"caf\xe9", problem="not UTF-8"), Document("bad.txt", "half \ud800")]
    for document in cases:
        with pytest.raises(UserError, match=r"bad\.txt.*clean\.broken"):
            normalize_text(document, Clean(broken="refuse"))
        found = normalize_text(document, Clean(broken="drop"))
        assert isinstance(found, Removed)
        assert found.reason == "encoding"


def test_files_without_text_are_removed() -> None:
    for document, reason in (
        (Document("a", None, raw=b"\x7fELF\x00\xff\x00"), "binary"),
        (Document("a", None, problem="no such file"), "unreadable"),
        (Document("a", None, raw="Привет".encode("koi8-r")), "encoding"),
    ):
        found = normalize_text(document, QUIET)
        assert isinstance(found, Removed)
        assert found.reason == reason


# Language


def test_languages() -> None:
    for text, language in (
        (PROSE, "en"),
        ("Der alte Hafen liegt im Norden der Stadt, und die Boote kommen mit der Flut herein.", "de"),
        ("Le vieux port est au nord de la ville, et les bateaux arrivent avec la marée du matin.", "fr"),
        ("Старая гавань лежит к северу от города, и лодки приходят с приливом каждое утро.", "ru"),
        ("古い港は町の北にあり、船は潮とともに入ってきます。", "ja"),
    ):
        found = tag(text)
        assert found.language == language
        assert 0.3 < found.probability <= 1
        assert found == tag(text)
    assert tag("12 + 30 = 42 !!") == ("und", 0.0)


# Quality


def test_prose_passes() -> None:
    assert judge(PROSE, Quality(), "en") is None
    assert judge_repetition(PROSE, Repetition()) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Too short to say anything", "too few words"),
        (" ".join(["ab"] * 60), "words too short"),
        (" ".join(["abcdefghijklm"] * 60), "words too long"),
        (PROSE + " 123 456" * 10, "words without letters"),
        (PROSE + " #word" * 10, "hash signs"),
        (PROSE + " word..." * 10, "ellipses"),
        ("\n".join("- " + line for line in re.split(r"[.,;] ", PROSE)), "bullet lines"),
        (PROSE * 4 + "\nand so on…\nand on...", "ellipsis lines"),
        (re.sub(r"(?i)\b(the|be|to|of|and|that|have|with)\b", "ein", PROSE), "stop words"),
    ],
)
def test_each_quality_rule(text: str, reason: str) -> None:
    assert judge(text, Quality(), "en") == reason


def test_limits_are_settings_and_stop_words_are_english() -> None:
    assert judge("one two three", Quality(min_words=3, min_stop_words=0), "en") is None
    assert judge("one two three four", Quality(min_words=1, max_words=3), "en") == "too many words"
    foreign = re.sub(r"(?i)\b(the|be|to|of|and|that|have|with)\b", "ein", PROSE)
    assert judge(foreign, Quality(), "de") is None
    assert judge(foreign, Quality(), None) is None


def test_scripts_without_blanks_are_judged_by_characters() -> None:
    text = "古い港は町の北にあり、船は潮とともに入ってきます。冬は静かで、鐘が鳴るまで誰も外に出ません。" * 2
    assert judge(text, Quality(), "ja") is None
    assert judge(text[:30], Quality(), "ja") == "too few words"


# Repetition


def repeated_ngrams_naive(words: list[str], unit: int = 1) -> tuple[dict[int, float], dict[int, float]]:
    total = sum(map(len, words))
    top, repeated = {}, {}
    for n in range(2, 11):
        size = n * unit
        grams = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
        counts = Counter(grams)
        most = max(counts.values(), default=0)
        if n <= 4:
            longest = max((most * len("".join(gram)) for gram in counts if counts[gram] == most > 1), default=0)
            top[n] = longest / total if total else 0.0
            continue
        seen, covered = set(), set()
        for place, gram in enumerate(grams):
            if gram in seen:
                covered.update(range(place, place + size))
            seen.add(gram)
        repeated[n] = sum(len(words[place]) for place in covered) / total if total else 0.0
    return top, repeated


def test_repeated_ngrams_as_the_naive_count() -> None:
    draw = random.Random(2)
    for _ in range(60):
        pool = [draw.choice(["a", "bé", "ccc", "dd.", "eeee!", "f", "gg", "hhh"]) for _ in range(draw.randrange(1, 9))]
        text = " ".join(draw.choice(pool) for _ in range(draw.randrange(80)))
        top, repeated = repeated_ngrams_naive(text.split())
        found = repeated_ngrams(text)
        assert found.top == pytest.approx(top)
        assert found.repeated == pytest.approx(repeated)


def test_two_characters_without_blanks_stand_for_a_word() -> None:
    draw = random.Random(9)
    for size in (0, 1, 30, 60, 90):
        text = "".join(draw.choice("古港町北船") for _ in range(size))
        top, repeated = repeated_ngrams_naive(list(text), 2 if text else 1)
        found = repeated_ngrams(text)
        assert found.top == pytest.approx(top)
        assert found.repeated == pytest.approx(repeated)


def test_each_repetition_rule() -> None:
    words = [f"word{i}" for i in range(400)]
    lines = [" ".join(words[i : i + 10]) for i in range(0, 400, 10)]
    plain = "\n".join(lines)
    assert judge_repetition(plain, Repetition()) is None
    assert judge_repetition("\n".join(lines[:10] * 2), Repetition()) == "repeated lines"
    assert judge_repetition("\n".join([*lines[:8], " ".join(lines[8:20]), " ".join(lines[8:20])]), Repetition()) == (
        "characters in repeated lines"
    )
    paragraphs = [f"{lines[i]}\n{lines[i + 1]}" for i in range(0, 40, 2)]
    loose = Repetition(max_line_share=1, max_line_characters=1)
    assert judge_repetition("\n\n".join(paragraphs[:5] * 2), loose) == "repeated paragraphs"
    assert judge_repetition(plain + " big brown" * 100, Repetition()) == "top 2-gram"
    tail = " ".join(words[:100])
    assert judge_repetition(plain + " and " + tail, Repetition()) == "repeated 5-grams"
    no_five = Repetition(max_repeated_5gram=1, max_repeated_6gram=1, max_repeated_7gram=1)
    assert judge_repetition(plain + " and " + tail, no_five) == "repeated 8-grams"


def test_repeated_pieces_by_hand() -> None:
    assert repeated_pieces(["ab", "", " ab ", "cdef"]) == pytest.approx((1 / 3, 2 / 8))
    assert repeated_pieces(["", " "]) == (0.0, 0.0)


# All of it


def test_all_off_gives_the_same_object_back() -> None:
    cleaner = Cleaner(Clean.off())
    for text in ("", "x", "\ufeffe\u0301\r\n\x00 schÃ¶n", "# # # ...\n" * 50, "12 34"):
        document = Document("a", text, (Span(0, len(text)),))
        found = cleaner(document)
        assert isinstance(found, Kept)
        assert found.document is document
        assert found.language is None
    with pytest.raises(UserError, match=r"bad\.txt"):
        cleaner(Document("bad.txt", None, raw=b"\xff"))


def test_the_cleaner_says_what_and_why_also_after_a_pickle() -> None:
    cleaner = pickle.loads(pickle.dumps(Cleaner(Clean(language=("en",)))))
    kept = cleaner(Document("a", PROSE + "\r\n"))
    assert isinstance(kept, Kept)
    assert (kept.document.text, kept.language) == (PROSE + "\n", "en")
    assert isinstance(kept.probability, float)
    french = "Le vieux port est au nord de la ville, et les bateaux arrivent avec la marée du matin. "
    for text, reason in ((french * 3, "language"), ("word", "too few words"), ((PROSE + "\n") * 3, "repeated lines")):
        found = cleaner(Document("a", text))
        assert isinstance(found, Removed)
        assert (found.reason, found.document.text) == (reason, text) or reason == "too few words"
    certain = Cleaner(Clean(language=("en",), min_probability=1.0))
    assert certain(Document("a", PROSE)).__class__ in (Kept, Removed)


def test_settings_that_cannot_be() -> None:
    for values in (
        {"language": ["en"], "tag": False},
        {"language": ["English"]},
        {"min_probability": 0.5},
        {"quality_limits": {"min_words": 10, "max_words": 5}},
        {"quality_limits": {"min_mean_word_length": 10, "max_mean_word_length": 5}},
        {"contamination": {"words": 4}},
        {"unicod": "nfc"},
    ):
        with pytest.raises(ValidationError):
            Clean.model_validate(values)


def test_ngram_shares_are_plain_floats() -> None:
    found = repeated_ngrams("a b a b a b")
    assert not any(isinstance(share, np.generic) for share in (*found.top.values(), *found.repeated.values()))
