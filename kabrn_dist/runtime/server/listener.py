"""The server's process: its socket, its signals, its end."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
import socket
import sys
from ipaddress import ip_address
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from kabrn_dist.runtime.native import NativeModel, native_kernels
from kabrn_dist.runtime.server.adapters import AdapterReader, AdapterSet
from kabrn_dist.runtime.server.app import ModelServer
from kabrn_dist.runtime.server.chat_format import make_chat_format
from kabrn_dist.runtime.server.file_watch import FileWatch
from kabrn_dist.runtime.server.settings import ServerSettings
from kabrn_dist.runtime.server.worker_pool import WorkerPool
from kabrn_dist.utils.errors import UserError

HEADER_SECONDS, STALL_SECONDS, END_SECONDS = 20, 60, 5
BACKLOG = 1024


class PatientProtocol(H11Protocol):
    """HTTP whose clients may be slow, but not for ever: they neither keep back a request nor leave an answer unread."""

    _stall: asyncio.TimerHandle | None = None
    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Give the client time for its first request."""
        super().connection_made(transport)
        self._head = self.loop.call_later(HEADER_SECONDS, self._check_begun)

    def data_received(self, data: bytes) -> None:
        """Give the client time for the rest of a request that it has begun, also of a later one."""
        super().data_received(data)
        if not self._is_between_requests():
            self._end_head()
        elif self._head is None:
            self._head = self.loop.call_later(HEADER_SECONDS, self._check_begun)

    def pause_writing(self) -> None:
        """Give the client time to read."""
        super().pause_writing()
        self._stall = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on."""
        super().resume_writing()
        self._end_stall()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the client."""
        self._end_stall()
        self._end_head()
        super().connection_lost(exc)

    def _check_begun(self) -> None:
        self._head = None
        if self._is_between_requests():
            self.transport.abort()

    def _is_between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _unsupported_upgrade_warning(self) -> None:
        # Such a request is answered as any other; anybody could fill the log with it.
        pass

    def _end_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _end_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None


class _Server(uvicorn.Server):
    """A server whose answers end with it, instead of it with them."""

    def __init__(self, app: Starlette, pool: WorkerPool) -> None:
        config = uvicorn.Config(
            app,
            http=PatientProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=END_SECONDS,
        )
        super().__init__(config)
        self._pool = pool

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._pool.stop()
        await super().shutdown(sockets)


def serve_model(file: Path, settings: ServerSettings) -> None:
    """Serve a model file until Ctrl-C or SIGTERM.

    Args:
        file: What `mixkabrn pack` wrote.
        settings: Limits and addresses.

    Raises:
        UserError: for a file that is none, an address that is taken or does not exist, or without memory.
        KeyboardInterrupt: after Ctrl-C, when all is closed.
    """
    listening = open_listener(settings)
    watch = FileWatch(file)
    with listening, NativeModel(file) as model:
        chat_format = make_chat_format(model)
        adapters = _load_adapters(model, file, settings)
        pool = WorkerPool(model, settings)
        try:
            app = ModelServer(model, file.stem, adapters, chat_format, pool, settings, watch.check).app()
            _allow_connections()
            print(describe_server(file, model, settings, listening.getsockname()[1]), flush=True)
            # The server raises the signal again when it has ended; SIGTERM is then no reason to die of.
            previous = signal.signal(signal.SIGTERM, lambda number, frame: None)
            try:
                _Server(app, pool).run([listening])
            finally:
                signal.signal(signal.SIGTERM, previous)
        finally:
            pool.close()


def _load_adapters(model: NativeModel, file: Path, settings: ServerSettings) -> AdapterSet:
    # A name that nothing has is then a mistake, and an answer of the base would hide it.
    strict = bool(settings.adapters) or settings.adapter_folder is not None
    reader = AdapterReader(model, file)
    adapters = AdapterSet(file.stem, reader.open, settings.adapter_folder, strict)
    for source in settings.adapters:
        adapters.load(*source)
    return adapters


def describe_server(file: Path, model: NativeModel, settings: ServerSettings, port: int) -> str:
    """Return what is printed when the server starts: where it is, and what it takes."""
    info = model.info
    host = _find_reachable(settings.host)
    host = f"[{host}]" if ":" in host else host
    each = f"{info.state_bytes / 1e6:.1f} MB" + (" and caches of attention" if info.attention_layers else "")
    access = "with the token" if settings.token else "from this machine only"
    return "\n".join(
        [
            f"{file.name}: {info.parameters:,} weights, {info.active_parameters:,} active, step {info.step}",
            f"kernels: {native_kernels()}; {_count(settings.contexts, 'answer')} at once, "
            f"{_count(settings.threads, 'thread')} each",
            f"memory:  {info.file_bytes / 1e6:.1f} MB of the file; states of {each}; "
            f"at most {settings.cache_bytes / 1e6:,.0f} MB of them are kept",
            *_describe_adapters(settings),
            f"chat:    http://{host}:{port}/",
            f"API:     http://{host}:{port}/v1  ({access}; Ctrl-C ends it)",
        ]
    )


def _describe_adapters(settings: ServerSettings) -> list[str]:
    names = ", ".join(source.name for source in settings.adapters)
    more = "" if settings.adapter_folder is None else f"clients may load those below {settings.adapter_folder}"
    return [f"adapters: {'; '.join(filter(None, (names, more)))}"] if names or more else []


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _find_reachable(host: str) -> str:
    """Return an address that another machine can open: of 0.0.0.0, that of the route to others."""
    try:
        if not ip_address(host).is_unspecified:
            return host
    except ValueError:
        return host
    family, other = (socket.AF_INET6, "2001:db8::1") if ":" in host else (socket.AF_INET, "192.0.2.1")
    try:
        # Nothing is sent: only the route is looked up.
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((other, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return socket.gethostname()


def open_listener(settings: ServerSettings) -> socket.socket:
    """Return a socket that listens at the address.

    Raises:
        UserError: if it is taken, not allowed, or not one of this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {settings.host}: no such address ({error}); use 127.0.0.1") from error
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listening.close()
        raise UserError(_explain(settings, error)) from error
    return listening


def _explain(settings: ServerSettings, error: Exception) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EADDRINUSE:
        return f"port {settings.port} is taken by {_find_owner(settings.port)}; choose another one with --port"
    if number == errno.EACCES:
        return f"port {settings.port} needs more rights; choose one above 1023 with --port"
    if number == errno.EADDRNOTAVAIL:
        return f"--host {settings.host}: is no address of this machine; use 127.0.0.1, or 0.0.0.0 for all of them"
    return f"--host {settings.host} --port {settings.port}: cannot be listened on ({error}); choose others"


def _find_owner(port: int) -> str:
    """Return the name and id of the process that listens on a port, where the system tells."""
    if sys.platform != "linux":
        return "another program"
    sockets = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if Path(table).exists():
            rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
            # State 0A is that of a listener.
            sockets |= {
                f"socket:[{row[9]}]" for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port
            }
    for place in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(place) in sockets:
                process = place.parents[1]
                return f"{(process / 'comm').read_text().strip()} (process {process.name})"
        except OSError:
            continue
    return "another program"


def _allow_connections() -> None:
    """Raise the limit of open files as far as the system lets anybody: each connection is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
