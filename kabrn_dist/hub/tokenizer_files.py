"""Tokenizers as the files that AutoTokenizer of transformers loads: tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import json
from typing import Any

import tokenizers

from kabrn_dist.data.chat_template import check_chat_template, compile_template
from kabrn_dist.data.tokenizer import DOCUMENT_TOKEN, Tokenizer, byte_level_alphabet
from kabrn_dist.utils.errors import UserError

# Put before a template whose text does not begin with the document token.
TEMPLATE_PREFIX = "{{- bos_token }}"
# What transformers takes for "no limit".
_NO_LIMIT = int(1e30)


def make_tokenizer_files(tokenizer: Tokenizer, template: str | None, origin: str) -> dict[str, bytes]:
    """Return the contents of a tokenizer's files, by name.

    Texts get the ids that the trainer gives them, behind the document token with which every document begins.

    Args:
        tokenizer: The tokenizer that the model was trained with.
        template: Chat template in Jinja; None for none.
        origin: Name of the template in messages.

    Raises:
        UserError: for a template that cannot write a conversation.
    """
    library = make_library_tokenizer(tokenizer)
    token = _document_token(library, tokenizer)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token,
        "eos_token": token,
        "pad_token": token,
        "model_max_length": _NO_LIMIT,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    files = {"tokenizer.json": library.to_str(pretty=True).encode()}
    if template is not None:
        config["chat_template"] = begin_with_document(template, token, origin)
    files["tokenizer_config.json"] = _json(config)
    files["special_tokens_map.json"] = _json(dict.fromkeys(("bos_token", "eos_token", "pad_token"), token))
    return files


def make_library_tokenizer(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Return a tokenizer as one of the library `tokenizers`, which puts the document token in front of each text.

    Bytes become a byte-level BPE without merges, in which the letter of byte n has id n.

    Args:
        tokenizer: Bytes or byte-level BPE.
    """
    if tokenizer.kind == "bytes":
        library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=byte_level_alphabet(), merges=[]))
        library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.add_special_tokens([tokenizers.AddedToken(DOCUMENT_TOKEN, special=True, normalized=False)])
    else:
        library = tokenizers.Tokenizer.from_str(tokenizer.content.decode())
        library.no_truncation()
        library.no_padding()
    library.decoder = tokenizers.decoders.ByteLevel()
    token = _document_token(library, tokenizer)
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", token, "$B"], special_tokens=[(token, tokenizer.document_token)]
    )
    return library


def begin_with_document(template: str, document: str, origin: str) -> str:
    """Return a chat template whose text begins with the document token, as every text in training does.

    Args:
        template: In Jinja.
        document: Text of the document token.
        origin: Name of the template in messages.

    Raises:
        UserError: if it cannot write a conversation.
    """
    try:
        check_chat_template(template)
    except ValueError as error:
        raise UserError(f"{origin}: {error}; name a chat template in Jinja") from error
    messages = [{"role": "user", "content": "hello"}]
    written = compile_template(template, document).render(messages=messages, add_generation_prompt=True)
    return template if written.startswith(document) else TEMPLATE_PREFIX + template


def _document_token(library: tokenizers.Tokenizer, tokenizer: Tokenizer) -> str:
    token = library.id_to_token(tokenizer.document_token)
    assert token is not None, "the document token is one of the tokenizer's"
    return token


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"
