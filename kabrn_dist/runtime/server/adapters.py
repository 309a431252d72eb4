"""Adapters that a server has besides its model: each is a model of its own to clients, chosen request by request."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kabrn_dist.adapters.adapter import AdapterInfo
from kabrn_dist.adapters.folder import read_adapter
from kabrn_dist.runtime.adapter_file import encode_adapter, read_adapter_file
from kabrn_dist.runtime.model_file import read_model_file
from kabrn_dist.runtime.native import NativeAdapter, NativeModel
from kabrn_dist.runtime.server.errors import RequestError
from kabrn_dist.utils.errors import UserError

ADAPTER_FILE_SUFFIX = ".mka"
NAME_CHARACTERS_LIMIT = 100
# Each takes memory, and anybody who may ask may load one.
ADAPTERS_LIMIT = 256
# Number in the cache of states of a model without adapters.
BASE_NUMBER = 0

_numbers = itertools.count(BASE_NUMBER + 1)


@dataclass(eq=False)
class ServedAdapter:
    """An adapter that clients may ask for.

    Attributes:
        name: What clients call it.
        info: What it says about itself.
        native: The adapter in the runtime; freed when no context has it any more.
        weight: Factor of what it adds.
        number: Different from that of every other adapter that this process has had, also of the same name.
        created: When it was loaded, in seconds since 1970.
        loaded: Whether it can still be asked for. Requests that are running finish with it.
    """

    name: str
    info: AdapterInfo
    native: NativeAdapter
    weight: float = 1.0
    number: int = field(default_factory=lambda: next(_numbers))
    created: int = field(default_factory=lambda: int(time.time()))
    loaded: bool = True


class AdapterReader:
    """Reads adapters of one model: folders, .safetensors and .mka.

    Args:
        model: The model in the runtime.
        file: Its file, which the other formats are encoded for.

    Raises:
        UserError: for a file that cannot be read.
    """

    def __init__(self, model: NativeModel, file: Path) -> None:
        # The runtime has verified its hash.
        self._model, self._file = model, read_model_file(file, verify=False)

    def open(self, path: Path) -> tuple[AdapterInfo, NativeAdapter]:
        """Return what an adapter says about itself, and the adapter in the runtime.

        Raises:
            UserError: for a file that is missing or damaged, and an adapter of another model.
        """
        if path.suffix == ADAPTER_FILE_SUFFIX and not path.is_dir():
            return read_adapter_file(path).info, self._model.adapter(path)
        adapter = read_adapter(path)
        return adapter.info, self._model.adapter(encode_adapter(adapter, self._file))


class AdapterSet:
    """The adapters of a server. Threads may share it.

    Args:
        base_name: What clients call the model without adapters.
        open_adapter: Reads an adapter; raises UserError.
        folder: Clients may load adapters that lie below it; None: they may not load any.
        strict: Whether a name that nothing has is refused; otherwise the model answers to any.
    """

    def __init__(
        self,
        base_name: str,
        open_adapter: Callable[[Path], tuple[AdapterInfo, NativeAdapter]],
        folder: Path | None = None,
        strict: bool = False,
    ) -> None:
        self._base_name, self._open, self._strict = base_name, open_adapter, strict
        self._folder = None if folder is None else folder.resolve()
        self._adapters: dict[str, ServedAdapter] = {}
        self._lock, self._loading = threading.Lock(), threading.Lock()

    def find(self, name: str) -> ServedAdapter | None:
        """Return the adapter of that name; None for the model itself.

        Raises:
            RequestError: for a name that nothing has.
        """
        with self._lock:
            found = self._adapters.get(name)
            if found is None and self._strict and name not in ("", self._base_name):
                there = ", ".join([self._base_name, *self._adapters])
                raise RequestError(
                    f"model: there is no {name[:NAME_CHARACTERS_LIMIT]!r}; there is {there}",
                    "model",
                    404,
                    "model_not_found",
                )
            return found

    def list(self) -> list[ServedAdapter]:
        """Return the adapters, in the order of their loading."""
        with self._lock:
            return list(self._adapters.values())

    def load(self, name: str, path: Path, weight: float = 1.0, replace: bool = False) -> ServedAdapter | None:
        """Read an adapter, which can then be asked for by its name.

        Args:
            name: Its name.
            path: Its folder or file.
            weight: Factor of what it adds.
            replace: Whether it takes the place of one that has the name; otherwise that is an error.

        Returns:
            The adapter whose place it took; None if there was none.

        Raises:
            UserError: for a name that is taken or no name, and an adapter that is none or of another model.
        """
        with self._loading:
            # Before the work, which may take a while.
            self._check_name(name, replace)
            info, native = self._open(path)
            if info.method == "ternary_lora" and weight != 1:
                raise UserError(f"{path}: holds flipped codes, which have no weight; leave out the {weight:g}")
            with self._lock:
                previous = self._adapters.get(name)
                self._adapters[name] = ServedAdapter(name, info, native, weight)
                if previous is not None:
                    previous.loaded = False
                return previous

    def unload(self, name: str) -> ServedAdapter:
        """Let an adapter not be asked for any more, and return it.

        Raises:
            RequestError: if there is none of that name.
        """
        with self._lock:
            found = self._adapters.pop(name, None)
            if found is None:
                there = f"there is {', '.join(self._adapters)}" if self._adapters else "there is none"
                raise RequestError(
                    f"lora_name: no adapter {name[:NAME_CHARACTERS_LIMIT]!r} is loaded; {there}",
                    "lora_name",
                    404,
                    "model_not_found",
                )
            found.loaded = False
            return found

    def resolve(self, path: str) -> Path:
        """Return the path of an adapter that a client names, which lies below the folder.

        Raises:
            RequestError: for any other path, whether or not something is there, and without a folder.
        """
        if self._folder is None:
            raise RequestError(
                "this server's adapters do not change; start it with --adapter-folder DIR", status=403, code="forbidden"
            )
        try:
            found = (self._folder / path).resolve()
        except (OSError, ValueError, RuntimeError):
            raise RequestError("lora_path: is no path; send that of an adapter's folder", "lora_path") from None
        if self._folder not in found.parents:
            raise RequestError(
                "lora_path: does not lie below the server's --adapter-folder; send a path in there", "lora_path", 403
            )
        return found

    def check_changes(self) -> None:
        """Return if clients may load and unload adapters.

        Raises:
            RequestError: if not.
        """
        self.resolve(".x")

    def _check_name(self, name: str, replace: bool) -> None:
        if not name.isprintable() or " " in name or not 1 <= len(name) <= NAME_CHARACTERS_LIMIT:
            raise UserError(
                f"adapter {name[:40]!r}: a name has 1 to {NAME_CHARACTERS_LIMIT} letters, digits and signs, without "
                "spaces; choose another one"
            )
        with self._lock:
            if name == self._base_name:
                raise UserError(f"adapter {name}: is the name of the model; choose another one")
            if name in self._adapters:
                if not replace:
                    raise UserError(f"adapter {name}: is loaded already; unload it first, or choose another name")
            elif len(self._adapters) >= ADAPTERS_LIMIT:
                raise UserError(f"adapter {name}: {ADAPTERS_LIMIT} are loaded already; unload one first")
