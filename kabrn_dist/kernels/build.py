"""Compile C files of this package for this CPU, once: libraries stay in the user's cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
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
    inputs = (compiler, _run([compiler, "--version"]), *COMPILE_FLAGS, *LINK_FLAGS, _cpu())
    key = hashlib.sha256(
        b"\0".join([*(file.read_bytes() for file in files), *(part.encode() for part in inputs)])
    ).hexdigest()[:16]
    folder = cache_folder()
    library = folder / f"{source.stem}-{key}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Several ranks may compile at once: each builds a file of its own, and a rename puts a whole one in place.
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as place:
        built, compiled = Path(place) / library.name, Path(place) / "compiled.o"
        _run([compiler, *COMPILE_FLAGS, "-c", str(source), "-o", str(compiled)])
        _run([compiler, *LINK_FLAGS, str(compiled), "-o", str(built)])
        with built.open("rb") as file:
            os.fsync(file.fileno())
        built.replace(library)
    return library


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise KernelUnavailable(f"{command[0]} took more than {COMPILE_TIMEOUT_S} s") from error
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
