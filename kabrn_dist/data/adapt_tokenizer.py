"""Tokenizers of other models, made usable here: the token that begins each document is added, ids are kept.

A byte-level BPE (GPT-2's kind: GPT-2, Llama 3, Qwen, Falcon) needs three changes at most: the special token
`<|document|>` is appended or takes the place of another special token, a normalizer that composes letters (NFC) is
left out, and no blank is put before a text. Each makes decoding give back the text that was encoded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from kabrn_dist.data.tokenizer import DOCUMENT_TOKEN, TOKENIZER_BYTES_LIMIT, Tokenizer
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safe_open import read_plain

# Composes letters as most texts already have them, so almost no text loses the tokens that a model knows.
_DROPPED_NORMALIZERS = ("NFC",)


class AdaptedTokenizer(NamedTuple):
    """A tokenizer that was made usable.

    Attributes:
        tokenizer: It, ready for use.
        changes: What was changed, one phrase each; empty if nothing had to be.
    """

    tokenizer: Tokenizer
    changes: tuple[str, ...]


def load_any_tokenizer(path: Path, document_token: str | None = None) -> AdaptedTokenizer:
    """Read any byte-level BPE `tokenizer.json`; one that is usable as it is stays byte for byte the same.

    Args:
        path: The file.
        document_token: Special token of it, such as `<|endoftext|>`, whose id begins each document from now on. None
            appends a new id, unless the tokenizer has `<|document|>` already.

    Raises:
        UserError: for a file that cannot be read, or a tokenizer of another kind.
    """
    content = read_plain(path, TOKENIZER_BYTES_LIMIT, follow_links=True, remedy="give a tokenizer.json")
    return adapt_tokenizer(content, str(path), document_token)


def adapt_tokenizer(content: bytes, origin: str, document_token: str | None = None) -> AdaptedTokenizer:
    """Make the content of a `tokenizer.json` usable; see `load_any_tokenizer`.

    Args:
        content: Content of the file.
        origin: Its name in messages.
        document_token: As for `load_any_tokenizer`.

    Raises:
        UserError: for a tokenizer of another kind.
    """
    tree = _read_tree(content, origin)
    if tree == {"kind": "bytes"}:
        return AdaptedTokenizer(Tokenizer(content, origin), ())
    _check_kind(tree, origin)
    changes = [*_drop_normalizer(tree), *_drop_prefix_space(tree), *_name_document_token(tree, origin, document_token)]
    if not changes:
        return AdaptedTokenizer(Tokenizer(content, origin), ())
    adapted = Tokenizer(json.dumps(tree, ensure_ascii=False, indent=1).encode(), origin)
    return AdaptedTokenizer(adapted, tuple(changes))


def _read_tree(content: bytes, origin: str) -> dict[str, Any]:
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{origin}: not JSON ({error}); give a tokenizer.json") from error
    if not isinstance(tree, dict) or (tree != {"kind": "bytes"} and not isinstance(tree.get("model"), dict)):
        raise UserError(f"{origin}: not a tokenizer.json of Hugging Face tokenizers; give one that has a model")
    return tree


def _check_kind(tree: dict[str, Any], origin: str) -> None:
    """Refuse tokenizers of other kinds in words that say what they are."""
    model = tree["model"]
    # The library's own files of old leave the type of a BPE out.
    kind = model.get("type") or ("BPE" if "merges" in model else "unknown")
    if kind != "BPE":
        raise UserError(
            f"{origin}: its model is {kind!r}, which does not give back every text; use the tokenizer.json of a "
            "byte-level BPE (GPT-2, Llama 3, Qwen), or let `mixkabrn prepare` train one"
        )
    if model.get("byte_fallback") or not isinstance(model.get("vocab"), dict) or not _is_byte_level(tree):
        raise UserError(
            f"{origin}: a BPE on characters, as of SentencePiece (Llama 2, Mistral 7B), which adds or merges blanks "
            "and so does not give back every text; use the tokenizer.json of a byte-level BPE (GPT-2, Llama 3, Qwen), "
            "or let `mixkabrn prepare` train one"
        )


def _parts(section: Any, members: str) -> list[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder with the parts of a sequence of them, in order."""
    if not isinstance(section, dict):
        return []
    nested = section.get(members)
    return [section, *(part for each in nested for part in _parts(each, members))] if nested else [section]


