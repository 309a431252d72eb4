"""Run many commands of `mixkabrn` without importing torch for each: a server that has imported it forks them.

A command has the streams, the folder and the environment of the process that asks for it, which ends with its exit
code. A signal reaches only that process: commands that are to be stopped are started as usual.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import NoReturn

from tests.support.fork_server import PRELOADED, ROOT

# Commands that import torch, in this process alone, and end by themselves.
FORKED = ("train", "generate", "export", "pack", "grow", "report", "plan")
STREAMS = 3
CLIENT = """#!{python} -S
import json, os, socket, sys
if sys.argv[1:2] and sys.argv[1] not in {forked!r}:
    os.execv({python!r}, [{python!r}, "-m", "kabrn_dist", *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [b"x"], [0, 1, 2])
    order = json.dumps([os.getcwd(), dict(os.environ), sys.argv[1:]]).encode()
    server.sendall(order)
    server.shutdown(socket.SHUT_WR)
    sys.exit(int(server.recv(16) or b"1"))
"""


@contextlib.contextmanager
def command_server() -> Iterator[str]:
    """Run a server; yield the text of a script that stands for `mixkabrn`."""
    # The address of a socket is short.
    with tempfile.TemporaryDirectory(prefix="kabrn-") as folder, socket.socket(socket.AF_UNIX) as listener:
        address = f"{folder}/commands"
        listener.bind(address)
        listener.listen()
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.command_server", str(listener.fileno())],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            pass_fds=[listener.fileno()],
        )
        try:
            yield CLIENT.format(python=sys.executable, forked=FORKED, address=address)
        finally:
            server.kill()
            server.wait()


def _serve(listener: socket.socket) -> None:
    """Fork a process for each client, for ever."""
    for name in (*PRELOADED, "kabrn_dist.inference.run", "kabrn_dist.runtime.model_file"):
        importlib.import_module(name)
    _ = importlib.import_module("deepspeed.ops").__compatible_ops__
    gc.collect()
    gc.freeze()
    running = 0
    while True:
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _run(client)
        client.close()
        running += 1
        while running and os.waitpid(-1, os.WNOHANG)[0]:
            running -= 1


def _run(client: socket.socket) -> NoReturn:
    """Run one command as its client would, and exit."""
    code = 1
    try:
        _, descriptors, _, _ = socket.recv_fds(client, 1, STREAMS)
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        # Those of this process were opened on other files.
        sys.stdin, sys.stdout = os.fdopen(0, encoding="utf-8"), os.fdopen(1, "w", encoding="utf-8")
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace")
        with client.makefile("rb") as file:
            folder, variables, arguments = json.loads(file.read())
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(variables)
        from kabrn_dist.cli.main import main

        code = main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        client.sendall(str(code).encode())
        os._exit(code)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
