"""The compiled library of csrc/mixkabrn.c, its functions and structures, over ctypes."""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, byref, c_char, c_char_p, c_float, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from kabrn_dist.runtime.build import compile_runtime
from kabrn_dist.utils.errors import UserError

_ERROR_BYTES = 256
_Error = c_char * _ERROR_BYTES
# Name → result, arguments; as in csrc/mixkabrn.h.
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "mkb_model_open": (c_int, [c_char_p, c_int, POINTER(c_void_p), _Error]),
    "mkb_model_close": (None, [c_void_p]),
    "mkb_model_changed": (c_int, [c_void_p]),
    "mkb_model_info": (None, [c_void_p, c_void_p]),
    "mkb_model_config": (c_void_p, [c_void_p, POINTER(c_size_t)]),
    "mkb_model_template": (c_void_p, [c_void_p, POINTER(c_size_t)]),
    "mkb_context_create": (c_int, [c_void_p, c_int, c_uint32, POINTER(c_void_p), _Error]),
    "mkb_context_destroy": (None, [c_void_p]),
    "mkb_adapter_open": (c_int, [c_void_p, c_char_p, POINTER(c_void_p), _Error]),
    "mkb_adapter_open_memory": (c_int, [c_void_p, c_char_p, c_size_t, POINTER(c_void_p), _Error]),
    "mkb_adapter_close": (None, [c_void_p]),
    "mkb_adapter_info": (None, [c_void_p, c_void_p]),
    "mkb_context_set_adapters": (c_int, [c_void_p, POINTER(c_void_p), POINTER(c_float), c_size_t, _Error]),
    "mkb_decode": (c_int, [c_void_p, POINTER(c_uint32), c_size_t, c_void_p, _Error]),
    "mkb_reset": (None, [c_void_p]),
    "mkb_position": (c_uint64, [c_void_p]),
    "mkb_state_bytes": (c_size_t, [c_void_p]),
    "mkb_state_get": (c_int, [c_void_p, c_void_p, c_size_t, _Error]),
    "mkb_state_set": (c_int, [c_void_p, c_char_p, c_size_t, _Error]),
    "mkb_state_save": (c_int, [c_void_p, c_char_p, _Error]),
    "mkb_state_load": (c_int, [c_void_p, c_char_p, _Error]),
    "mkb_sampling_set": (c_int, [c_void_p, c_void_p, _Error]),
    "mkb_sample": (c_uint32, [c_void_p, c_void_p]),
    "mkb_tokenize": (c_size_t, [c_void_p, c_char_p, c_size_t, c_int, POINTER(c_uint32), c_size_t]),
    "mkb_token_bytes": (c_void_p, [c_void_p, c_uint32, POINTER(c_size_t)]),
    "mkb_kernels": (c_char_p, []),
    "mkb_version": (c_char_p, []),
}


class InfoStruct(ctypes.Structure):
    """`mkb_info`."""

    _fields_ = [
        *[(name, c_uint32) for name in ("vocab_size", "tokenizer_size", "document_token", "hidden_size", "num_layers")],
        *[
            (name, c_uint64)
            for name in ("step", "file_bytes", "parameters", "active_parameters", "state_bytes", "bytes_per_token")
        ],
        ("attention_layers", c_uint32),
        ("sha256", ctypes.c_ubyte * 32),
        ("tokenizer_sha256", ctypes.c_ubyte * 32),
    ]


@dataclass(frozen=True)
class NativeInfo:
    """What a model file says about itself.

    Attributes:
        vocab_size: Number of logits.
        tokenizer_size: Number of tokens; larger ids are never drawn.
        document_token: Id of the token that begins a document.
        hidden_size: Width of the residual stream.
        num_layers: Number of layers.
        step: Optimizer steps of the checkpoint.
        file_bytes: Size of the file.
        parameters: Number of weights.
        active_parameters: Number of weights that a token passes.
        state_bytes: Size of a saved state, without the caches of attention layers.
        bytes_per_token: Bytes of weights that are read for a token.
        attention_layers: Number of layers with softmax attention.
        sha256: Hash of the file, in hexadecimal.
        tokenizer_sha256: Hash of the tokenizer, in hexadecimal.
    """

    vocab_size: int
    tokenizer_size: int
    document_token: int
    hidden_size: int
    num_layers: int
    step: int
    file_bytes: int
    parameters: int
    active_parameters: int
    state_bytes: int
    bytes_per_token: int
    attention_layers: int
    sha256: str
    tokenizer_sha256: str


class AdapterStruct(ctypes.Structure):
    """`mkb_adapter_details`."""

    _fields_ = [
        ("name", c_char * 64),
        ("method", c_uint32),
        ("rank", c_uint32),
        ("steps", c_uint64),
        ("file_bytes", c_uint64),
        ("sha256", ctypes.c_ubyte * 32),
        ("base_sha256", ctypes.c_ubyte * 32),
    ]


class SamplingStruct(ctypes.Structure):
    """`mkb_sampling`."""

    _fields_ = [
        ("temperature", c_float),
        ("top_k", c_uint32),
        ("top_p", c_float),
        ("min_p", c_float),
        ("repetition_penalty", c_float),
        ("repetition_window", c_uint32),
        ("seed", c_uint64),
    ]


class NativeHandle:
    """A pointer of the library's that is given back once."""

    def __init__(self, pointer: int, release: Any) -> None:
        self._pointer: int | None = pointer
        self._release = release

    @property
    def pointer(self) -> int:
        """The pointer.

        Raises:
            ValueError: after `close`.
        """
        if self._pointer is None:
            raise ValueError("it is closed already")
        return self._pointer

    def close(self) -> None:
        """Give back the memory; what was made from it cannot be used any more."""
        if self._pointer is not None:
            pointer, self._pointer = self._pointer, None
            self._release(pointer)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_pointer"):
            self.close()


@functools.cache
def load_native_library() -> ctypes.CDLL:
    """Return the runtime's library, compiled if the cache has none.

    Raises:
        UserError: if it cannot be compiled or loaded.
    """
    path = compile_runtime("library")
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise UserError(f"{path}: cannot be loaded ({error}); remove it, and it is compiled again") from error
    return library


def call_native(function: Any, *arguments: Any) -> None:
    """Call a function that returns a status, with room for its message.

    Raises:
        UserError: with that message, if it fails.
    """
    error = _Error()
    if function(*arguments, error):
        raise UserError(error.value.decode("utf-8", "replace"))


def encode_native_path(path: Path | str) -> bytes:
    """Return a path as the library takes it.

    Raises:
        UserError: for a name that no file has.
    """
    content = str(path).encode("utf-8", "surrogateescape")
    if b"\0" in content:
        raise UserError(f"{str(path)!r}: not a name of a file; give one without a NUL")
    return content


def read_native_bytes(function: Any, *arguments: Any) -> bytes:
    """Return the bytes that a function points to, whose last argument receives their number."""
    size = c_size_t()
    place = function(*arguments, byref(size))
    return ctypes.string_at(place, size.value) if place else b""
