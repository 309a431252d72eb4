"""Bodies of requests: what is wrong in them is named with its field; what is not known is left alone."""

from __future__ import annotations

import json
import math
import secrets
from dataclasses import dataclass
from typing import Any, NoReturn

from kabrn_dist.runtime.server.errors import RequestError

STOP_STRINGS_LIMIT, STOP_CHARACTERS_LIMIT = 16, 255
MESSAGES_LIMIT = 10_000
MIN_TEMPERATURE = 1e-4
ADAPTER_WEIGHT_LIMIT = 100.0
# Fields that change the answer, and that this server cannot obey, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
}


@dataclass(frozen=True)
class ChatMessage:
    """What one side has said.

    Attributes:
        role: "system", "user" or "assistant".
        content: The text.
    """

    role: str
    content: str


@dataclass(frozen=True)
class GenerationRequest:
    """How to answer.

    Attributes:
        max_tokens: Largest number of tokens.
        stops: Strings that end the answer.
        sampling: Arguments of `NativeContext.set_sampling`.
        stream: Whether the answer is sent as it is written.
        include_usage: Whether a stream ends with the numbers of tokens.
    """

    max_tokens: int
    stops: tuple[str, ...]
    sampling: dict[str, Any]
    stream: bool
    include_usage: bool


def parse_body(content: bytes) -> dict[str, Any]:
    """Return the object in a body.

    Raises:
        RequestError: for what is no JSON object.
    """
    try:
        body = json.loads(content.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8 at byte {error.start}; send JSON in UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON ({str(error)[:200]}); send an object") from None
    if not isinstance(body, dict):
        raise RequestError(f"the body is {_kind_of(body)}; send an object")
    return body


def parse_model(body: dict[str, Any]) -> str:
    """Return the name of the model that is asked for; "" for none.

    Raises:
        RequestError: for what is no text.
    """
    return str(_read(body, "model", str, ""))


@dataclass(frozen=True)
class AdapterRequest:
    """An adapter that is to be loaded or unloaded, as vLLM's servers are told.

    Attributes:
        name: What clients call it.
        path: Where it is; "" to unload it.
        weight: Factor of what it adds.
        replace: Whether it takes the place of one of the same name.
    """

    name: str
    path: str = ""
    weight: float = 1.0
    replace: bool = False


def parse_adapter(body: dict[str, Any], load: bool) -> AdapterRequest:
    """Read which adapter is to be loaded or unloaded.

    Args:
        body: The object that the client sent.
        load: Whether it is to be loaded.

    Raises:
        RequestError: for a field that is missing or of another type.
    """
    name = _read(body, "lora_name", str, None)
    if not load:
        return AdapterRequest(name)
    path = _check_text(_read(body, "lora_path", str, None), "lora_path")
    weight = _number(body, "weight", 1.0, -ADAPTER_WEIGHT_LIMIT, ADAPTER_WEIGHT_LIMIT)
    return AdapterRequest(name, path, weight, _read(body, "load_inplace", bool, False))


def parse_generation(body: dict[str, Any], default_tokens: int, most_tokens: int) -> GenerationRequest:
    """Read how to answer.

    Args:
        body: The object that the client sent.
        default_tokens: Length of the answer if it names none.
        most_tokens: Longest answer; a request for more gets so many.

    Raises:
        RequestError: for a field of another type, out of its range, or that cannot be obeyed.
    """
    for name, harmless in _UNSUPPORTED.items():
        if body.get(name) is not None and body[name] not in harmless:
            _refuse(name, f"{_show(body[name])} is not supported here; leave it out")
    limit_name = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    stream_options = _read(body, "stream_options", dict, {})
    sampling = {
        "temperature": _number(body, "temperature", 0.8, 0, 2),
        "top_p": _number(body, "top_p", 1.0, 0, 1),
        "min_p": _number(body, "min_p", 0.0, 0, 1),
        "top_k": _whole(body, "top_k", 50, 0, 1 << 31),
        "repetition_penalty": _number(body, "repetition_penalty", 1.0, 0.1, 10),
        "seed": _whole(body, "seed", secrets.randbits(63), -(1 << 63), (1 << 64) - 1) % (1 << 64),
    }
    # The runtime divides by it; so small a one takes the likeliest token as 0 does.
    if sampling["temperature"] < MIN_TEMPERATURE:
        sampling["temperature"] = 0.0
    # The runtime draws among at least one token; 0 means that very one.
    sampling["top_p"] = max(sampling["top_p"], 1e-6)
    return GenerationRequest(
        # As servers of OpenAI's interface do: the answer then ends with "length".
        min(_whole(body, limit_name, default_tokens, 1, None), most_tokens),
        _parse_stops(body.get("stop")),
        sampling,
        _read(body, "stream", bool, False),
        _read(stream_options, "include_usage", bool, False, "stream_options."),
    )


def parse_messages(body: dict[str, Any]) -> list[ChatMessage]:
    """Return the conversation in a body.

    Raises:
        RequestError: for anything but texts of the system, the user and the assistant.
    """
    messages = _read(body, "messages", list, None)
    if not messages:
        _refuse("messages", "is empty; send at least one, as {'role': 'user', 'content': 'Hello'}")
    if len(messages) > MESSAGES_LIMIT:
        _refuse("messages", f"has {len(messages)} messages; send at most {MESSAGES_LIMIT}")
    return [_parse_message(message, f"messages[{number}]") for number, message in enumerate(messages)]


def parse_prompt(body: dict[str, Any]) -> str | list[int]:
    """Return the text, or the ids of tokens, that is to be continued.

    Raises:
        RequestError: for anything else, and for several prompts.
    """
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return _check_text(prompt, "prompt")
    if isinstance(prompt, list) and prompt and all(type(id) is int for id in prompt):
        return prompt
    if isinstance(prompt, list) and prompt and all(isinstance(text, str) for text in prompt):
        _refuse("prompt", f"holds {len(prompt)} prompts; send one a request")
    _refuse("prompt", f"is {_kind_of(prompt)}; send a text, or a list of ids of tokens")


def _parse_message(message: Any, place: str) -> ChatMessage:
    if not isinstance(message, dict):
        _refuse(place, f"is {_kind_of(message)}; send an object with role and content")
    role = message.get("role")
    role = "system" if role == "developer" else role
    if role not in ("system", "user", "assistant"):
        _refuse(f"{place}.role", f"{_show(role)} is none of system, user, assistant")
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                _refuse(f"{place}.content", "holds a part that is no text; this model reads texts")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        _refuse(f"{place}.content", f"is {_kind_of(content)}; send a text")
    return ChatMessage(role, _check_text(content, f"{place}.content"))


def _parse_stops(stop: Any) -> tuple[str, ...]:
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(text, str) for text in stops):
        _refuse("stop", "is neither a text nor a list of texts")
    if len(stops) > STOP_STRINGS_LIMIT:
        _refuse("stop", f"has {len(stops)} texts; send at most {STOP_STRINGS_LIMIT}")
    if any(not 1 <= len(text) <= STOP_CHARACTERS_LIMIT for text in stops):
        _refuse("stop", f"has a text of another length than 1 to {STOP_CHARACTERS_LIMIT} characters")
    return tuple(_check_text(text, "stop") for text in stops)


