"""Compiles the runtime to WebAssembly, once: modules stay in the user's cache folder. Needs the package ziglang."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from importlib import metadata
from pathlib import Path
from typing import Literal

from kabrn_dist.kernels.build import KernelUnavailable, compile_whole
from kabrn_dist.runtime.build import RUNTIME_SOURCES
from kabrn_dist.utils.cache_folder import cache_folder
from kabrn_dist.utils.errors import UserError

WasmKind = Literal["relaxed", "simd", "scalar"]
WASM_EXPORTS = (
    *("mkb_model_open_memory", "mkb_model_close", "mkb_model_info", "mkb_model_config", "mkb_model_template"),
    *("mkb_context_create", "mkb_context_destroy", "mkb_decode", "mkb_reset", "mkb_position"),
    *("mkb_state_bytes", "mkb_state_get", "mkb_state_set", "mkb_sampling_set", "mkb_sample"),
    *("mkb_tokenize", "mkb_token_bytes", "mkb_kernels", "malloc", "free"),
)
# The library of C is compiled without SIMD in all: its objects then serve all, and no build takes a minute more.
WASM_FLAGS = (
    *("-target", "wasm32-wasi", "-mexec-model=reactor", "-O2", "-DMIXKABRN_LIBRARY"),
    *("-Wl,--strip-all", "-Wl,-z,stack-size=1048576"),
    *(f"-Wl,--export={name}" for name in WASM_EXPORTS),
)
WASM_KIND_FLAGS: dict[WasmKind, tuple[str, ...]] = {
    "relaxed": ("-msimd128", "-mrelaxed-simd"),
    "simd": ("-msimd128",),
    "scalar": (),
}
# The first build compiles the library of C too.
WASM_COMPILE_SECONDS = 1800


def compile_wasm(kind: WasmKind) -> Path:
    """Return the runtime as a WebAssembly module, compiling it if the cache has none of these sources.

    Args:
        kind: "relaxed" with dot products of bytes, for Chrome and Firefox since 2023; "simd" for browsers since 2021
            (Safari 2023), "scalar" for all others.

    Raises:
        UserError: without ziglang, if it fails, or if the cache folder cannot be written.
    """
    if importlib.util.find_spec("ziglang") is None:
        raise UserError("the runtime for browsers needs the compiler ziglang; use: pip install ziglang==0.17.1")
    flags = [*WASM_FLAGS, *WASM_KIND_FLAGS[kind]]
    sources = b"\0".join(file.read_bytes() for file in RUNTIME_SOURCES)
    key = hashlib.sha256(sources + "\0".join([metadata.version("ziglang"), *flags]).encode()).hexdigest()[:16]
    try:
        built = cache_folder() / f"mixkabrn-{kind}-{key}.wasm"
        if not built.exists():
            compile_whole(built, lambda target: [_wasm_command(flags, target)], WASM_COMPILE_SECONDS)
    except (KernelUnavailable, OSError, RuntimeError) as error:
        raise UserError(
            f"the runtime for browsers cannot be compiled ({error}); report it, or use `mixkabrn serve`"
        ) from error
    return built


def _wasm_command(flags: list[str], target: Path) -> list[str]:
    return [sys.executable, "-m", "ziglang", "cc", *flags, str(RUNTIME_SOURCES[0]), "-o", str(target), "-lm"]
