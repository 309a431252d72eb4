"""The tokenizer of a model file (docs/model_file.md): tables that the C runtime reads as they are."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import tokenizers

from kabrn_dist.data.index import TOKENIZER_NAME
from kabrn_dist.data.tokenizer import Tokenizer, byte_level_alphabet
from kabrn_dist.utils.errors import UserError

# How a text is divided into words: the number in the file, and the regular expression.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {_GPT2: 1, _CL100K: 2, _CL100K.replace("{1,3}", ""): 3}
_PRE_TOKENIZERS = (
    "ByteLevel with or without its regular expression, Digits(individual_digits) and then ByteLevel, or Split by the "
    "pattern of GPT-2, cl100k (Llama 3) or Qwen 2 and then ByteLevel without a regular expression"
)

_KINDS = {"bytes": 0, "bpe": 1}
_IGNORE_MERGES = 1
_SINGLE_DIGITS = 2

_SPECIAL = 1
_ADDED = 2
_WHOLE_WORD = 4


def encode_tokenizer(tokenizer: Tokenizer, origin: str = TOKENIZER_NAME) -> bytes:
    """Return the tokenizer section of a model file.

    Args:
        tokenizer: Tokenizer of the model.
        origin: Its name in messages.

    Raises:
        UserError: if it does something that the C runtime does not.
    """
    if tokenizer.kind == "bytes":
        added = [[tokenizer.document_token], []]
        return _join(tokenizer, {256: _SPECIAL}, np.arange(256), np.zeros((0, 3)), added, (0, 0))
    library = tokenizers.Tokenizer.from_str(tokenizer.content.decode())
    # Rewritten by the library: merges are by rank, without those that another one overrides.
    content: dict[str, Any] = json.loads(library.to_str())
    model = content["model"]
    _check_model(content, origin)
    pre_tokenizer, flags = _parse_pre_tokenizer(content["pre_tokenizer"], origin)
    if model["ignore_merges"]:
        flags |= _IGNORE_MERGES
    kinds, added = _list_added(library, tokenizer)
    _mark_whole_words(kinds, library, tokenizer, bool(model["ignore_merges"]), origin)
    return _join(tokenizer, kinds, _list_byte_ids(library, origin), _list_merges(model), added, (pre_tokenizer, flags))


def _check_model(content: dict[str, Any], origin: str) -> None:
    model = content["model"]
    if content["normalizer"] is not None:
        raise UserError(
            f"{origin}: normalizer {content['normalizer']['type']}: the C runtime encodes texts as they are; use a "
            "tokenizer without a normalizer, or let data_prep train one"
        )
    if model["type"] != "BPE":
        raise UserError(f"{origin}: model {model['type']}: the C runtime has byte-level BPE; let data_prep train one")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model[key]:
            raise UserError(f"{origin}: {key} {model[key]!r}: the C runtime has byte-level BPE without; set it to null")


def _parse_pre_tokenizer(steps: dict[str, Any] | None, origin: str) -> tuple[int, int]:
    """Return number and flags of what divides texts into words."""
    parts = [] if steps is None else steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    kinds = [part["type"] for part in parts]
    plain = bool(parts) and kinds[-1] == "ByteLevel" and not parts[-1]["add_prefix_space"]
    digits = kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"]
    if plain and (kinds == ["ByteLevel"] or digits):
        return int(parts[-1]["use_regex"]), _SINGLE_DIGITS if digits else 0
    if plain and kinds == ["Split", "ByteLevel"] and not parts[1]["use_regex"]:
        # Every pattern matches every character, so it is the same whether matches or gaps are taken apart.
        isolated = parts[0]["behavior"] == "Isolated" or (parts[0]["behavior"] == "Removed" and parts[0]["invert"])
        number = _PATTERNS.get(parts[0]["pattern"].get("Regex"))
        if isolated and number is not None:
            return number, 0
    raise UserError(
        f"{origin}: pre_tokenizer {json.dumps(steps)[:300]}: the C runtime has {_PRE_TOKENIZERS}; use one of these, or "
        "let data_prep train a tokenizer"
    )


def _list_added(library: tokenizers.Tokenizer, tokenizer: Tokenizer) -> tuple[dict[int, int], list[list[int]]]:
    """Return the kind of each added token, and their ids by bytes: those found first, then those found in the rest."""
    kinds: dict[int, int] = {}
    passes: list[list[int]] = [[], []]
    for number, token in library.get_added_tokens_decoder().items():
        kinds[number] = _SPECIAL if token.special else _ADDED
        if token.content:
            passes[bool(token.normalized)].append(number)
    return kinds, [sorted(ids, key=tokenizer.token_bytes) for ids in passes]


def _mark_whole_words(
    kinds: dict[int, int], library: tokenizers.Tokenizer, tokenizer: Tokenizer, needed: bool, origin: str
) -> None:
    """Mark tokens that a word becomes without merges, if all of it is the token."""
    if not needed:
        return
    value_of = byte_level_alphabet()
    for token, number in library.get_vocab(with_added_tokens=False).items():
        # An added token may have letters that no word has.
        if not all(letter in value_of for letter in token):
            continue
        if bytes(value_of[letter] for letter in token) != tokenizer.token_bytes(number):
            raise UserError(
                f"{origin}: added token {token!r} is text and, by its letters, other bytes of the vocabulary, "
                "which the C runtime cannot tell apart with ignore_merges; set model.ignore_merges to false"
            )
        kinds[number] = kinds.get(number, 0) | _WHOLE_WORD


def _list_byte_ids(library: tokenizers.Tokenizer, origin: str) -> np.ndarray:
    vocabulary = library.get_vocab(with_added_tokens=False)
    ids = np.zeros(256)
    for letter, value in byte_level_alphabet().items():
        if letter not in vocabulary:
            raise UserError(
                f"{origin}: byte {value:#04x} ({letter!r}) has no token in model.vocab; use a complete byte-level BPE "
                "tokenizer"
            )
        ids[value] = vocabulary[letter]
    return ids


def _list_merges(model: dict[str, Any]) -> np.ndarray:
    vocabulary = model["vocab"]
    merges = [(vocabulary[left], vocabulary[right], vocabulary[left + right]) for left, right in model["merges"]]
    return np.array(merges).reshape(-1, 3)


def _join(
    tokenizer: Tokenizer,
    kinds: dict[int, int],
    byte_ids: np.ndarray,
    merges: np.ndarray,
    added: list[list[int]],
    settings: tuple[int, int],
) -> bytes:
    size = tokenizer.vocab_size
    pieces = [tokenizer.token_bytes(number) for number in range(size)]
    pre_tokenizer, flags = settings
    head = (_KINDS[tokenizer.kind], pre_tokenizer, size, len(merges), flags, len(added[0]), len(added[1]), 0)
    marks = bytes(kinds.get(number, 0) for number in range(size))
    tables = (np.cumsum([0, *map(len, pieces)]), byte_ids, merges, np.array([*added[0], *added[1]]))
    starts, *others = (np.ascontiguousarray(table, "<u4").tobytes() for table in tables)
    padding = bytes(-size % 4)
    return b"".join([struct.pack("<8I", *head), starts, marks, padding, *others, *pieces])
