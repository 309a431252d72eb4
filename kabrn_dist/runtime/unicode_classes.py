"""Print the classes of characters as the C runtime's table: python -m kabrn_dist.runtime.unicode_classes.

The classes are those of the library that tokenizes training data, asked for every character, so a new version of it
that knows more of Unicode is noticed by a test.
"""

from __future__ import annotations

import textwrap

from tokenizers import Regex, pre_tokenizers

# In the order of the C program's enumeration.
_OTHER, _LETTER, _NUMBER, _BLANK, _DIGIT = range(5)
_PATTERNS = {_LETTER: r"\p{L}", _NUMBER: r"\p{N}", _BLANK: r"\s"}


def list_character_classes() -> list[int]:
    """Return the class of each code point; surrogates have none.

    Letters, numbers and blanks are as in the patterns of words. Digits are numbers of newer versions of Unicode that
    only the division into single digits knows.
    """
    points = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    classes = [_OTHER] * 0x110000
    every = "".join(map(chr, points))
    for kind, pattern in {_DIGIT: "", **_PATTERNS}.items():
        splitter = pre_tokenizers.Split(Regex(pattern), "removed") if pattern else pre_tokenizers.Digits(True)
        if not pattern:
            apart = {word for word, _ in splitter.pre_tokenize_str("a".join(every)) if len(word) == 1 and word != "a"}
            matched = {ord(word) for word in apart}
        else:
            left = {ord(letter) for word, _ in splitter.pre_tokenize_str(every) for letter in word}
            matched = set(points) - left
        for point in matched:
            classes[point] = kind
    return classes


def format_class_table(classes: list[int]) -> str:
    """Return the C table of a list of classes: each range's first code point × 8 + its class."""
    starts = [point for point in range(len(classes)) if point == 0 or classes[point] != classes[point - 1]]
    entries = " ".join(f"{hex(start * 8 + classes[start])}," for start in starts)
    body = textwrap.fill(entries.rstrip(","), 116, initial_indent="    ", subsequent_indent="    ")
    return f"static const uint32_t character_classes[] = {{\n{body}\n}};"


if __name__ == "__main__":
    print(format_class_table(list_character_classes()))
