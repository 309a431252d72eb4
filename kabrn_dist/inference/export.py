"""Export of a run's checkpoint: one folder of safetensors to publish, evaluate or generate from without the run.

    model.safetensors             or model-00001-of-00003.safetensors … and model.safetensors.index.json
    config.yaml, tokenizer.json   those of the run, and chat_template.jinja if it has one
    README.md                     a description

Tensors have the parameters' names; experts are stacked by their global index. Weights in another dtype than the trainer
computes with have its codes and scales beside them (see stored_codes.py). There is no process group and no whole tensor
in memory: each goes from the checkpoint's fragments to the file in chunks, codes matrix by matrix.
Only a fine-tuning by `ternary_lora` is loaded whole: it is its base, with the codes that were trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from torch import Tensor

from kabrn_dist.checkpoint.manifest import DTYPE_CODES
from kabrn_dist.config import Config
from kabrn_dist.config.file import dump_config
from kabrn_dist.data.index import CHAT_TEMPLATE_NAME
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.inference.checkpoint_weights import CheckpointWeights, name_in_checkpoint
from kabrn_dist.inference.folder import WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from kabrn_dist.inference.folder_writer import FileWriter, write_folder
from kabrn_dist.inference.load import DATA_HASH
from kabrn_dist.inference.loaded_weights import load_merged
from kabrn_dist.inference.run import Run
from kabrn_dist.inference.stored_codes import CODES_SUFFIX, SCALES_SUFFIX, code_shapes, is_code_tensor
from kabrn_dist.inference.working_copy import empty_full_model
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safetensors_header import encode_header

FILE_BYTES = 2 * 10**9
CHUNK_ELEMENTS = 4 * 2**20

README = """# {name}: weights at step {step}

A Mixture of Kolmogorov-Arnold Bit Retentive Networks, exported by MixKABRN: {parameters:,} parameters.

- `*.safetensors`: the fp32 weights {dtype}, under the parameters' names; the weights of ternary layers are the latent
  ones, which the model quantizes itself{codes}. Experts are stacked in the first dimension.
  The routers' biases stay in fp32.
- `config.yaml`: the whole configuration of the run. `tokenizer.json`: its tokenizer (sha256 {tokenizer}).

    mixkabrn generate THIS_FOLDER --prompt "Once"
