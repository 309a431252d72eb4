"""The paths of the server."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from kabrn_dist.runtime.native import NativeModel, native_kernels
from kabrn_dist.runtime.server.adapters import AdapterSet, ServedAdapter
from kabrn_dist.runtime.server.answer_response import AnswerChannel, AnswerResponse, error_response
from kabrn_dist.runtime.server.chat_format import ChatFormat, Prompt, build_completion
from kabrn_dist.runtime.server.errors import RequestError
from kabrn_dist.runtime.server.generation import GenerationJob
from kabrn_dist.runtime.server.guard import RequestGuard
from kabrn_dist.runtime.server.request_fields import (
    parse_adapter,
    parse_body,
    parse_generation,
    parse_messages,
    parse_model,
    parse_prompt,
)
from kabrn_dist.runtime.server.responses import AnswerShape
from kabrn_dist.runtime.server.settings import ServerSettings
from kabrn_dist.runtime.server.worker_pool import WorkerPool
from kabrn_dist.utils.errors import UserError

CHAT_PAGE = Path(__file__).parent.parent / "page" / "index.html"
# As of the C program's `chat`, and of OpenAI's completions.
CHAT_DEFAULT_TOKENS, COMPLETION_DEFAULT_TOKENS = 512, 16
BODY_SECONDS = 30
# A client that is still sending does not read what it is told.
DRAIN_BYTES = 64 << 20


class ModelServer:
    """The endpoints of one model and its adapters.

    Args:
        model: The model.
        name: What clients call it.
        adapters: Its adapters.
        chat_format: How conversations become tokens.
        pool: Who answers.
        settings: Limits.
        check_file: Raises RequestError once the model's file is another one.
    """

    def __init__(
        self,
        model: NativeModel,
        name: str,
        adapters: AdapterSet,
        chat_format: ChatFormat,
        pool: WorkerPool,
        settings: ServerSettings,
        check_file: Callable[[], None] = lambda: None,
    ) -> None:
        self._check_file, self._adapters = check_file, adapters
        self._model, self._name, self._format, self._pool, self._settings = model, name, chat_format, pool, settings
        self._created = int(time.time())
        page = CHAT_PAGE.read_text(encoding="utf-8")
        self._page, self._policy = page, _content_policy(page)

    def app(self) -> Starlette:
        """Return the server as an ASGI application."""
        routes = [
            Route("/", self._show_page),
            Route("/health", self._show_health),
            Route("/v1/models", self._list_models),
            Route("/v1/models/{name:path}", self._show_model),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/v1/load_lora_adapter", self._load_adapter, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self._unload_adapter, methods=["POST"]),
        ]
        return Starlette(
            routes=routes,
            middleware=[Middleware(RequestGuard, settings=self._settings)],
            exception_handlers={
                RequestError: _answer_error,
                HTTPException: _answer_http_error,
                ClientDisconnect: lambda request, error: Response(status_code=499),
            },
        )

    async def _chat(self, request: Request) -> Response:
        body = await self._read_body(request)
        messages = parse_messages(body)
        return self._answer(body, True, lambda: self._format.build(messages))

    async def _complete(self, request: Request) -> Response:
        body = await self._read_body(request)
        prompt = parse_prompt(body)
        return self._answer(body, False, lambda: build_completion(self._model, prompt))

    def _answer(self, body: dict[str, Any], chat: bool, make_prompt: Callable[[], Prompt]) -> Response:
        self._check_file()
        default = CHAT_DEFAULT_TOKENS if chat else COMPLETION_DEFAULT_TOKENS
        wanted = parse_generation(body, default, self._settings.max_tokens)
        adapter = self._adapters.find(parse_model(body))
        channel = AnswerChannel()

        def make_checked_prompt() -> Prompt:
            # The request may have waited long.
            self._check_file()
            return make_prompt()

        # Texts become tokens in the worker's thread: a large one would keep all other clients waiting here.
        deadline = time.monotonic() + self._settings.timeout
        job = GenerationJob(wanted, make_checked_prompt, channel.deliver, deadline, adapter)
        self._pool.submit(job)
        name = self._name if adapter is None else adapter.name
        return AnswerResponse(self._pool, job, channel, AnswerShape(chat, name, wanted.include_usage))

    async def _load_adapter(self, request: Request) -> Response:
        self._check_file()
        self._adapters.check_changes()
        wanted = parse_adapter(await self._read_body(request), load=True)
        path = self._adapters.resolve(wanted.path)
        try:
            replaced = await asyncio.to_thread(self._adapters.load, wanted.name, path, wanted.weight, wanted.replace)
        except UserError as error:
            raise RequestError(str(error)) from error
        self._forget(replaced)
        return PlainTextResponse(f"loaded {wanted.name}")

    async def _unload_adapter(self, request: Request) -> Response:
        self._adapters.check_changes()
        wanted = parse_adapter(await self._read_body(request), load=False)
        self._forget(self._adapters.unload(wanted.name))
        return PlainTextResponse(f"unloaded {wanted.name}")

    def _forget(self, adapter: ServedAdapter | None) -> None:
        if adapter is not None:
            self._pool.cache.forget(adapter.number)

    async def _read_body(self, request: Request) -> dict[str, Any]:
        try:
            return parse_body(await asyncio.wait_for(self._read_bytes(request), BODY_SECONDS))
        except asyncio.TimeoutError:
            raise RequestError("the body did not come in time; send it at once", status=408) from None

    async def _read_bytes(self, request: Request) -> bytes:
        limit, pieces, size = self._settings.body_bytes, list[bytes](), 0
        async for piece in request.stream():
            size += len(piece)
            if size <= limit:
                pieces.append(piece)
            else:
                pieces.clear()
            if size > DRAIN_BYTES:
                break
        if size > limit:
            raise RequestError(f"the body has more than {limit} bytes; send less", status=413, code="too_large")
        return b"".join(pieces)

    async def _show_page(self, request: Request) -> Response:
        return HTMLResponse(self._page, headers={"Content-Security-Policy": self._policy})

    async def _show_health(self, request: Request) -> Response:
        running, waiting = self._pool.usage()
        return JSONResponse({"status": "ok", "running": running, "waiting": waiting})

    async def _list_models(self, request: Request) -> Response:
        models = [self._describe(), *map(self._describe_adapter, self._adapters.list())]
        return JSONResponse({"object": "list", "data": models})

    async def _show_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name == self._name:
            return JSONResponse(self._describe())
        adapters = self._adapters.list()
        for adapter in adapters:
            if adapter.name == name:
                return JSONResponse(self._describe_adapter(adapter))
        there = ", ".join([self._name, *(adapter.name for adapter in adapters)])
        raise RequestError(f"there is no such model; there is {there}", "model", 404, "model_not_found")

    def _describe(self) -> dict[str, Any]:
        info, (states, size) = self._model.info, self._pool.cache.usage()
        about = {
            "parameters": info.parameters,
            "active_parameters": info.active_parameters,
            "step": info.step,
            "sha256": info.sha256,
            "kernels": native_kernels(),
            "max_tokens": self._settings.max_tokens,
            "kept_states": states,
            "kept_bytes": size,
        }
        base = {"id": self._name, "object": "model", "created": self._created, "owned_by": "mixkabrn"}
        return {**base, "meta": about}

    def _describe_adapter(self, adapter: ServedAdapter) -> dict[str, Any]:
        info = adapter.info
        about = {"method": info.method, "rank": info.rank, "steps": info.steps, "weight": adapter.weight}
        base = {"id": adapter.name, "object": "model", "created": adapter.created, "owned_by": "mixkabrn"}
        # As vLLM's servers name what an adapter is and what it belongs to.
        return {**base, "root": info.name, "parent": self._name, "meta": about}


def _content_policy(page: str) -> str:
    """A policy that lets a page run its own script and style, and talk to its own server, and nothing else."""

    def hashes(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in parts
        )

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; worker-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error_response(error)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:100]
    texts = {404: f"there is no {path}", 405: f"{path} does not take {request.method}"}
    response = error_response(RequestError(texts.get(error.status_code, error.detail), status=error.status_code))
    response.headers.update(error.headers or {})
    return response
