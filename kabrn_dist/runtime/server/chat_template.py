"""Chat templates in Jinja, where they can do no harm. Needs jinja2."""

from __future__ import annotations

import json
import secrets
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(str(message))


def _dump_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own would escape for HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def compile_template(text: str, document: str) -> Template:
    """Return a template that is ready to render.

    Args:
        text: The template.
        document: Text of the document token, for `bos_token` and `eos_token`.

    Raises:
        TemplateError: for a text that is no Jinja.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _dump_json
    environment.globals |= {"raise_exception": _raise_exception, "bos_token": document, "eos_token": document}
    return environment.from_string(text)


def check_chat_template(text: str) -> None:
    """Return if a template writes a conversation of two turns, with all that was said.

    Raises:
        ValueError: if it does not; the message says why.
    """
    said = [f"{role} {secrets.token_hex(8)}" for role in ("user", "assistant", "user")]
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": content} for role, content in zip(roles, said, strict=True)]
    try:
        template = compile_template(text, "<|endoftext|>")
    except TemplateError as error:
        raise ValueError(f"is no Jinja ({_in_one_line(error)})") from error
    try:
        written = template.render(messages=messages, add_generation_prompt=True)
    except Exception as error:  # a template may fail in any way that Python can
        raise ValueError(f"cannot write a conversation of two turns ({_in_one_line(error)})") from error
    if not all(content in written for content in said):
        raise ValueError("leaves out what was said; a chat template writes the content of each of `messages`")


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
