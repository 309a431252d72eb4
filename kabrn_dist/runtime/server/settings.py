"""What the server may use, and who may talk to it."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple


class AdapterSource(NamedTuple):
    """An adapter that a server has from its start.

    Attributes:
        name: What clients call it.
        path: Its folder or file.
        weight: Factor of what it adds.
    """

    name: str
    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class ServerSettings:
    """Limits and addresses of a server.

    Attributes:
        host: Address to listen on.
        port: Port to listen on; 0: any that is free.
        threads: Threads that work on one answer.
        contexts: Answers that are worked on at once.
        queue_limit: Requests that may wait for a context.
        token: What clients must send as `Authorization: Bearer TOKEN`; "": nothing.
        max_tokens: Longest answer; a request for more gets so many.
        context_tokens: Room in the caches of attention layers; without effect on models that have none.
        timeout: Seconds that a request may take, from its body's last byte to the answer's.
        body_bytes: Largest body of a request.
        cache_bytes: Memory for the states of conversations.
        cache_states: Largest number of these states.
        hosts: Further names under which a server on a loopback address may be asked for.
        adapters: What it has besides the model.
        adapter_folder: Clients may load adapters that lie below it; None: they may not load any.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    threads: int = 1
    contexts: int = 1
    queue_limit: int = 16
    token: str = ""
    max_tokens: int = 4096
    context_tokens: int = 8192
    timeout: float = 300.0
    body_bytes: int = 4 << 20
    cache_bytes: int = 256 << 20
    cache_states: int = 1000
    hosts: tuple[str, ...] = ()
    adapters: tuple[AdapterSource, ...] = ()
    adapter_folder: Path | None = None

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False
