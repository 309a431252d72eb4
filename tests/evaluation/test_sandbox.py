"""Programs of models are contained: each attack is run for real, and what it aims at is looked at afterwards."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from kabrn_dist.evaluation.sandbox import ProgramLimits, ProgramOutcome, Sandbox, SandboxError
from kabrn_dist.evaluation.sandbox_filter import build_filter
from kabrn_dist.evaluation.sandbox_probe import SandboxProbe, open_sandbox, probe_sandbox
from kabrn_dist.utils.errors import UserError

SECRET = "correct-horse-battery-staple"
LIMITS = ProgramLimits(cpu_seconds=1, wall_seconds=5.0, memory_bytes=1 << 28, output_bytes=1000)
COMBINATIONS = [("namespaces", "landlock", "seccomp"), ("landlock", "seccomp"), ("namespaces", "seccomp")]


@cache
def probe() -> SandboxProbe:
    return probe_sandbox()


def require(*layers: str) -> None:
    """Skip a test that needs layers which this machine has not."""
    missing = [layer for layer in layers if layer not in probe().layers]
    if missing:
        pytest.skip(f"not on this machine: {probe().describe()}")


def require_sandbox() -> None:
    """Skip a test that runs programs where they cannot be run safely."""
    if not probe().is_safe:
        pytest.skip(f"not on this machine: {probe().describe()}")


class Host:
    """What programs aim at: files with a secret, a server, and a process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.secret = folder, folder / "secret"
        self.secret.write_text(SECRET)
        self.server = socket.create_server(("127.0.0.1", 0))
        self.server.settimeout(0.0)
        self.process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        self.shared = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()

    def close(self) -> None:
        self.server.close()
        self.process.kill()
        self.process.wait()

    def write_attack(self, program: str) -> str:
        values = {"SECRET_FILE": str(self.secret), "PORT": self.server.getsockname()[1], "VICTIM": self.process.pid}
        return "".join(f"{name} = {value!r}\n" for name, value in values.items()) + program


