"""Compiles the runtime in C, once: program and library stay in the user's cache folder. Needs no torch."""

from __future__ import annotations

import hashlib
import platform
import sys
from pathlib import Path
from typing import Literal

from kabrn_dist.kernels.build import KernelUnavailable, compile_whole, find_compiler, run_compiler
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
        inputs = [compiler, run_compiler([compiler, "--version"]), platform.machine(), *RUNTIME_FLAGS[kind]]
        sources = b"\0".join(file.read_bytes() for file in RUNTIME_SOURCES)
        key = hashlib.sha256(sources + "\0".join(inputs).encode()).hexdigest()[:16]
        built = cache_folder() / (f"mixkabrn-{key}" + {"program": "", "library": ".so"}[kind])
        if not built.exists():
            print("compiling the runtime, once…", file=sys.stderr, flush=True)
            compile_whole(built, lambda target: [_command(compiler, kind, target)], RUNTIME_COMPILE_SECONDS)
    except (KernelUnavailable, OSError, RuntimeError) as error:
        raise UserError(
            f"{CSRC / 'mixkabrn.c'}: cannot be compiled ({error}); install a C compiler such as gcc, or name one in CC"
        ) from error
    return built


def _command(compiler: str, kind: str, target: Path) -> list[str]:
    return [compiler, *RUNTIME_FLAGS[kind], str(RUNTIME_SOURCES[0]), "-o", str(target), *RUNTIME_LIBRARIES]
