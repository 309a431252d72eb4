"""A model folder of Hugging Face: config.json, safetensors and tokenizer.json, read without its library."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kabrn_dist.checkpoint.manifest import SAFETENSORS_DTYPES
from kabrn_dist.checkpoint.reader import read_entries
from kabrn_dist.inference.folder import WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safe_open import read_plain
from kabrn_dist.utils.safetensors_header import TensorEntry, read_header

CONFIG_NAME = "config.json"
_JSON_BYTES_LIMIT = 1 << 26
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")


@dataclass(frozen=True)
class ForeignModel:
    """A model of another library.

    Attributes:
        folder: Its folder.
        config: Content of config.json.
        tensors: Name → file and entry of each tensor.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, tuple[Path, TensorEntry]]

    @classmethod
    def of_folder(cls, folder: Path) -> ForeignModel:
        """Read config.json and the headers of the weights.

        Raises:
            UserError: for a folder without them, weights that are pickled, or files that are damaged.
        """
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give a model folder of Hugging Face, with {CONFIG_NAME}")
        config = read_json(folder / CONFIG_NAME, "give a model folder of Hugging Face, with config.json")
        return cls(folder, config, _list_tensors(folder))

    @property
    def model_type(self) -> str:
        """Kind of the model, as `llama`."""
        return str(self.config.get("model_type", ""))

    def get(self, *keys: str, default: Any = None) -> Any:
        """Return the value of the first of some keys of the configuration that is there and not null."""
        return next((self.config[key] for key in keys if self.config.get(key) is not None), default)

    def size(self, *keys: str, default: int | None = None) -> int:
        """Return a size from the configuration.

        Args:
            keys: Names that it may have.
            default: Its value if it is left out; None if it must be there.

        Raises:
            UserError: if it is missing or no positive whole number.
        """
        value = self.get(*keys, default=default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(
                f"{self.folder / CONFIG_NAME}: {keys[0]} is {value!r}, no positive whole number; correct it"
            )
        return value

    def count_layers(self) -> int:
        """Return the number of layers.

        Raises:
            UserError: if the configuration has none, or more than the files can hold.
        """
        count = self.size("num_hidden_layers")
        if count > len(self.tensors):
            raise UserError(
                f"{self.folder / CONFIG_NAME}: num_hidden_layers is {count:,}, and the files hold only "
                f"{len(self.tensors):,} tensors; get the whole folder"
            )
        return count

    def require(self, name: str) -> None:
        """Return if the files hold a tensor.

        Raises:
            UserError: if not.
        """
        if name not in self.tensors:
            raise UserError(
                f"{self.folder}: has no tensor {name!r}; the files are not whole, or of another kind of model"
            )

    def read(self, name: str, shape: Iterable[int] | None = None) -> Tensor:
        """Return a tensor in fp32.

        Args:
            name: Its name.
            shape: What the configuration makes of its shape; None for any.

        Raises:
            UserError: if it is missing, has another shape, or holds numbers that are not finite.
        """
        self.require(name)
        file, entry = self.tensors[name]
        if shape is not None and entry.shape != tuple(shape):
            raise UserError(
                f"{file}: tensor {name!r} is {list(entry.shape)}, config.json asks for {list(shape)}; get it again"
            )
        if not SAFETENSORS_DTYPES[entry.dtype].is_floating_point:
            raise UserError(
                f"{file}: tensor {name!r} is {entry.dtype}, quantized weights; get the model in bf16 or fp32"
            )
        values = torch.empty(prod(entry.shape))
        read_entries(file, [(entry, 0, values.numel(), values)])
        if not bool(values.isfinite().all()):
            raise UserError(f"{file}: tensor {name!r} holds numbers that are not finite; use another model")
        return values.view(entry.shape)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON file that holds a mapping.

    Args:
        path: The file.
        remedy: What to do if it cannot be used, for messages.

    Raises:
        UserError: if it cannot be read or holds something else.
    """
    try:
        content = json.loads(read_plain(path, _JSON_BYTES_LIMIT, follow_links=True, remedy=remedy))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({type(error).__name__}); {remedy}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a mapping; {remedy}")
    return content


def _list_tensors(folder: Path) -> dict[str, tuple[Path, TensorEntry]]:
    names: set[Any] = {WEIGHTS_NAME}
    if not (folder / WEIGHTS_NAME).exists() and (folder / WEIGHTS_INDEX_NAME).exists():
        weight_map = read_json(folder / WEIGHTS_INDEX_NAME, "get it again").get("weight_map")
        names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise UserError(f"{folder / WEIGHTS_INDEX_NAME}: no index of files beside it; get it again")
    elif not (folder / WEIGHTS_NAME).exists():
        _refuse_without_weights(folder)
    tensors: dict[str, tuple[Path, TensorEntry]] = {}
    for name in sorted(names):
        # The library's cache consists of links, which its user made.
        file = (folder / name).resolve()
        tensors |= {key: (file, entry) for key, entry in read_header(file).items()}
    return tensors


def _refuse_without_weights(folder: Path) -> None:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise UserError(
            f"{folder / pickles[0]}: can run code when it is read, and is not; get the model's safetensors, or convert "
            "it where you trust it: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR)"
        )
    raise UserError(f"{folder}: has neither {WEIGHTS_NAME} nor {WEIGHTS_INDEX_NAME}; get the whole folder")
