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

from data_prep.clean.config import CleaningConfig, QualityLimits, RepetitionLimits
from data_prep.clean.language import identify_language
from data_prep.clean.pipeline import CleanDocument, Cleaner
from data_prep.clean.quality import check_quality
from data_prep.clean.removed import RemovedDocument
from data_prep.clean.repetition import check_repetition, measure_duplicate_pieces, measure_repeated_ngrams
from data_prep.clean.unicode import decode_bytes, normalize_document
from data_prep.documents import Document, Span
from kabrn_dist.utils.errors import UserError

LETTERS = "aé" + "e\u0301" + "\r\n\t\x00\x85\ufeff ñ漢\U0001f600\u0327Å"
PROSE = (
    "The old harbour lies to the north of the town, and the boats that come in with the tide have their own places "
    "along the wall. In winter it is quiet there; nobody would be out before the bells, but the gulls wake early "
    "and follow anyone who might have bread. A man with a cart sells coffee, which he makes very slowly."
)
QUIET = CleaningConfig(quality="off", repetition="off", tag=False)


def text_of(document: Document | RemovedDocument) -> str:
    assert isinstance(document, Document)
    assert document.text is not None
    return document.text


# Unicode


def test_line_ends_controls_marks_and_composition() -> None:
    found = normalize_document(Document("a", "\ufeffCafe\u0301\r\nline\rnext\x00\x1b\x7f\tend\n"), QUIET)
    assert text_of(found) == "Caf\u00e9\nline\nnext\tend\n"


def test_each_part_of_the_normalization_is_a_setting() -> None:
    document = Document("a", "e\u0301\r\n\x00")
    assert text_of(normalize_document(document, QUIET.model_copy(update={"unicode": "off"}))) == "e\u0301\n"
    assert text_of(normalize_document(document, QUIET.model_copy(update={"control": False}))) == "\u00e9\r\n\x00"


def test_spans_hold_the_normalized_text_of_what_they_held() -> None:
    draw = random.Random(1)
    for _ in range(300):
        text = "".join(draw.choice(LETTERS) for _ in range(draw.randrange(30)))
        edges = sorted(draw.randrange(len(text) + 1) for _ in range(2 * draw.randrange(3)))
        spans = tuple(Span(*pair) for pair in zip(edges[::2], edges[1::2], strict=True))
        found = normalize_document(Document("a", text, spans, key="k"), QUIET)
        assert isinstance(found, Document)
        assert found.spans is not None and found.text is not None and found.key == "k"
        for before, after in zip(spans, found.spans, strict=True):
            alone = text_of(normalize_document(Document("a", text[slice(*before)]), QUIET))
            assert found.text[slice(*after)] == alone
            assert unicodedata.is_normalized("NFC", alone)


def test_sound_text_comes_back_as_the_same_object() -> None:
    document = Document("a", "Ça va? 漢字 \n")
    assert normalize_document(document, QUIET) is document


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
    assert decode_bytes(raw) == text


def test_mojibake_is_undone_line_by_line_and_real_text_is_left() -> None:
    broken = "Das schÃ¶ne cafÃ© â€œhereâ€\x9d\nПривет ÅÄÖ 漢字\nplain"
    assert text_of(normalize_document(Document("a", broken), QUIET)) == "Das schöne café “here”\nПривет ÅÄÖ 漢字\nplain"
    sound = "The letter Ã; voilà: 20 €, ½ £, ÇA ALORS – «déjà vu» №5 ±°C\nЁлка, Ψυχή, ñandú"
    document = Document("a", sound)
    assert normalize_document(document, QUIET) is document


def test_surrogates_are_joined_or_replaced() -> None:
    assert text_of(normalize_document(Document("a", "x\ud83d\ude00y\ud800z"), QUIET)) == "x\U0001f600y\ufffdz"


def test_broken_documents_are_refused_or_dropped_by_name() -> None:
    cases = [Document("bad.txt", None, raw=b"caf\xe9", problem="not UTF-8"), Document("bad.txt", "half \ud800")]
    for document in cases:
        with pytest.raises(UserError, match=r"bad\.txt.*clean\.broken"):
            normalize_document(document, CleaningConfig(broken="refuse"))
        found = normalize_document(document, CleaningConfig(broken="drop"))
        assert isinstance(found, RemovedDocument)
        assert found.reason == "encoding"


def test_files_without_text_are_removed() -> None:
    for document, reason in (
        (Document("a", None, raw=b"\x7fELF\x00\xff\x00"), "binary"),
        (Document("a", None, problem="no such file"), "unreadable"),
        (Document("a", None, raw="Привет".encode("koi8-r")), "encoding"),
    ):
        found = normalize_document(document, QUIET)
        assert isinstance(found, RemovedDocument)
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
        found = identify_language(text)
        assert found.language == language
        assert 0.3 < found.probability <= 1
        assert found == identify_language(text)
    assert identify_language("12 + 30 = 42 !!") == ("und", 0.0)


# Quality


