"""Threads that answer, one context each, and a line before them that has an end."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

from kabrn_dist.runtime.native import NativeModel
from kabrn_dist.runtime.server.errors import RequestError
from kabrn_dist.runtime.server.generation import GenerationCancelled, GenerationJob, Generator
from kabrn_dist.runtime.server.settings import ServerSettings
from kabrn_dist.runtime.server.state_cache import StateCache
from kabrn_dist.utils.errors import UserError

logger = logging.getLogger(__name__)


class WorkerPool:
    """Starts its threads when it is made.

    Args:
        model: The model, which the threads share.
        settings: Numbers of contexts and threads, and limits.

    Raises:
        UserError: if there is no memory for the contexts.
    """

    def __init__(self, model: NativeModel, settings: ServerSettings) -> None:
        self.cache = StateCache(settings.cache_bytes, settings.cache_states)
        self._limit = settings.contexts + settings.queue_limit
        self._contexts = settings.contexts
        self._waiting: deque[GenerationJob] = deque()
        self._running: set[GenerationJob] = set()
        self._seconds = 1.0
        self._closed = False
        self._changed = threading.Condition()
        room = settings.context_tokens if model.info.attention_layers else 0
        generators = [
            Generator(model, model.context(settings.threads, room), self.cache, room) for _ in range(settings.contexts)
        ]
        self._threads = [
            threading.Thread(target=self._work, args=(generator,), name=f"answer-{number}", daemon=True)
            for number, generator in enumerate(generators)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: GenerationJob) -> None:
        """Have it answered when a context is free.

        Raises:
            RequestError: if too many wait already.
        """
        with self._changed:
            if self._closed:
                raise RequestError("the server is ending", status=503)
            if len(self._waiting) + len(self._running) >= self._limit:
                seconds = self._seconds * (len(self._waiting) + 1) / self._contexts
                raise RequestError(
                    f"{len(self._waiting)} requests wait already; try again later",
                    status=429,
                    code="queue_full",
                    retry_after=max(1, min(60, round(seconds))),
                )
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: GenerationJob) -> None:
        """Stop working on it, and free its place."""
        job.cancelled.set()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def usage(self) -> tuple[int, int]:
        """Return how many requests are worked on, and how many wait."""
        with self._changed:
            return len(self._running), len(self._waiting)

    def stop(self) -> None:
        """Refuse what comes, and tell all who wait that the server is ending."""
        with self._changed:
            self._closed = True
            for job in [*self._waiting, *self._running]:
                job.cancelled.set()
                job.deliver(RequestError("the server is ending", status=503))
            self._waiting.clear()
            self._changed.notify_all()

    def close(self) -> None:
        """Stop, and wait for the threads."""
        self.stop()
        for thread in self._threads:
            thread.join()

    def _work(self, generator: Generator) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    if self._closed:
                        return
                    self._changed.wait()
                job = self._waiting.popleft()
                self._running.add(job)
            start = time.monotonic()
            try:
                self._answer(generator, job)
            finally:
                with self._changed:
                    self._running.discard(job)
                    self._seconds += 0.2 * (time.monotonic() - start - self._seconds)

    def _answer(self, generator: Generator, job: GenerationJob) -> None:
        try:
            generator.run(job)
        except GenerationCancelled:
            pass
        except RequestError as error:
            job.deliver(error)
        except UserError as error:
            job.deliver(RequestError(str(error), status=500))
        except Exception:
            # Whatever it is, other clients must not suffer from it.
            logger.exception("an answer failed")
            job.deliver(RequestError("the answer failed; the server's log says why", status=500))
