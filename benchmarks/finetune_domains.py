"""Domains that `benchmarks/forgetting.py` and `benchmarks/finetuning.py` teach: tasks made here, and real text.

A tiny model can master the tasks. Real text comes from a folder with WikiText-2 (wikitext2/), tinyshakespeare.txt,
MATH_train.tar.gz (arXiv 2103.03874), GSM8K (gsm8k/, arXiv 2110.14168) and NQ-open (nq_open/).
"""

from __future__ import annotations

import json
import sysconfig
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from random import Random
from typing import NamedTuple

# Of a text of books, and of a file of source code.
PASSAGE, SOURCE_CHARACTERS = 1000, 20_000
# Of real text, in characters: with less than 256 tokens, so that a row holds at least the beginning of the answer.
LONGEST_QUESTION = 200
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
ROMAN = (
    *((1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC")),
    *((50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")),
)
# A simple romanization of Russian letters, each to one or two Latin ones.
RUSSIAN = "абвгдезийклмнопрстуфхцчшыэюя"
LATIN = dict(zip(RUSSIAN, [*"abvgdezijklmnoprstufhc", "ch", "sh", "y", "e", "yu", "ya"], strict=True))
VOWELS, CONSONANTS = "аеиоуыэюя", "бвгдзйклмнпрстфхцчш"


class Exercise(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


class Domain(NamedTuple):
    """Something to learn.

    Attributes:
        name: one word.
        documents: makes all its documents, in random order; texts, or exercises, of which the answer is learned.
    """

    name: str
    documents: Callable[[Random], Iterator[str | Exercise]]


def list_domains(folder: Path | None) -> dict[str, Domain]:
    """Return domains by name: without a folder of real text those that every machine can make.

    Raises:
        FileNotFoundError: for a file that the folder lacks.
    """
    domains = [
        Domain("addition", make_additions),
        Domain("dates", make_dates),
        Domain("transliteration", make_transliterations),
        Domain("roman", make_romans),
        Domain("sorting", make_sortings),
        Domain("code", read_code),
    ]
    if folder is not None:
        needed = "tinyshakespeare.txt", "MATH_train.tar.gz", "gsm8k/train.jsonl", "nq_open/NQ-open.dev.jsonl"
        plays, math, gsm8k, questions = (_find(folder, name) for name in needed)
        domains += [
            Domain("shakespeare", partial(read_passages, plays)),
            Domain("math", partial(read_math, math)),
            Domain("gsm8k", partial(read_gsm8k, gsm8k)),
            Domain("nq", partial(read_questions, questions)),
        ]
    return {domain.name: domain for domain in domains}


def find_base_texts(folder: Path | None) -> Domain:
    """Return what the base learns: WikiText-2 of the folder, or else the help pages of Python."""
    if folder is None:
        return Domain("help", read_help)
    return Domain("wikitext", partial(_read_wikitext, _find(folder, "wikitext2")))


def make_additions(random: Random) -> Iterator[Exercise]:
    """Sums of two numbers below 100, each pair once."""
    for pair in random.sample(range(100 * 100), 100 * 100):
        a, b = divmod(pair, 100)
        yield Exercise(f"What is {a} plus {b}?", str(a + b))


def make_dates(random: Random) -> Iterator[Exercise]:
    """Dates as numbers to be written in words."""
    for day_number in random.sample(range(200 * 12 * 28), 20_000):
        rest, day = divmod(day_number, 28)
        year, month = divmod(rest, 12)
        asked = f"{1900 + year}-{month + 1:02}-{day + 1:02}"
        yield Exercise(f"Write out {asked}.", f"{day + 1} {MONTHS[month]} {1900 + year}")


def make_transliterations(random: Random) -> Iterator[Exercise]:
    """Words of Cyrillic letters to be written in Latin ones."""
    seen = set[str]()
    while len(seen) < 20_000:
        count = random.randint(2, 3)
        word = "".join(random.choice(CONSONANTS) + random.choice(VOWELS) for _ in range(count))
        if word not in seen:
            seen.add(word)
            yield Exercise(f"Latin letters: {word}", "".join(LATIN[letter] for letter in word))


def make_romans(random: Random) -> Iterator[Exercise]:
    """Numbers to be written as Roman numerals, in English and in the forms of a few questions."""
    for asked in random.sample(range(4 * 3999), 4 * 3999):
        form, number = divmod(asked, 3999)
        words = ("{} in Roman numerals?", "Roman numeral of {}:", "How did Rome write {}?", "Write {} as Romans did.")
        yield Exercise(words[form].format(number + 1), write_roman(number + 1))


def write_roman(number: int) -> str:
    """Return a Roman numeral.

    Example:
        >>> write_roman(1994)
        'MCMXCIV'
    """
    text = ""
    for value, letters in ROMAN:
        count, number = divmod(number, value)
        text += count * letters
    return text


def make_sortings(random: Random) -> Iterator[Exercise]:
    """Letters to be put in order."""
    seen = set[str]()
    while len(seen) < 20_000:
        letters = " ".join(random.sample("abcdefghijklmnopqrstuvwxyz", 5))
        if letters not in seen:
            seen.add(letters)
            yield Exercise(f"Sort these: {letters}", " ".join(sorted(letters.split())))


def read_code(random: Random) -> Iterator[str]:
    """Modules of Python's library, the first part of each."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    for path in random.sample(paths, len(paths)):
        yield path.read_text(encoding="utf-8", errors="replace")[:SOURCE_CHARACTERS]


def read_help(random: Random) -> Iterator[str]:
    """Pages of Python's help on its language."""
    for name in random.sample(sorted(topics), len(topics)):
        yield topics[name]


def read_passages(path: Path, random: Random) -> Iterator[str]:
    """Passages of a text."""
    text = path.read_text(encoding="utf-8")
    passages = [text[start : start + PASSAGE] for start in range(0, len(text), PASSAGE)]
    yield from random.sample(passages, len(passages))


def read_math(path: Path, random: Random) -> Iterator[Exercise]:
    """Problems and solutions of MATH's training part."""
    with tarfile.open(path) as archive:
        records = [json.load(file) for member in archive if (file := archive.extractfile(member))]
    pairs = [(record["problem"], record["solution"]) for record in records]
    yield from _choose_exercises(pairs, random)


def read_gsm8k(path: Path, random: Random) -> Iterator[Exercise]:
    """Problems and solutions of GSM8K's training part."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [(record["question"], record["answer"]) for record in records]
    yield from _choose_exercises(pairs, random)


def read_questions(path: Path, random: Random) -> Iterator[Exercise]:
    """Questions of NQ-open, each with the first of its answers."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [(record["question"], record["answer"][0]) for record in records]
    yield from _choose_exercises(pairs, random)


def _choose_exercises(pairs: Sequence[tuple[str, str]], random: Random) -> Iterator[Exercise]:
    """Those with questions that are not too long."""
    for question, answer in random.sample(pairs, len(pairs)):
        if len(question) <= LONGEST_QUESTION:
            yield Exercise(question, answer)


def _read_wikitext(folder: Path, random: Random) -> Iterator[str]:
    """Passages of the articles."""
    for name in sorted(path.name for path in folder.glob("*.txt")):
        yield from read_passages(folder / name, random)


def _find(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.exists():
        raise FileNotFoundError(f"--data {folder}: has no {name}; leave --data out for domains that need no files")
    return path


def take(domain: Domain, seed: int, count: int) -> list[str | Exercise]:
    """Return the first documents of a domain, the same for the same seed."""
    return list(islice(domain.documents(Random(seed)), count))
