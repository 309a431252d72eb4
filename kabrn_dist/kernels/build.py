"""Compile C files of this package for this CPU, once: libraries stay in the user's cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from kabrn_dist.utils.cache_folder import cache_folder

# OpenMP symbols stay undefined: they bind to the library that torch has loaded, so that both share a thread pool.
# Every product and every sum is rounded, also where a processor could fuse them: the runtime in C has the same bits.
COMPILE_FLAGS = (
    "-std=gnu11",
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fPIC",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-w",
)
LINK_FLAGS = ("-shared",)
COMPILE_TIMEOUT_S = 120


class KernelUnavailable(Exception):
    """The reason why there is no kernel here, as text for the log."""


def load_library(source: Path) -> ctypes.CDLL:
    """Load the library of a C file, compiling it if the cache has none for this source, compiler and CPU.

    Raises:
        Unavailable: no compiler, an error of the compiler's, a cache folder that cannot be written, or a library that
            does not load, as where torch brought no OpenMP of GNU's.
    """
    try:
        library = find_or_compile(source)
        return ctypes.CDLL(str(library))
    except (OSError, RuntimeError) as error:
        raise KernelUnavailable(str(error)) from error


def find_compiler() -> str:
    """Return the first of $CC, gcc, clang and cc that exists.

    Raises:
        KernelUnavailable: there is none.
    """
    for name in (os.environ.get("CC"), "gcc", "clang", "cc"):
        path = shutil.which(name) if name else None
        if path:
            return path
    raise KernelUnavailable("no C compiler was found")


def find_or_compile(source: Path) -> Path:
    """The library of a C file in the cache, from now on at the latest. Raises Unavailable, OSError."""
    compiler = find_compiler()
    files = [source, *sorted(source.parent.glob("*.h"))]
    inputs = (compiler, run_compiler([compiler, "--version"]), *COMPILE_FLAGS, *LINK_FLAGS, _cpu())
    key = hashlib.sha256(
        b"\0".join([*(file.read_bytes() for file in files), *(part.encode() for part in inputs)])
    ).hexdigest()[:16]
    library = cache_folder() / f"{source.stem}-{key}.so"
    if not library.exists():
        compile_whole(library, lambda target: _list_commands(compiler, source, target))
    return library


def _list_commands(compiler: str, source: Path, target: Path) -> list[list[str]]:
    compiled = str(target.with_name("compiled.o"))
    return [
        [compiler, *COMPILE_FLAGS, "-c", str(source), "-o", compiled],
        [compiler, *LINK_FLAGS, compiled, "-o", str(target)],
    ]


def compile_whole(
    built: Path, list_commands: Callable[[Path], list[list[str]]], timeout: int = COMPILE_TIMEOUT_S
) -> None:
    """Make a file of the cache, which appears whole or not at all.

    Several processes may compile at once: each builds a file of its own, and a rename puts a whole one in place.

    Args:
        built: The file.
        list_commands: From the path to build at to the commands that do it.
        timeout: Seconds that each of them may take.

    Raises:
        KernelUnavailable: if a command fails.
        OSError: if the folder cannot be written.
    """
    built.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=built.parent, prefix="build-") as place:
        target = Path(place) / built.name
        for command in list_commands(target):
            run_compiler(command, timeout)
        with target.open("rb") as file:
            os.fsync(file.fileno())
        target.replace(built)


def run_compiler(command: list[str], timeout: int = COMPILE_TIMEOUT_S) -> str:
    """Run a compiler and return what it prints.

    Raises:
        KernelUnavailable: with its first error, if it fails or takes too long.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, errors="replace")
    except subprocess.TimeoutExpired as error:
        raise KernelUnavailable(f"{command[0]} took more than {timeout} s") from error
    if done.returncode:
        message = done.stderr.strip().splitlines() or ["no message"]
        raise KernelUnavailable(
            f"{command[0]} failed: {next((line for line in message if 'error' in line), message[-1])}"
        )
    return done.stdout


def _cpu() -> str:
    """The CPU that `-march=native` compiles for; machines with different CPUs may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    fields = ("flags", "Features", "model name", "CPU part", "CPU implementer")
    cpu = sorted({line for line in lines if line.startswith(fields)})
    return "\n".join([platform.machine(), platform.processor(), *cpu])