def _is_byte_level(tree: dict[str, Any]) -> bool:
    pre_tokenizers = _parts(tree.get("pre_tokenizer"), "pretokenizers")
    return any(part.get("type") == "ByteLevel" for part in pre_tokenizers)


def _drop_normalizer(tree: dict[str, Any]) -> list[str]:
    parts = _parts(tree.get("normalizer"), "normalizers")
    kinds = [part.get("type") for part in parts if part.get("type") != "Sequence"]
    if not kinds or any(kind not in _DROPPED_NORMALIZERS for kind in kinds):
        return []
    tree["normalizer"] = None
    return [f"the normalizer {', '.join(map(str, kinds))} is left out, so that texts come back unchanged"]


def _drop_prefix_space(tree: dict[str, Any]) -> list[str]:
    spaced = [part for part in _parts(tree.get("pre_tokenizer"), "pretokenizers") if part.get("add_prefix_space")]
    for part in spaced:
        part["add_prefix_space"] = False
    return ["no blank is put before a text any more"] if spaced else []


def _name_document_token(tree: dict[str, Any], origin: str, wanted: str | None) -> list[str]:
    added = tree.setdefault("added_tokens", [])
    if not isinstance(added, list) or not all(isinstance(t, dict) and isinstance(t.get("id"), int) for t in added):
        raise UserError(f"{origin}: added_tokens is no list of tokens with ids; get the file again")
    names = {token.get("content"): token for token in added}
    vocabulary = tree["model"]["vocab"]
    if DOCUMENT_TOKEN in names:
        if wanted not in (None, DOCUMENT_TOKEN):
            raise UserError(f"{origin}: has {DOCUMENT_TOKEN} already; leave {wanted!r} out")
        return []
    if wanted is not None:
        return [_rename(tree, origin, names, wanted)]
    if DOCUMENT_TOKEN in vocabulary:
        raise UserError(f"{origin}: {DOCUMENT_TOKEN} is an ordinary token; make it a special one in added_tokens")
    number = 1 + max([*vocabulary.values(), *(token["id"] for token in added)], default=-1)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added.append({"id": number, "content": DOCUMENT_TOKEN, **flags, "special": True})
    return [f"{DOCUMENT_TOKEN} is added as id {number}, which begins each document"]


def _rename(tree: dict[str, Any], origin: str, names: dict[Any, dict[str, Any]], wanted: str) -> str:
    """Give a special token the name of the document token, wherever it stands."""
    special = [str(name) for name, token in names.items() if token.get("special")]
    if wanted not in special:
        shown = ", ".join(special[:8]) or "none"
        raise UserError(f"{origin}: {wanted!r} is none of its special tokens; they are {shown}")
    names[wanted]["content"] = DOCUMENT_TOKEN
    vocabulary = tree["model"]["vocab"]
    tree["model"]["vocab"] = {DOCUMENT_TOKEN if token == wanted else token: n for token, n in vocabulary.items()}
    # It names special tokens that are put around texts.
    tree["post_processor"] = _replace(tree.get("post_processor"), wanted)
    if tree["model"].get("unk_token") == wanted:
        tree["model"]["unk_token"] = None
    return f"{wanted} (id {names[wanted]['id']}) is now {DOCUMENT_TOKEN}, which begins each document"


def _replace(tree: Any, wanted: str) -> Any:
    if isinstance(tree, dict):
        return {DOCUMENT_TOKEN if key == wanted else key: _replace(value, wanted) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_replace(value, wanted) for value in tree]
    return DOCUMENT_TOKEN if tree == wanted else tree
