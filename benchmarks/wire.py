"""What processes send, as the kernel counts it: nothing is patched, and message headers are in the count."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable

import torch.distributed as dist

READINGS = 100


def sent_by(function: Callable[[], object], group: dist.ProcessGroup | None = None) -> int:
    """Bytes that this rank sends meanwhile, less those of the barrier that makes sure that all have arrived."""
    dist.barrier(group)
    before = tcp_bytes_sent()
    dist.barrier(group)
    barrier = tcp_bytes_sent() - before
    function()
    dist.barrier(group)
    return tcp_bytes_sent() - before - 2 * barrier


def tcp_bytes_sent() -> int:
    """By all open TCP sockets of this process, without retransmissions, once the count stands still.

    Linux only (4.19 or later). The kernel may send what it was given before, and another thread may close a file while
    all are listed, so one reading is not enough.
    """
    readings = [_read_counters()]
    while len(readings) < 2 or (readings[-1] != readings[-2] and len(readings) < READINGS):
        time.sleep(0.01)
        readings.append(_read_counters())
    return readings[-1]


def _read_counters() -> int:
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as copy:
                info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 216)
        except OSError:
            continue  # a socket of another kind, or closed meanwhile
        # struct tcp_info of <linux/tcp.h>: tcpi_bytes_sent and tcpi_bytes_retrans.
        sent, again = struct.unpack_from("QQ", info, 200)
        total += sent - again
    return total
