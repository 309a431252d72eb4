"""Answers as OpenAI's objects."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from kabrn_dist.runtime.server.generation import Finish


def encode_event(content: Any) -> bytes:
    """Return a server-sent event with an object, or with a word."""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


class AnswerShape:
    """The objects of one answer.

    Args:
        chat: Whether it answers a conversation; else it continues a text.
        model_name: What the server calls the model.
        include_usage: Whether the stream ends with the numbers of tokens.
    """

    def __init__(self, chat: bool, model_name: str, include_usage: bool) -> None:
        self._chat, self._include_usage = chat, include_usage
        self._base = {
            "id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            "created": int(time.time()),
            "model": model_name,
        }

    def whole(self, text: str, finish: Finish) -> dict[str, Any]:
        """Return the object of an answer that is sent at once."""
        part = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choice = {"index": 0, **part, "logprobs": None, "finish_reason": finish.reason}
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._base, "object": kind, "choices": [choice], **_count(finish)}

    def first(self) -> list[dict[str, Any]]:
        """Return the objects that a stream begins with."""
        return [self._chunk({"role": "assistant", "content": ""}, None)] if self._chat else []

    def piece(self, text: str) -> dict[str, Any]:
        """Return the object of a piece of text."""
        return self._chunk({"content": text} if self._chat else text, None)

    def last(self, finish: Finish) -> list[dict[str, Any]]:
        """Return the objects that a stream ends with."""
        objects = [self._chunk({} if self._chat else "", finish.reason)]
        if self._include_usage:
            objects.append({**self._chunk({}, None), "choices": [], **_count(finish)})
        return objects

    def _chunk(self, content: Any, reason: str | None) -> dict[str, Any]:
        part = {"delta": content} if self._chat else {"text": content}
        choice = {"index": 0, **part, "logprobs": None, "finish_reason": reason}
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        chunk = {**self._base, "object": kind, "choices": [choice]}
        return chunk | ({"usage": None} if self._include_usage else {})


def _count(finish: Finish) -> dict[str, Any]:
    usage = {
        "prompt_tokens": finish.prompt_tokens,
        "completion_tokens": finish.completion_tokens,
        "total_tokens": finish.prompt_tokens + finish.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": finish.cached_tokens},
    }
    # As of llama.cpp's server; OpenAI has no such field.
    timings = {
        "prompt_ms": round(1e3 * finish.prompt_seconds, 3),
        "predicted_ms": round(1e3 * finish.answer_seconds, 3),
    }
    return {"usage": usage, "timings": timings}
