"""The chat template of a preparation and the special tokens that it needs, from the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers

from data_prep.plan import load_recipe_tokenizer
from data_prep.recipe import Recipe
from data_prep.sources.conversations import Rendering
from kabrn_dist.data.chat_template import check_training_template, list_marks
from kabrn_dist.data.default_template import DEFAULT_TEMPLATE
from kabrn_dist.data.index import CHAT_TEMPLATE_NAME
from kabrn_dist.data.tokenizer import DOCUMENT_TOKEN, Tokenizer, read_chat_template
from kabrn_dist.utils.errors import UserError


class ChatPlan(NamedTuple):
    """How a preparation writes conversations.

    Attributes:
        template: the chat template; "" if there is none to keep with the tokenizer.
        reserved: special tokens for a tokenizer that is trained.
        tokenizer: the tokenizer that the recipe names, with its special tokens; None if one has to be trained.
        changes: what was changed in that tokenizer to make it usable, one phrase each.
        rendering: the template with all special tokens.
    """

    template: str
    reserved: tuple[str, ...]
    tokenizer: Tokenizer | None
    changes: tuple[str, ...]
    rendering: Rendering


def find_template_file(recipe: Recipe) -> Path | None:
    """Return the file of the chat template: the recipe's, or the one beside its tokenizer; None if there is none."""
    if recipe.chat_template is not None:
        return recipe.chat_template
    if recipe.tokenizer.file is None:
        return None
    path = recipe.tokenizer.file.parent / CHAT_TEMPLATE_NAME
    return path if path.exists() else None


def plan_chat(recipe: Recipe) -> ChatPlan:
    """Load the tokenizer and the chat template that a recipe names.

    A tokenizer that is trained gets the marks `<|…|>` of the template as special tokens, if there are conversations; a
    given one only those of `tokenizer.reserved`.

    Raises:
        UserError: one of them cannot be used.
    """
    file = find_template_file(recipe)
    has_conversations = any(source.has_conversations for source in recipe.sources)
    template = (
        DEFAULT_TEMPLATE if has_conversations and file is None else "" if file is None else read_chat_template(file)
    )
    reserved = recipe.tokenizer.reserved
    if reserved is None:
        reserved = list_marks(template) if recipe.tokenizer.train is not None else ()
    reserved = tuple(mark for mark in reserved if mark != DOCUMENT_TOKEN)
    adapted = load_recipe_tokenizer(recipe)
    tokenizer = None if adapted is None else adapted.tokenizer
    if tokenizer is not None:
        tokenizer = add_special_tokens(tokenizer, reserved)
        tokenizer.chat_template = template
    special_tokens = (DOCUMENT_TOKEN, *reserved) if tokenizer is None else tuple(tokenizer.special_tokens)
    if has_conversations:
        try:
            check_training_template(template, DOCUMENT_TOKEN, special_tokens)
        except ValueError as error:
            place = "the chat template" if file is None else str(file)
            raise UserError(f"{place}: {error}; see docs/conversations.md") from error
    changes = () if adapted is None else adapted.changes
    return ChatPlan(template, reserved, tokenizer, changes, Rendering(template, special_tokens))


def add_special_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> Tokenizer:
    """Return a tokenizer with further special tokens, after all others; the same one if it has them all.

    Raises:
        UserError: if it has no room for them, or has one as an ordinary token.
    """
    missing = [text for text in dict.fromkeys(texts) if text not in tokenizer.special_tokens]
    if not missing:
        return tokenizer
    if tokenizer.kind == "bytes":
        raise UserError(f"{', '.join(missing)}: a tokenizer of bytes has no room for special tokens; leave them out")
    bpe = tokenizers.Tokenizer.from_str(tokenizer.content.decode())
    for text in missing:
        if bpe.token_to_id(text) is not None:
            raise UserError(f"{text}: is an ordinary token of this tokenizer already; choose another special token")
    bpe.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in missing])
    return Tokenizer(bpe.to_str(pretty=True).encode(), chat_template=tokenizer.chat_template)


def describe_plain_marks(plan: ChatPlan) -> str:
    """Return a note about marks of the template that are no special tokens of a given tokenizer, or ""."""
    if plan.tokenizer is None or plan.tokenizer.kind == "bytes":
        return ""
    missing = [mark for mark in list_marks(plan.template) if mark not in plan.rendering.special_tokens]
    if not missing:
        return ""
    return (
        f"note: the tokenizer has no special token {', '.join(missing)}, so the chat template writes plain text there; "
        "to add special tokens, name them under tokenizer.reserved"
    )