def _check_text(text: str, place: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        _refuse(place, f"character {error.start} is half of a surrogate pair; send whole characters")
    return text


def _read(body: dict[str, Any], name: str, kind: type, default: Any, prefix: str = "") -> Any:
    value = body.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, kind):
        _refuse(prefix + name, f"is {_kind_of(value)}; send {_KINDS[kind]}")
    return value


def _number(body: dict[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        _refuse(name, f"is {_kind_of(value)}; send a number")
    if not low <= value <= high or not math.isfinite(value):
        _refuse(name, f"{_show(value)} is not between {low:g} and {high:g}")
    return float(value)


def _whole(body: dict[str, Any], name: str, default: int, low: int, high: int | None) -> int:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        _refuse(name, f"is {_kind_of(value)}; send a whole number")
    if value < low or (high is not None and value > high):
        _refuse(name, f"{_show(value)} is " + (f"less than {low}" if high is None else f"not between {low} and {high}"))
    return value


_KINDS: dict[type, str] = {str: "a text", list: "a list", dict: "an object", bool: "true or false"}


def _kind_of(value: Any) -> str:
    kinds = {**_KINDS, int: "a number", float: "a number", type(None): "missing"}
    return kinds[type(value)]


def _show(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"


def _refuse(place: str, message: str) -> NoReturn:
    raise RequestError(f"{place}: {message}", param=place)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON's")