CALL = "import ctypes, os\ndef call(*a):\n    if ctypes.CDLL(None).syscall(*a) < 0: raise PermissionError\n"
X86 = platform.machine() == "x86_64"
DENIED = {"forbidden"}
# In a tree of its own, a program does not find what it may not touch.
HIDDEN = {"forbidden", "exception"}
ATTACKS: dict[str, tuple[str, set[str]]] = {
    "fork bomb": ("import os\nwhile True: os.fork()", DENIED),
    "daemon": (
        "import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        while True: pass",
        DENIED,
    ),
    "thread": ("import threading\nthreading.Thread(target=print).start()", DENIED),
    "shell": ("import subprocess\nsubprocess.run(['/bin/sh', '-c', 'true'])", DENIED),
    "another program": ("import os\nos.execv('/bin/true', ['true'])", DENIED),
    "kill everyone": ("import os\nos.kill(-1, 9)", DENIED),
    "kill the parent": ("import os\nos.kill(os.getppid(), 9)", DENIED),
    "kill a process": ("import os\nos.kill(VICTIM, 9)", DENIED),
    "kill a group": ("import os\nos.killpg(os.getpgid(0), 9)", DENIED),
    "signal by a file": ("import fcntl, os\nfcntl.fcntl(1, fcntl.F_SETOWN, VICTIM)", DENIED),
    "debugger": (f"{CALL}call({101 if X86 else 117}, 16, VICTIM, 0, 0)", DENIED),
    "queue of system calls": (f"{CALL}call(425, 8, ctypes.create_string_buffer(120))", DENIED),
    "new namespace": (f"{CALL}call({272 if X86 else 97}, 0x10000000)", DENIED),
    "handle of a process": (f"{CALL}call(434, VICTIM, 0)", DENIED),
    "connect": ("import socket\nsocket.create_connection(('127.0.0.1', PORT))", DENIED),
    "datagram": ("import socket\nsocket.socket(socket.AF_INET6, socket.SOCK_DGRAM)", DENIED),
    "local socket": ("import socket\nsocket.socket(socket.AF_UNIX)", DENIED),
    "pair of sockets": ("import socket\nsocket.socketpair()", DENIED),
    "name server": ("import socket\nsocket.gethostbyname('example.org')", HIDDEN),
    "delete a file": ("import os\nos.remove(SECRET_FILE)", HIDDEN),
    "delete all": ("import shutil, os\nshutil.rmtree(os.path.dirname(SECRET_FILE))", HIDDEN),
    "overwrite": ("open(SECRET_FILE, 'w').write('mine')", HIDDEN),
    "truncate": ("import os\nos.truncate(SECRET_FILE, 0)", HIDDEN),
    "change a mode": ("import os\nos.chmod(SECRET_FILE, 0)", HIDDEN),
    "change times": ("import os\nos.utime(SECRET_FILE, (0, 0))", HIDDEN),
    "link": ("import os\nos.link(SECRET_FILE, 'mine')", HIDDEN),
    "rename": ("import os\nos.rename(SECRET_FILE, 'mine')", HIDDEN),
    "empty a file of Python": ("import os\nos.open(os.__file__, os.O_RDONLY | os.O_TRUNC)", HIDDEN),
    "write to Python": ("import os\nopen(os.__file__, 'a')", HIDDEN),
    "read a file": ("print(open(SECRET_FILE).read())", HIDDEN),
    "read by a link": ("import os\nos.symlink(SECRET_FILE, 'a')\nprint(open('a').read())", HIDDEN),
    "passwords": ("print(open('/etc/passwd').read())", HIDDEN),
    "environment of the parent": ("import os\nprint(open(f'/proc/{os.getppid()}/environ').read())", HIDDEN),
    "shared memory": ("open('/dev/shm/mixkabrn-attack', 'w')", HIDDEN),
    "temporary files": ("open('/tmp/mixkabrn-attack', 'w')", HIDDEN),
    "memory": ("hog = []\nwhile True: hog.append(bytearray(1 << 22))", {"memory"}),
    "large file": ("open('large', 'wb').write(bytes(1 << 24))", {"exception"}),
    "many open files": ("files = [open('program.py') for _ in range(1000)]", {"exception"}),
    "more time": ("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))", HIDDEN),
    "exit": ("import os\nos._exit(0)", {"exit"}),
    "polite exit": ("import sys\nsys.exit(0)", {"exit"}),
    "claim success": (
        "import os\nfor n in range(3, 64):\n    try: os.write(n, b'x\\0passed\\0\\n' * 9)\n    except OSError: pass\n"
        "os._exit(0)",
        {"exit"},
    ),
    "crash": ("import ctypes\nctypes.string_at(0)", {"crashed"}),
    "input": ("input()", {"exception"}),
    "no program": ("def f(:", {"exception"}),
}
ENDLESS = {
    "loop": "while True: pass",
    "sleep": "import time\ntime.sleep(99)",
    "output": "while True: print('x' * 1000)",
    "deaf": "import signal\nsignal.signal(signal.SIGXCPU, lambda *_: None)\nwhile True: pass",
    "without output": "import os\nos.closerange(0, 64)\nwhile True: pass",
    "many files": "n = 0\nwhile True:\n    with open(str(n), 'w') as file: pass\n    n = (n + 1) % 100",
}

Outcomes = dict[str, ProgramOutcome]


@pytest.fixture(scope="module", params=COMBINATIONS, ids="+".join)
def attacked(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Host, Outcomes]]:
    """A host on which all attacks have been tried, with each combination of layers that is deemed safe."""
    require(*request.param)
    host = Host(tmp_path_factory.mktemp("host"))
    os.environ["MIXKABRN_SECRET"] = SECRET
    try:
        programs = [host.write_attack(program) for program, _ in ATTACKS.values()]
        outcomes = Sandbox(request.param, LIMITS).run_all(programs)
        yield host, dict(zip(ATTACKS, outcomes, strict=True))
    finally:
        del os.environ["MIXKABRN_SECRET"]
        host.close()


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_contained_and_named(attack: str, attacked: tuple[Host, Outcomes]) -> None:
    outcome = attacked[1][attack]
    assert outcome.status in ATTACKS[attack][1], outcome
    assert SECRET not in outcome.output and SECRET not in outcome.particulars


@pytest.mark.slow
def test_the_host_is_unharmed(attacked: tuple[Host, Outcomes]) -> None:
    host, _ = attacked
    assert [file.name for file in host.folder.iterdir()] == ["secret"]
    assert host.secret.read_text() == SECRET and host.secret.stat().st_mode & 0o777 and host.secret.stat().st_mtime > 1
    with pytest.raises(BlockingIOError):
        host.server.accept()
    assert host.process.poll() is None
    assert not Path("/tmp/mixkabrn-attack").exists() and not Path("/dev/shm/mixkabrn-attack").exists()
    assert not list_sandbox_processes()


