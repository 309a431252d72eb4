"""Compiles the runtime in C, once: program and library stay in the user's cache folder. Needs no torch."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

from kabrn_dist.kernels.build import KernelUnavailable, find_compiler
from kabrn_dist.utils.cache_folder import cache_folder
from kabrn_dist.utils.errors import UserError

CSRC = Path(__file__).parent / "csrc"
RUNTIME_SOURCES = (CSRC / "mixkabrn.c", CSRC / "mixkabrn.h")
# For no CPU in particular: the runtime chooses its kernels when it starts.
RUNTIME_FLAGS = {"program": ("-O2",), "library": ("-O2", "-fPIC", "-shared", "-DMIXKABRN_LIBRARY")}
RUNTIME_LIBRARIES = ("-lm", "-lpthread")
# Small machines need minutes.
RUNTIME_COMPILE_SECONDS = 1800


def compile_runtime(kind: Literal["program", "library"]) -> Path:
    """Return the compiled runtime, compiling it if the cache has none of these sources and this compiler.

    Args:
        kind: "program" for the command line, "library" for `kabrn_dist.runtime.native`.

    Raises:
        UserError: without a C compiler, if it fails, or if the cache folder cannot be written.
    """
    try:
        compiler = find_compiler()
        inputs = [compiler, _run_compiler([compiler, "--version"]), platform.machine(), *RUNTIME_FLAGS[kind]]
        sources = b"\0".join(file.read_bytes() for file in RUNTIME_SOURCES)
        key = hashlib.sha256(sources + "\0".join(inputs).encode()).hexdigest()[:16]
        built = cache_folder() / (f"mixkabrn-{key}" + {"program": "", "library": ".so"}[kind])
        if not built.exists():
            print("compiling the runtime, once…", file=sys.stderr, flush=True)
            _compile(compiler, kind, built)
    except (KernelUnavailable, OSError, RuntimeError) as error:
        raise UserError(
            f"{CSRC / 'mixkabrn.c'}: cannot be compiled ({error}); install a C compiler such as gcc, or name one in CC"
        ) from error
    return built


def _compile(compiler: str, kind: str, built: Path) -> None:
    built.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Several processes may compile at once: each builds a file of its own, and a rename puts a whole one in place.
    with tempfile.TemporaryDirectory(dir=built.parent, prefix="build-") as place:
        target = Path(place) / built.name
        _run_compiler([compiler, *RUNTIME_FLAGS[kind], str(RUNTIME_SOURCES[0]), "-o", str(target), *RUNTIME_LIBRARIES])
        with target.open("rb") as file:
            os.fsync(file.fileno())
        target.replace(built)


def _run_compiler(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=RUNTIME_COMPILE_SECONDS, check=False, errors="replace"
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{command[0]} took more than {RUNTIME_COMPILE_SECONDS} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"{command[0]}: {next((line for line in lines if 'error' in line), lines[-1])}")
    return done.stdout
