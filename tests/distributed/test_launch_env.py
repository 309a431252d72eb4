"""Where processes meet."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from kabrn_dist.distributed import launch_env as place
from kabrn_dist.utils.errors import UserError

# From which Linux takes the ports of connections; an administrator may have made it wider.
CHOSEN_BY_LINUX = Path("/proc/sys/net/ipv4/ip_local_port_range")
USUAL = [32768, 60999]


@pytest.mark.skipif(
    not CHOSEN_BY_LINUX.exists() or list(map(int, CHOSEN_BY_LINUX.read_text().split())) != USUAL,
    reason="connections get other ports here",
)
def test_a_free_port_is_none_that_a_connection_can_be_given() -> None:
    first, last = USUAL
    ports = {place.free_port() for _ in range(20)}
    assert len(ports) > 1 and not any(first <= port <= last for port in ports)


def test_a_port_that_is_taken_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", place.free_port()))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(place, "_PORTS", range(port, port + 1))
        with pytest.raises(UserError, match=f"{port} to {port}"):
            place.free_port()
