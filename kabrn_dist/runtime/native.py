"""The runtime in C from Python, over ctypes: model files, states, sampling. Needs numpy and a C compiler, no torch.

Example:
    with NativeModel("model.mkb") as model, model.context() as context:
        logits = context.decode([model.info.document_token, *model.tokenize("Once")])
        for _ in range(100):
            token = context.sample(logits)
            print(model.token_bytes(token).decode(errors="replace"), end="")
            logits = context.decode([token])
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from ctypes import byref, c_float, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kabrn_dist.runtime.native_library import (
    AdapterStruct,
    InfoStruct,
    NativeHandle,
    NativeInfo,
    SamplingStruct,
    call_native,
    encode_native_path,
    load_native_library,
    read_native_bytes,
)
from kabrn_dist.utils.errors import UserError

_NO_TOKEN = 2**32 - 1


def native_kernels() -> str:
    """Return the name of the kernels that the runtime uses here, such as "avx512vnni"."""
    return str(load_native_library().mkb_kernels().decode())


class NativeModel(NativeHandle):
    """A model file, opened by the runtime; threads may share it.

    Args:
        path: The file.
        verify: Whether to check its sha256, which reads all of it.

    Raises:
        UserError: for a file that is missing, damaged, foreign or of a newer version.
    """

    def __init__(self, path: Path | str, verify: bool = True) -> None:
        library, pointer = load_native_library(), c_void_p()
        call_native(library.mkb_model_open, encode_native_path(path), int(verify), byref(pointer))
        assert pointer.value is not None
        super().__init__(pointer.value, library.mkb_model_close)
        self._parts: weakref.WeakSet[NativeContext | NativeAdapter] = weakref.WeakSet()

    def __enter__(self) -> NativeModel:
        return self

    def close(self) -> None:
        """Unmap the file, and give back the memory of all its contexts and adapters."""
        for part in list(getattr(self, "_parts", ())):
            part.close()
        super().close()

    @property
    def info(self) -> NativeInfo:
        """What the file says about itself."""
        info = InfoStruct()
        load_native_library().mkb_model_info(self.pointer, byref(info))
        values: dict[str, Any] = {name: getattr(info, name) for name, *_ in InfoStruct._fields_}
        values |= {name: bytes(values[name]).hex() for name in ("sha256", "tokenizer_sha256")}
        return NativeInfo(**values)

    @property
    def changed(self) -> bool:
        """Whether the file was overwritten or cut in place since it was opened, so that it must not be used."""
        return int(load_native_library().mkb_model_changed(self.pointer)) == 1

    @property
    def config(self) -> str:
        """The text of config.yaml."""
        return read_native_bytes(load_native_library().mkb_model_config, self.pointer).decode()

    @property
    def template(self) -> str:
        """The chat template; "" for none."""
        return read_native_bytes(load_native_library().mkb_model_template, self.pointer).decode()

    def tokenize(self, text: str | bytes, special: bool = False) -> list[int]:
        """Return the ids of a text; no document token is added.

        Args:
            text: The text; bytes may be no UTF-8.
            special: Whether special tokens are recognized.

        Raises:
            UserError: without memory for it, or for 4 GiB.
        """
        content = text.encode() if isinstance(text, str) else text
        # A token has at least one byte.
        ids = (c_uint32 * max(1, len(content)))()
        count = load_native_library().mkb_tokenize(self.pointer, content, len(content), int(special), ids, len(ids))
        if count > len(ids):
            raise UserError(f"no memory for a text of {len(content)} bytes; give a shorter one")
        return ids[:count]

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes of a token, which may be a part of a character."""
        return read_native_bytes(load_native_library().mkb_token_bytes, self.pointer, id)

    def context(self, threads: int = 1, max_tokens: int = 0) -> NativeContext:
        """Return a context: a state, and what is needed to read tokens on top of it.

        Args:
            threads: Number of threads that work on it.
            max_tokens: Room in the caches of attention layers; without effect on models that have none.

        Raises:
            UserError: if there is no memory for it.
        """
        context = NativeContext(self, threads, max_tokens)
        self._parts.add(context)
        return context

    def adapter(self, source: Path | str | bytes) -> NativeAdapter:
        """Return an adapter, which contexts of this model may share.

        Args:
            source: A file that `write_adapter_file` wrote, or its bytes.

        Raises:
            UserError: for what is no adapter, is damaged, or belongs to another model.
        """
        adapter = NativeAdapter(self, source)
        self._parts.add(adapter)
        return adapter


class NativeAdapter(NativeHandle):
    """An adapter of a model; made by `NativeModel.adapter`. Contexts that use it may do so after it is closed."""

    def __init__(self, model: NativeModel, source: Path | str | bytes) -> None:
        library, pointer = load_native_library(), c_void_p()
        if isinstance(source, bytes):
            call_native(library.mkb_adapter_open_memory, model.pointer, source, len(source), byref(pointer))
        else:
            call_native(library.mkb_adapter_open, model.pointer, encode_native_path(source), byref(pointer))
        assert pointer.value is not None
        super().__init__(pointer.value, library.mkb_adapter_close)
        details = AdapterStruct()
        library.mkb_adapter_info(self.pointer, byref(details))
        self.name: str = details.name.decode("utf-8", "replace")
        self.sha256: str = bytes(details.sha256).hex()

    def __enter__(self) -> NativeAdapter:
        return self