def list_sandbox_processes() -> list[str]:
    """Commands of children of this process that run the sandbox."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if f"PPid:\t{os.getpid()}\n" in status.read_text():
                found.append(status.with_name("cmdline").read_text())
        except OSError:
            continue
    return [command for command in found if "sandbox_child" in command]


@pytest.mark.slow
def test_what_has_no_end_is_ended() -> None:
    require_sandbox()
    sandbox = open_sandbox(LIMITS)
    outcomes = dict(zip(ENDLESS, sandbox.run_all(ENDLESS.values(), workers=len(ENDLESS)), strict=True))
    assert {name: outcome.status for name, outcome in outcomes.items()} == dict.fromkeys(ENDLESS, "time-out")
    assert len(outcomes["output"].output) == LIMITS.output_bytes
    assert not list_sandbox_processes()


ORDINARY = """
import base64, bisect, collections, copy, csv, datetime, decimal, fractions, functools, hashlib, heapq, itertools
import json, math, operator, os, random, re, statistics, string, tempfile, typing, zlib
from dataclasses import dataclass

@dataclass
class Point:
    x: int

assert Point(1) == Point(1) and __name__ != "__main__"
assert hashlib.md5(b"").hexdigest().startswith("d41d8")
with open("notes.txt", "w") as file:
    file.write("a")
assert sorted(os.listdir()) == ["notes.txt", "program.py"] and not os.environ
with tempfile.TemporaryFile() as file:
    file.write(b"b")
print("done", len({"a", "b"}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("layers", COMBINATIONS, ids="+".join)
def test_an_ordinary_program_runs(layers: tuple[str, ...]) -> None:
    require(*layers)
    outcome = Sandbox(layers).run(ORDINARY)
    assert outcome.status == "passed" and outcome.output == "done 2\n", outcome


def test_a_program_inherits_no_open_file_and_the_same_order_of_sets() -> None:
    require_sandbox()
    program = (
        "import os\nfound = []\nfor n in range(3, 256):\n    try: os.fstat(n)\n    except OSError: continue\n"
        "    found.append(n)\nprint(len(found), list({'a', 'b', 'c', 'd', 'e'}))"
    )
    with open(os.devnull) as file:
        os.set_inheritable(file.fileno(), True)
        outputs = {open_sandbox().run(program).output for _ in range(2)}
    assert len(outputs) == 1
    # The one is the pipe for the report.
    assert outputs.pop().startswith("1 [")


def test_failures_are_explained() -> None:
    require_sandbox()
    programs = ["assert 1 == 2, 'no'", "{}['a']", "import numpy", "raise ValueError('a\\nb')", "x = 1"]
    programs += [
        r"raise ValueError('a\0b')",
        "import sys; sys.modules['__main__']._classify = lambda e: 'passed'; 1 / 0",
    ]
    outcomes = open_sandbox().run_all(programs)
    assert [outcome.describe() for outcome in outcomes] == [
        "assertion: AssertionError: no",
        "exception: KeyError: 'a'",
        "exception: ModuleNotFoundError: No module named 'numpy'",
        "exception: ValueError: a b",
        "passed",
        "exception: ValueError: a\0b",
        "exception: ZeroDivisionError: division by zero",
    ]


@pytest.mark.parametrize("layers", [(), ("landlock",), ("seccomp",), ("namespaces", "landlock")], ids="+".join)
def test_a_machine_without_protection_is_refused(layers: tuple[str, ...]) -> None:
    with pytest.raises(SandboxError, match=r"cannot be run safely here: .* a program could .*; run on Linux") as caught:
        open_sandbox(layers=layers)
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)


def test_a_layer_that_fails_is_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "pdp11")
    assert build_filter(platform.machine()) is None
    with pytest.raises(SandboxError, match=r"the sandbox lacks seccomp: .*; run on Linux"):
        Sandbox(("seccomp",)).run("print('run')")
    assert "seccomp" in probe_sandbox(("seccomp",)).missing


def test_the_probe_names_what_is_active() -> None:
    described = probe().describe()
    assert all(layer in described for layer in probe().layers)
    assert set(probe().layers) | set(probe().missing) == {"namespaces", "landlock", "seccomp"}
    without = probe_sandbox(())
    assert {"read files", "use the network", "start processes"} <= set(without.escapes) and not without.is_safe
