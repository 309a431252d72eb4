"""Export of a run's checkpoint for Hugging Face: a folder that transformers loads without this package.

    config.json, generation_config.json, configuration_mixkabrn.py, modeling_mixkabrn.py
    model.safetensors             or model-00001-of-00003.safetensors … and model.safetensors.index.json
    tokenizer.json, tokenizer_config.json, special_tokens_map.json
    README.md                     the model card

No whole model is in memory: each tensor goes from the checkpoint's fragments to the file in pieces.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from kabrn_dist.checkpoint.manifest import DTYPE_CODES
from kabrn_dist.config import Config
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.hub.model_card import CardFacts, write_card
from kabrn_dist.hub.model_config import make_generation_config, make_hub_config
from kabrn_dist.hub.tensors import Flavor, HubTensor, list_hub_tensors, read_hub_tensor
from kabrn_dist.hub.tokenizer_files import make_tokenizer_files
from kabrn_dist.hub.training_record import TrainingRecord, read_training_record
from kabrn_dist.inference.export import FILE_BYTES, ExportSource, plan_export
from kabrn_dist.inference.folder import WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from kabrn_dist.inference.folder_writer import FileWriter, write_folder
from kabrn_dist.inference.load import DATA_HASH
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safe_open import read_plain
from kabrn_dist.utils.safetensors_header import encode_header

MODEL_FILES = ("configuration_mixkabrn.py", "modeling_mixkabrn.py")
TEMPLATE_NAME = "chat_template.jinja"
_TEMPLATE_BYTES_LIMIT = 1 << 20
_CODE_BYTES_LIMIT = 1 << 24


class HubExport(NamedTuple):
    """A verified model and how it is written for Hugging Face.

    Attributes:
        config: Configuration of the run.
        step: Optimizer steps of the weights.
        source: The weights.
        tokenizer: The tokenizer that the model was trained with.
        tokenizer_files: Contents of the tokenizer's files, by name.
        flavor: Of the tensors.
        files: File name → the tensors in it.
        record: What is known about the training.
        parameters: Number of the model's parameters.
        license: Identifier of its license; empty for none.
    """

    config: Config
    step: int
    source: ExportSource
    tokenizer: Tokenizer
    tokenizer_files: dict[str, bytes]
    flavor: Flavor
    files: dict[str, list[HubTensor]]
    record: TrainingRecord
    parameters: int
    license: str

    @property
    def num_bytes(self) -> int:
        """Number of bytes of all tensors."""
        return sum(tensor.num_bytes for tensors in self.files.values() for tensor in tensors)


def plan_hub_export(
    run: Path,
    flavor: Flavor = "latent",
    step: int | None = None,
    template: Path | None = None,
    license_id: str = "",
    file_bytes: int = FILE_BYTES,
) -> HubExport:
    """Choose and verify a run's checkpoint, its tokenizer and what else goes into an export. Write nothing.

    Args:
        run: The run's folder.
        flavor: "latent" for weights that can be trained, in the dtypes that the trainer computes with; "ternary" for
            packed codes.
        step: Step of the checkpoint; None takes the newest intact one.
        template: File with a chat template; None takes chat_template.jinja of the run's folder, if there is one.
        license_id: License for the model card.
        file_bytes: Maximum bytes of tensors per file; a larger tensor has a file of its own.

    Raises:
        UserError: without a run, an intact checkpoint or its tokenizer, for a model without ternary codes that are
            wanted, and for a chat template that is none.
    """
    plan = plan_export(run, None, step)
    model, source = plan.config.model, plan.weights
    if flavor == "ternary" and not (model.quantize and source.lam == 1):
        reason = "model.quantize is false" if not model.quantize else f"quantization is still at {source.lam:.2f} of 1"
        raise UserError(
            f"{run}: {reason} at step {plan.step}, so there are no ternary codes; export it with --weights latent"
        )
    return prepare_hub_export(
        plan.config,
        plan.step,
        source,
        plan.tokenizer,
        flavor,
        _find_template(run, template),
        read_training_record(run, plan.config, plan.step),
        license_id,
        file_bytes,
    )


def prepare_hub_export(
    config: Config,
    step: int,
    source: ExportSource,
    tokenizer: Tokenizer,
    flavor: Flavor,
    template: tuple[str, str] | None,
    record: TrainingRecord,
    license_id: str = "",
    file_bytes: int = FILE_BYTES,
) -> HubExport:
    """Return the export of a model from any source of weights; arguments as of `HubExport` and `plan_hub_export`.

    Args:
        config: Configuration of the run.
        step: Optimizer steps of the weights.
        source: The weights.
        tokenizer: Of the model.
        flavor: Of the tensors.
        template: Text and origin of the chat template; None for none.
        record: What is known about the training.
        license_id: License for the model card.
        file_bytes: Maximum bytes of tensors per file.

    Raises:
        UserError: for a chat template that is none.
    """
    text, origin = template or (None, "")
    return HubExport(
        config=config,
        step=step,
        source=source,
        tokenizer=tokenizer,
        tokenizer_files=make_tokenizer_files(tokenizer, text, origin),
        flavor=flavor,
        files=_assign_files(list_hub_tensors(config, source.shapes, source.dtypes, flavor), file_bytes),
        record=record,
        parameters=sum(prod(shape) for name, shape in source.shapes.items() if name in source.dtypes),
        license=license_id,
    )


def write_hub_export(export: HubExport, out: Path, progress: Callable[[str], None] = lambda name: None) -> None:
    """Write the export; the folder appears complete or not at all.

    Args:
        export: What to write.
        out: The folder to create.
        progress: Called with the name of each file after it is written.

    Raises:
        UserError: if `out` exists or the disk refuses; nothing is left behind then.
    """
    write_folder(out, _list_files(export, out.name), progress)


def _list_files(export: HubExport, name: str) -> Iterator[tuple[str, FileWriter]]:
    for file, tensors in export.files.items():
        yield file, partial(_write_tensors, export, tensors)
    for file, content in _small_files(export, name).items():
        yield file, partial(_write_content, content)


def _write_content(content: bytes, stream: BinaryIO) -> None:
    stream.write(content)


def _write_tensors(export: HubExport, tensors: list[HubTensor], stream: BinaryIO) -> None:
    header = {tensor.name: (DTYPE_CODES[tensor.dtype], tensor.shape) for tensor in tensors}
    metadata = {"format": "pt", "step": str(export.step), "tokenizer_sha256": export.tokenizer.sha256}
    # The hash of what follows is known at the end, and has the same length.
    stream.write(encode_header(header, metadata | {DATA_HASH: "0" * 64}))
    digest = hashlib.sha256()
    for tensor in tensors:
        for values in read_hub_tensor(tensor, export.source):
            # A single value may have any stride, which keeps it from being seen as bytes.
            flat = values.reshape(-1)
            flat = flat.clone(memory_format=torch.contiguous_format) if flat.stride(0) != 1 else flat
            content = flat.view(torch.uint8).numpy().data
            digest.update(content)
            stream.write(content)
    stream.seek(0)
    stream.write(encode_header(header, metadata | {DATA_HASH: digest.hexdigest()}))


def _small_files(export: HubExport, name: str) -> dict[str, bytes]:
    document, model, lam = export.tokenizer.document_token, export.config.model, export.source.lam
    config = make_hub_config(model, lam, export.step, document, export.flavor)
    training = export.config.training
    facts = CardFacts(
        name=name,
        model=model,
        step=export.step,
        tokens=export.step * training.global_batch_size * export.config.data.sequence_length,
        parameters=export.parameters,
        num_bytes=export.num_bytes,
        flavor=export.flavor,
        lam=lam,
        record=export.record,
        license=export.license,
        has_template=b'"chat_template"' in export.tokenizer_files["tokenizer_config.json"],
    )
    files = {
        "config.json": _json(config),
        "generation_config.json": _json(
            make_generation_config(document, export.tokenizer.vocab_size, model.vocab_size)
        ),
        **{file: _model_code(file) for file in MODEL_FILES},
        **export.tokenizer_files,
        "README.md": write_card(facts).encode(),
    }
    if len(export.files) > 1:
        weight_map = {tensor.name: file for file, tensors in export.files.items() for tensor in tensors}
        files[WEIGHTS_INDEX_NAME] = _json({"metadata": {"total_size": export.num_bytes}, "weight_map": weight_map})
    return files


def _model_code(file: str) -> bytes:
    """A file of the model, as it stands beside the other one in an export."""
    content = read_plain(Path(__file__).with_name(file), _CODE_BYTES_LIMIT)
    return content.replace(b"from kabrn_dist.hub.configuration_mixkabrn", b"from .configuration_mixkabrn")


def _find_template(run: Path, template: Path | None) -> tuple[str, str] | None:
    file = template or run / TEMPLATE_NAME
    if template is None and not file.is_file():
        return None
    content = read_plain(file, _TEMPLATE_BYTES_LIMIT, follow_links=True, remedy="name a chat template in Jinja")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: byte {error.start} is not UTF-8; name a chat template in Jinja") from None
    if not text.strip():
        raise UserError(f"{file}: is empty; name a chat template in Jinja, or remove it")
    return text, str(file)


def _assign_files(tensors: list[HubTensor], file_bytes: int) -> dict[str, list[HubTensor]]:
    groups: list[list[HubTensor]] = [[]]
    room = file_bytes
    for tensor in tensors:
        if tensor.num_bytes > room and groups[-1]:
            groups.append([])
            room = file_bytes
        groups[-1].append(tensor)
        room -= tensor.num_bytes
    if len(groups) == 1:
        return {WEIGHTS_NAME: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode() + b"\n"