class NativeContext(NativeHandle):
    """A state of a model, which belongs to one thread at a time; made by `NativeModel.context`."""

    def __init__(self, model: NativeModel, threads: int, max_tokens: int) -> None:
        library, pointer = load_native_library(), c_void_p()
        call_native(library.mkb_context_create, model.pointer, threads, max_tokens, byref(pointer))
        assert pointer.value is not None
        super().__init__(pointer.value, library.mkb_context_destroy)
        self._model, self._vocab_size = model, model.info.vocab_size

    def __enter__(self) -> NativeContext:
        return self

    @property
    def position(self) -> int:
        """Number of tokens read so far."""
        return int(load_native_library().mkb_position(self.pointer))

    def set_adapters(self, adapters: Sequence[tuple[NativeAdapter, float]]) -> None:
        """Use adapters in place of those before, and return to the state after nothing.

        Args:
            adapters: Each with its weight; of those that flip codes one at most, with the weight 1. Empty for none.

        Raises:
            UserError: for more than one that flips codes, or one of another model; then nothing has changed.
        """
        pointers = (c_void_p * len(adapters))(*(adapter.pointer for adapter, _ in adapters))
        weights = (c_float * len(adapters))(*(weight for _, weight in adapters))
        call_native(load_native_library().mkb_context_set_adapters, self.pointer, pointers, weights, len(adapters))

    def decode(self, tokens: Sequence[int], logits: bool = True) -> NDArray[np.float32] | None:
        """Read tokens on top of the state.

        Args:
            tokens: Their ids.
            logits: Whether the last token's logits are wanted, which costs the product with the head.

        Returns:
            [vocab_size], or None if they are not wanted.

        Raises:
            UserError: for ids that are none, or if a cache is full.
        """
        ids = (c_uint32 * len(tokens))(*tokens)
        out = np.empty(self._vocab_size, np.float32) if logits else None
        place = None if out is None else out.ctypes.data
        call_native(load_native_library().mkb_decode, self.pointer, ids, len(tokens), place)
        return out

    def reset(self) -> None:
        """Return to the state after nothing."""
        load_native_library().mkb_reset(self.pointer)

    def state(self) -> bytes:
        """Return the state, with the sampler's.

        Raises:
            UserError: if the library cannot write it.
        """
        library = load_native_library()
        content = ctypes.create_string_buffer(library.mkb_state_bytes(self.pointer))
        call_native(library.mkb_state_get, self.pointer, content, len(content))
        return content.raw

    def set_state(self, content: bytes) -> None:
        """Continue from a state that `state` returned.

        Raises:
            UserError: for a state of another model or tokenizer, of other adapters, or a damaged one.
        """
        call_native(load_native_library().mkb_state_set, self.pointer, content, len(content))

    def save_state(self, path: Path | str) -> None:
        """Write the state to a file.

        Raises:
            UserError: if the disk refuses.
        """
        call_native(load_native_library().mkb_state_save, self.pointer, encode_native_path(path))

    def load_state(self, path: Path | str) -> None:
        """Continue from a file that `save_state` wrote.

        Raises:
            UserError: as `set_state`, and for a file that cannot be read.
        """
        call_native(load_native_library().mkb_state_load, self.pointer, encode_native_path(path))

    def set_sampling(
        self,
        temperature: float = 0.8,
        top_k: int = 50,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        repetition_window: int = 64,
        seed: int = 0,
    ) -> None:
        """Choose how `sample` draws, and begin its random numbers anew.

        Args:
            temperature: Divides the logits; 0 always takes the likeliest token.
            top_k: Number of likeliest tokens to draw among; 0: all.
            top_p: Probability that the tokens to draw among have together; 1: all.
            min_p: Least probability of a token, as a fraction of the likeliest one's; 0: all.
            repetition_penalty: Divides the scores of recent tokens; 1: none.
            repetition_window: Number of recent tokens that it applies to.
            seed: Of the random numbers.

        Raises:
            UserError: for a value that has no meaning.
        """
        sampling = SamplingStruct(temperature, top_k, top_p, min_p, repetition_penalty, repetition_window, seed)
        call_native(load_native_library().mkb_sampling_set, self.pointer, byref(sampling))

    def sample(self, logits: NDArray[np.float32]) -> int:
        """Draw a token from logits [vocab_size].

        Raises:
            UserError: if none of them is a number.
        """
        # The library changes them.
        scores = np.array(logits, np.float32)
        if scores.shape != (self._vocab_size,):
            raise ValueError(f"logits have shape {scores.shape}; pass those of decode, ({self._vocab_size},)")
        token = int(load_native_library().mkb_sample(self.pointer, scores.ctypes.data))
        if token == _NO_TOKEN:
            raise UserError("the model's outputs are not finite: its training has diverged; use an earlier checkpoint")
        return token
