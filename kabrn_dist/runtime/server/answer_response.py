"""From a worker's thread to a client: an answer as one object or as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from kabrn_dist.runtime.server.errors import RequestError
from kabrn_dist.runtime.server.generation import Delta, Finish, GenerationJob, timeout_error
from kabrn_dist.runtime.server.responses import AnswerShape, encode_event
from kabrn_dist.runtime.server.worker_pool import WorkerPool

# A worker notices that time is up by itself, unless it is in one long call.
GRACE_SECONDS = 5


class ClientGone(Exception):
    """The connection is closed."""


class AnswerChannel:
    """What a worker delivers, for the event loop that it is made in."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Delta | Finish | RequestError | None] = asyncio.Queue()
        # What follows pieces that were taken together.
        self._next: tuple[Finish | RequestError | None] | None = None

    def deliver(self, event: Delta | Finish | RequestError | None) -> None:
        """Pass something on, from any thread; None: the client has gone."""
        # After the end of the loop nobody listens.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self, deadline: float) -> AsyncIterator[Delta | Finish]:
        """Yield pieces and the end; pieces that have waited together are one.

        Args:
            deadline: When the end must be there, by time.monotonic().

        Raises:
            RequestError: if there is no answer, or no more of it.
            ClientGone: if nobody is there to read it.
        """
        while True:
            try:
                left = deadline - time.monotonic() + GRACE_SECONDS
                event = self._next[0] if self._next else await asyncio.wait_for(self._events.get(), left)
            except asyncio.TimeoutError:
                raise timeout_error() from None
            if event is None:
                raise ClientGone
            if isinstance(event, RequestError):
                raise event
            if isinstance(event, Finish):
                yield event
                return
            yield Delta(event.text + self._take_waiting())

    def _take_waiting(self) -> str:
        """Take the pieces that have come while the client was slow."""
        text = ""
        while self._next is None and not self._events.empty():
            event = self._events.get_nowait()
            if isinstance(event, Delta):
                text += event.text
            else:
                self._next = (event,)
        return text


class AnswerResponse(Response):
    """Waits for the answer of a job, and ends the job when the client goes away.

    Args:
        pool: Where the job is.
        job: The job; `channel` gets what it delivers.
        channel: The channel.
        shape: How the answer's objects are made.
    """

    def __init__(self, pool: WorkerPool, job: GenerationJob, channel: AnswerChannel, shape: AnswerShape) -> None:
        self._pool, self._job, self._channel, self._shape = pool, job, channel, shape
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer, or stop the work if the client goes away."""
        watcher = asyncio.create_task(self._watch(receive))
        try:
            if self._job.request.stream:
                await self._send_stream(scope, receive, send)
            else:
                await self._send_whole(scope, receive, send)
        except ClientGone:
            pass
        finally:
            self._pool.cancel(self._job)
            watcher.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._pool.cancel(self._job)
        self._channel.deliver(None)

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        text = ""
        try:
            async for event in self._channel.events(self._job.deadline):
                if isinstance(event, Finish):
                    await JSONResponse(self._shape.whole(text, event))(scope, receive, send)
                else:
                    text += event.text
        except RequestError as error:
            await error_response(error)(scope, receive, send)

    async def _send_stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False
        try:
            async for event in self._channel.events(self._job.deadline):
                # An error before the first piece still has a status of its own.
                if not begun:
                    begun = True
                    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                    await self._send_objects(send, self._shape.first())
                if isinstance(event, Finish):
                    await self._send_objects(send, self._shape.last(event))
                else:
                    await self._send_objects(send, [self._shape.piece(event.text)])
            await send({"type": "http.response.body", "body": encode_event("[DONE]"), "more_body": False})
        except RequestError as error:
            if not begun:
                await error_response(error)(scope, receive, send)
                return
            await send({"type": "http.response.body", "body": encode_event(error.content()), "more_body": False})

    async def _send_objects(self, send: Send, objects: list[dict[str, object]]) -> None:
        body = b"".join(map(encode_event, objects))
        if body:
            await send({"type": "http.response.body", "body": body, "more_body": True})


def error_response(error: RequestError) -> JSONResponse:
    """Return the answer to a request that is refused."""
    return JSONResponse(error.content(), error.status, error.headers())
