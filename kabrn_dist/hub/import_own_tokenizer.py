"""Tokenizer and chat template of an exported model, as they were in its run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from kabrn_dist.data.adapt_tokenizer import load_any_tokenizer
from kabrn_dist.data.index import CHAT_TEMPLATE_NAME, TOKENIZER_NAME
from kabrn_dist.data.tokenizer import DOCUMENT_TOKEN, Tokenizer, byte_level_alphabet, read_chat_template
from kabrn_dist.hub.import_source import read_json
from kabrn_dist.hub.tokenizer_files import TEMPLATE_PREFIX
from kabrn_dist.utils.errors import UserError

_CONFIG_NAME = "tokenizer_config.json"


def read_own_tokenizer(folder: Path, sha256: str | None = None) -> Tokenizer:
    """Read tokenizer and chat template of an exported model. The template is not run.

    Args:
        folder: The model's folder.
        sha256: Hash of the tokenizer that the model was trained with, if the weights tell. What the export added to
            that tokenizer is taken out where this gives it back byte for byte; if not, it stays, and all ids are the
            same.

    Raises:
        UserError: for files that cannot be read or used.
    """
    path = folder / TOKENIZER_NAME
    exported = load_any_tokenizer(path).tokenizer
    template = _read_template(folder)
    tree = json.loads(exported.content)
    if exported.kind == "bytes" or _is_bytes(tree):
        return Tokenizer(Tokenizer.of_bytes().content, str(path), template)
    content = exported.content
    library = tokenizers.Tokenizer.from_str(json.dumps(tree | {"post_processor": None}))
    plain = Tokenizer(library.to_str(pretty=True).encode(), str(path))
    if plain.sha256 == sha256:
        content = plain.content
    return Tokenizer(content, str(path), template)


def _is_bytes(tree: dict[str, Any]) -> bool:
    """Whether a BPE is what an export makes of bytes."""
    added = [(token.get("id"), token.get("content")) for token in tree["added_tokens"]]
    vocab = {token: n for token, n in tree["model"]["vocab"].items() if token != DOCUMENT_TOKEN}
    return (
        vocab == byte_level_alphabet()
        and not tree["model"].get("merges")
        and tree.get("normalizer") is None
        and added == [(256, DOCUMENT_TOKEN)]
    )


def _read_template(folder: Path) -> str:
    """The chat template, which newer versions of transformers write to a file of its own; "" for none."""
    if (folder / CHAT_TEMPLATE_NAME).exists():
        template: Any = read_chat_template(folder / CHAT_TEMPLATE_NAME)
    elif (folder / _CONFIG_NAME).exists():
        template = read_json(folder / _CONFIG_NAME, "get it again").get("chat_template") or ""
    else:
        return ""
    if not isinstance(template, str):
        raise UserError(f"{folder / _CONFIG_NAME}: chat_template is no text; keep one template, or remove the key")
    return template.removeprefix(TEMPLATE_PREFIX)