"""


class ExportSource(Protocol):
    """Where the tensors of an export come from: `CheckpointWeights`, `LoadedWeights`.

    Attributes:
        shapes: Name → shape of every parameter and state of the routers.
        dtypes: Name → dtype that is computed with, of parameters.
        lam: How far matrices are quantized.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    lam: float

    def read(self, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return elements [start, stop) of a flattened tensor in a dtype."""

    def packed_codes(self, name: str) -> Iterator[Tensor]:
        """Yield pieces of the uint8 that `pack` makes of all codes of a ternary parameter."""

    def scales(self, name: str) -> Tensor:
        """Return the scales [E,S] fp32 of a ternary parameter."""


@dataclass(frozen=True)
class Export:
    """Weights that have been verified, and how they are written.

    Attributes:
        config: Configuration of the run.
        path: Where the weights come from: the folder of a checkpoint, or that of another export.
        step: Optimizer steps of the weights.
        tokenizer: The tokenizer that the run was trained with.
        weights: Reader of the weights.
        dtypes: Dtype of each tensor in the export, by name; fp32 for those that are not in it.
        shapes: Name → shape of every tensor.
        files: File name → names of the tensors in it.
    """

    config: Config
    path: Path
    step: int
    tokenizer: Tokenizer
    weights: ExportSource
    dtypes: dict[str, torch.dtype]
    shapes: dict[str, tuple[int, ...]]
    files: dict[str, list[str]]

    @property
    def num_parameters(self) -> int:
        """Number of the model's parameters, without the routers' states."""
        return sum(prod(self.shapes[name]) for name in self.weights.dtypes)

    @property
    def has_codes(self) -> bool:
        """Whether ternary codes and scales lie beside the weights."""
        return any(map(is_code_tensor, self.shapes))

    @property
    def num_bytes(self) -> int:
        """Number of bytes of all tensors."""
        return sum(prod(shape) * self.stored_dtype(name).itemsize for name, shape in self.shapes.items())

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which a tensor is written: fp32 for the routers' states."""
        return self.dtypes.get(name, torch.float32)

    def describe_dtype(self) -> str:
        """Return the names of the parameters' dtypes, as for messages."""
        names = sorted({str(self.dtypes[name]).removeprefix("torch.") for name in self.weights.dtypes})
        return " and ".join(names)


def plan_export(
    run: Path, dtype: torch.dtype | None = None, step: int | None = None, file_bytes: int = FILE_BYTES
) -> Export:
    """Choose and verify a run's checkpoint and its tokenizer. Write nothing.

    Args:
        run: The run's folder.
        dtype: Dtype of the parameters in the export; None for those that the trainer computes with, so that ternary
            codes and scales are the trainer's.
        step: Step of the checkpoint; None takes the newest intact one.
        file_bytes: Maximum bytes of tensors per file; a larger tensor has a file of its own.

    Raises:
        UserError: without a run, an intact checkpoint or its tokenizer, or if they do not fit each other.
    """
    opened = Run.open(run, step)
    weights = load_merged(opened) if opened.is_merged else _open_checkpoint(opened)
    dtypes = weights.dtypes if dtype is None else dict.fromkeys(weights.dtypes, dtype)
    # What is written in another dtype than the trainer computes with would have other codes, and so would latents of
    # codes that were merged.
    ternary = list_ternary(opened.config, weights)
    coded = [name for name in ternary if opened.is_merged or dtypes[name] != weights.dtypes[name]]
    origin = opened.config, opened.checkpoint, opened.step, opened.tokenizer()
    return lay_out_export(*origin, weights, dtypes, coded, file_bytes)


def _open_checkpoint(run: Run) -> ExportSource:
    weights = CheckpointWeights(run.checkpoint, run.manifest, run.config)
    for name, shape in weights.shapes.items():
        record = run.manifest.tensors.get(name_in_checkpoint(name))
        if record is None or record.shape != shape:
            actual = "missing" if record is None else record.shape
            raise UserError(
                f"{run.checkpoint}: {name!r} is {actual}, {run.folder}/config.yaml asks for {shape}; restore that file"
            )
    return weights


def list_ternary(config: Config, weights: ExportSource) -> list[str]:
    """Return the names of the parameters that are wholly quantized."""
    table = empty_full_model(config).parameter_table()
    return [name for name, info in table.items() if info.ternary and weights.lam == 1]


def lay_out_export(
    config: Config,
    path: Path,
    step: int,
    tokenizer: Tokenizer,
    weights: ExportSource,
    dtypes: dict[str, torch.dtype],
    coded: Iterable[str],
    file_bytes: int = FILE_BYTES,
) -> Export:
    """Return the export of weights from any source; see `Export`.

    Args:
        config: Configuration of the run.
        path: Where the weights come from, for people.
        step: Optimizer steps of the weights.
        tokenizer: Of the model.
        weights: The weights.
        dtypes: Dtype of each parameter in the export.
        coded: Names of the parameters that have codes and scales beside them.
        file_bytes: Maximum bytes of tensors per file; a larger tensor has a file of its own.
    """
    codes: dict[str, tuple[int, ...]] = {}
    for name in coded:
        sizes = code_shapes(weights.shapes[name], config.model.scale_group_size)
        codes |= {name + suffix: shape for suffix, shape in sizes.items()}
    dtypes = dtypes | {name: torch.uint8 for name in codes if name.endswith(CODES_SUFFIX)}
    export = Export(config, path, step, tokenizer, weights, dtypes, weights.shapes | codes, {})
    export.files.update(_assign_files(export, file_bytes))
    return export


def write_export(export: Export, out: Path, progress: Callable[[str], None] = lambda file: None) -> None:
    """Write the export; the folder appears complete or not at all.

    Args:
        export: What to write.
        out: The folder to create.
        progress: Called with the name of each file of tensors after it is written.

    Raises:
        UserError: if `out` exists or the disk refuses; nothing is left behind then.
    """
    files: list[tuple[str, FileWriter]] = [
        (file, partial(_write_tensors, export, names)) for file, names in export.files.items()
    ]
    small = {file: partial(_write_content, content) for file, content in _small_files(export, out.name).items()}
    write_folder(out, [*files, *small.items()], lambda file: None if file in small else progress(file))


def _write_content(content: bytes, stream: BinaryIO) -> None:
    stream.write(content)


def _write_tensors(export: Export, names: list[str], stream: BinaryIO) -> None:
    header = {name: (DTYPE_CODES[export.stored_dtype(name)], export.shapes[name]) for name in names}
    metadata = {
        "format": "pt",
        "step": str(export.step),
        "tokenizer_sha256": export.tokenizer.sha256,
        "model": export.config.model.model_dump_json(),
    }
    # The hash of what follows is known at the end, and has the same length.
    stream.write(encode_header(header, metadata | {DATA_HASH: "0" * 64}))
    digest = hashlib.sha256()
    for name in names:
        for values in _read_pieces(export, name):
            content = values.view(torch.uint8).numpy().data
            digest.update(content)
            stream.write(content)
    stream.seek(0)
    stream.write(encode_header(header, metadata | {DATA_HASH: digest.hexdigest()}))


def _read_pieces(export: Export, name: str) -> Iterator[Tensor]:
    """The flattened values of one tensor of the export, piece by piece."""
    if name.endswith(CODES_SUFFIX):
        yield from export.weights.packed_codes(name.removesuffix(CODES_SUFFIX))
    elif name.endswith(SCALES_SUFFIX):
        yield export.weights.scales(name.removesuffix(SCALES_SUFFIX)).view(-1)
    else:
        total = prod(export.shapes[name])
        for start in range(0, total, CHUNK_ELEMENTS):
            stop = min(start + CHUNK_ELEMENTS, total)
            yield export.weights.read(name, start, stop, export.stored_dtype(name))


def _small_files(export: Export, name: str) -> dict[str, bytes]:
    codes = ", unless `NAME.codes` and `NAME.scales` hold what was trained" if export.has_codes else ""
    readme = README.format(
        name=name,
        step=export.step,
        parameters=export.num_parameters,
        dtype=f"in {export.describe_dtype()}",
        codes=codes,
        tokenizer=export.tokenizer.sha256,
    )
    files = {
        "config.yaml": dump_config(export.config).encode(),
        "tokenizer.json": export.tokenizer.content,
        "README.md": readme.encode(),
    }
    if export.tokenizer.chat_template:
        files[CHAT_TEMPLATE_NAME] = export.tokenizer.chat_template.encode()
    if len(export.files) > 1:
        weight_map = {name: file for file, names in export.files.items() for name in names}
        index = {"metadata": {"total_size": export.num_bytes}, "weight_map": weight_map}
        files[WEIGHTS_INDEX_NAME] = json.dumps(index, indent=1).encode()
    return files


def _assign_files(export: Export, file_bytes: int) -> dict[str, list[str]]:
    """Assign tensors to files, fp32 first: what follows stays aligned for readers that map the file."""
    groups: list[list[str]] = [[]]
    room = file_bytes
    for name in sorted(export.shapes, key=lambda name: -export.stored_dtype(name).itemsize):
        size = prod(export.shapes[name]) * export.stored_dtype(name).itemsize
        if size > room and groups[-1]:
            groups.append([])
            room = file_bytes
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {WEIGHTS_NAME: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}