def test_prose_passes() -> None:
    assert check_quality(PROSE, QualityLimits(), "en") is None
    assert check_repetition(PROSE, RepetitionLimits()) is None


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
    assert check_quality(text, QualityLimits(), "en") == reason


def test_limits_are_settings_and_stop_words_are_english() -> None:
    assert check_quality("one two three", QualityLimits(min_words=3, min_stop_words=0), "en") is None
    assert check_quality("one two three four", QualityLimits(min_words=1, max_words=3), "en") == "too many words"
    foreign = re.sub(r"(?i)\b(the|be|to|of|and|that|have|with)\b", "ein", PROSE)
    assert check_quality(foreign, QualityLimits(), "de") is None
    assert check_quality(foreign, QualityLimits(), None) is None


def test_scripts_without_blanks_are_judged_by_characters() -> None:
    text = "古い港は町の北にあり、船は潮とともに入ってきます。冬は静かで、鐘が鳴るまで誰も外に出ません。" * 2
    assert check_quality(text, QualityLimits(), "ja") is None
    assert check_quality(text[:30], QualityLimits(), "ja") == "too few words"


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
        found = measure_repeated_ngrams(text)
        assert found.top == pytest.approx(top)
        assert found.repeated == pytest.approx(repeated)


def test_two_characters_without_blanks_stand_for_a_word() -> None:
    draw = random.Random(9)
    for size in (0, 1, 30, 60, 90):
        text = "".join(draw.choice("古港町北船") for _ in range(size))
        top, repeated = repeated_ngrams_naive(list(text), 2 if text else 1)
        found = measure_repeated_ngrams(text)
        assert found.top == pytest.approx(top)
        assert found.repeated == pytest.approx(repeated)


def test_each_repetition_rule() -> None:
    words = [f"word{i}" for i in range(400)]
    lines = [" ".join(words[i : i + 10]) for i in range(0, 400, 10)]
    plain = "\n".join(lines)
    assert check_repetition(plain, RepetitionLimits()) is None
    assert check_repetition("\n".join(lines[:10] * 2), RepetitionLimits()) == "repeated lines"
    assert check_repetition(
        "\n".join([*lines[:8], " ".join(lines[8:20]), " ".join(lines[8:20])]), RepetitionLimits()
    ) == ("characters in repeated lines")
    paragraphs = [f"{lines[i]}\n{lines[i + 1]}" for i in range(0, 40, 2)]
    loose = RepetitionLimits(max_line_share=1, max_line_characters=1)
    assert check_repetition("\n\n".join(paragraphs[:5] * 2), loose) == "repeated paragraphs"
    assert check_repetition(plain + " big brown" * 100, RepetitionLimits()) == "top 2-gram"
    tail = " ".join(words[:100])
    assert check_repetition(plain + " and " + tail, RepetitionLimits()) == "repeated 5-grams"
    no_five = RepetitionLimits(max_repeated_5gram=1, max_repeated_6gram=1, max_repeated_7gram=1)
    assert check_repetition(plain + " and " + tail, no_five) == "repeated 8-grams"


def test_repeated_pieces_by_hand() -> None:
    assert measure_duplicate_pieces(["ab", "", " ab ", "cdef"]) == pytest.approx((1 / 3, 2 / 8))
    assert measure_duplicate_pieces(["", " "]) == (0.0, 0.0)


# All of it


def test_all_off_gives_the_same_object_back() -> None:
    cleaner = Cleaner(CleaningConfig.off())
    for text in ("", "x", "\ufeffe\u0301\r\n\x00 schÃ¶n", "# # # ...\n" * 50, "12 34"):
        document = Document("a", text, (Span(0, len(text)),))
        found = cleaner(document)
        assert isinstance(found, CleanDocument)
        assert found.document is document
        assert found.language is None
    with pytest.raises(UserError, match=r"bad\.txt"):
        cleaner(Document("bad.txt", None, raw=b"\xff"))


def test_the_cleaner_says_what_and_why_also_after_a_pickle() -> None:
    cleaner = pickle.loads(pickle.dumps(Cleaner(CleaningConfig(language=("en",)))))
    kept = cleaner(Document("a", PROSE + "\r\n"))
    assert isinstance(kept, CleanDocument)
    assert (kept.document.text, kept.language) == (PROSE + "\n", "en")
    assert isinstance(kept.probability, float)
    french = "Le vieux port est au nord de la ville, et les bateaux arrivent avec la marée du matin. "
    for text, reason in ((french * 3, "language"), ("word", "too few words"), ((PROSE + "\n") * 3, "repeated lines")):
        found = cleaner(Document("a", text))
        assert isinstance(found, RemovedDocument)
        assert (found.reason, found.document.text) == (reason, text) or reason == "too few words"
    certain = Cleaner(CleaningConfig(language=("en",), min_probability=1.0))
    assert certain(Document("a", PROSE)).__class__ in (CleanDocument, RemovedDocument)


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
            CleaningConfig.model_validate(values)


def test_ngram_shares_are_plain_floats() -> None:
    found = measure_repeated_ngrams("a b a b a b")
    assert not any(isinstance(share, np.generic) for share in (*found.top.values(), *found.repeated.values()))
