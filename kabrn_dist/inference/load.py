"""A trained model in one process, from a checkpoint of any parallel layout or from an export.

An export is a folder of safetensors files (one, or several with an index), config.yaml and tokenizer.json: see
kabrn_dist/inference/export.py, which writes them.
"""

from __future__ import annotations

import hashlib
import json
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from kabrn_dist.checkpoint.fragment import Fragment
from kabrn_dist.checkpoint.manifest import HASH_CHUNK_BYTES, SAFETENSORS_DTYPES, Manifest
from kabrn_dist.checkpoint.reader import read_entries
from kabrn_dist.checkpoint.store import CheckpointStore
from kabrn_dist.config import Config, ModelConfig
from kabrn_dist.config.file import load_config
from kabrn_dist.config.model_changes import describe_other_model
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.distributed.expert_placement import ExpertPlacement
from kabrn_dist.distributed.mesh import single_process_mesh
from kabrn_dist.inference.folder import WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from kabrn_dist.inference.generate import GenerativeModel
from kabrn_dist.inference.stored_codes import attach_stored_codes, check_stored_codes
from kabrn_dist.inference.working_copy import empty_full_model
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safe_open import open_plain, read_plain
from kabrn_dist.utils.safetensors_header import TensorEntry, read_header, read_metadata

# Key of a file's metadata: sha256 of all that follows its header.
DATA_HASH = "data_sha256"
STEP_DIGITS = 19
INDEX_BYTES_LIMIT = 16 * 2**20


def build_full_model(config: Config, device: torch.device | str = "cpu") -> GenerativeModel:
    """Build the model of a run with its initial weights and all experts in this process, for evaluation.

    Args:
        config: The run's configuration; its parallel layout is ignored.
        device: The device of the parameters.

    Returns:
        The model in evaluation mode.
    """
    layout = {"expert_parallel": 1, "experts_per_rank": None, "sequence_parallel": 1, "ranks_per_node": None}
    parallel = config.parallel.model_copy(update=layout)
    placement = ExpertPlacement((config.model.experts.num_experts,), 0)
    model = GenerativeModel(config.model, placement, single_process_mesh(device), parallel)
    model.initialize(config.run.seed)
    return model.to(device).eval()


def list_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a full model's parameters and routers' states, without memory for their values."""
    model = empty_full_model(config)
    named = dict(model.named_parameters()) | model.routers.named()
    return {name: tuple(values.shape) for name, values in named.items()}


def load_weights(model: MixKABRN, path: Path) -> Manifest:
    """Load a checkpoint's fp32 weights and routers' states into a full model.

    Args:
        model: A model with all experts in this process.
        path: The checkpoint's folder.

    Returns:
        The checkpoint's manifest.

    Raises:
        UserError: for a checkpoint that cannot be read or has other shapes.
    """
    named = {f"{name}/master": parameter.detach() for name, parameter in model.named_parameters()}
    named |= model.routers.named()
    fragments = [Fragment(name, tuple(v.shape), 0, v.view(-1), owned=True) for name, v in named.items()]
    manifest = CheckpointStore(path.parent).load(path, fragments)
    for name, parameter in model.named_parameters():
        check_finite(path, name, parameter.detach())
    model.routers.step = manifest.step
    model.set_quantization(model.config.quantization_lambda(manifest.step))
    return manifest


def load_export(folder: Path, device: torch.device | str = "cpu") -> tuple[GenerativeModel, Tokenizer]:
    """Load model and tokenizer from a folder that `mixkabrn export` wrote.

    Args:
        folder: The export's folder.
        device: The device of the model's parameters.

    Raises:
        UserError: for a file that is missing or damaged, or does not fit the others.
    """
    config, tokenizer = read_export_description(folder)
    return load_export_weights(config, folder, device), tokenizer


def read_export_description(folder: Path) -> tuple[Config, Tokenizer]:
    """Return the configuration and the tokenizer of an export, which belong to its weights.

    Raises:
        UserError: for a file that is missing, or does not fit the others.
    """
    if (folder / "config.json").exists() and not (folder / "config.yaml").exists():
        raise UserError(
            f"{folder}: is a model for transformers, which this command does not read; name the run that it was "
            f"exported from, or turn it into a run: mixkabrn import {folder} runs/{folder.resolve().name}"
        )
    config = load_config(folder / "config.yaml")
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{folder}/tokenizer.json has {tokenizer.vocab_size} tokens, model.vocab_size in config.yaml is "
            f"{config.model.vocab_size}: they are not of one export; copy the folder again"
        )
    metadata = _read_folder_metadata(folder)
    # Exports of earlier versions do not say which tokenizer they have.
    if metadata.get("tokenizer_sha256", tokenizer.sha256) != tokenizer.sha256:
        raise UserError(
            f"{folder}/tokenizer.json: sha256 is {tokenizer.sha256[:12]}…, the weights were trained with "
            f"{metadata['tokenizer_sha256'][:12]}…: this is another tokenizer; copy the folder again"
        )
    return config, tokenizer


def load_export_weights(config: Config, folder: Path, device: torch.device | str = "cpu") -> GenerativeModel:
    """Build the model that `config` describes with the weights of an export.

    Args:
        config: The export's configuration.
        folder: The export's folder.
        device: The device of the parameters.

    Raises:
        UserError: for files that are damaged or do not fit `config`, before memory is allocated for the model.
    """
    entries = check_export_weights(config, folder)
    model = build_full_model(config, device)
    for name, values in (dict(model.named_parameters()) | model.routers.named()).items():
        file, entry = entries[name]
        read_entries(file, [(entry, 0, prod(entry.shape), values.detach().view(-1))])
        check_finite(file, name, values.detach())
    step = read_export_step(entries)
    if step is not None:
        model.routers.step = step
        model.set_quantization(config.model.quantization_lambda(step))
    if model.quant.lam == 1:
        attach_stored_codes(model, entries)
    return model


def check_export_weights(config: Config, folder: Path) -> dict[str, tuple[Path, TensorEntry]]:
    """Return file and header entry of each tensor of an export whose files match their hashes and the configuration.

    Args:
        config: The export's configuration.
        folder: The export's folder.

    Raises:
        UserError: for files that are damaged or do not fit `config`.
    """
    entries = list_entries(folder)
    _check_model(config, folder)
    expected = list_shapes(config)
    for name, shape in expected.items():
        actual = entries[name][1].shape if name in entries else "missing"
        if actual != shape:
            raise UserError(
                f"{folder}: tensor {name!r} is {actual}, config.yaml asks for {shape}; export the run again"
            )
        if not SAFETENSORS_DTYPES[entries[name][1].dtype].is_floating_point:
            raise UserError(f"{folder}: tensor {name!r} is {entries[name][1].dtype}, no weights; export the run again")
    check_stored_codes(entries, empty_full_model(config))
    for file in {file for file, _ in entries.values()}:
        verify_data(file)
    return entries


def check_finite(origin: Path, name: str, values: Tensor) -> None:
    """Check that the values of a tensor are finite: a model of others has no probabilities to draw from.

    Raises:
        UserError: if one is not.
    """
    if not bool(values.isfinite().all()):
        raise UserError(f"{origin}: tensor {name!r} holds numbers that are not finite; use another one")


def _check_model(config: Config, folder: Path) -> None:
    """Check that config.yaml describes the model that was exported: other values may leave all shapes as they are."""
    text = _read_folder_metadata(folder).get("model")
    if text is None:
        # Exports of earlier versions do not say.
        return
    try:
        exported = ModelConfig.model_validate_json(text)
    except ValueError:
        # Of a newer version, or of a stranger: the shapes decide.
        return
    if differences := describe_other_model(exported, config.model):
        raise UserError(f"{folder}/config.yaml: {differences}; restore the value that was trained, or copy it again")


def _read_folder_metadata(folder: Path) -> dict[str, str]:
    return read_metadata(next(iter(list_entries(folder).values()))[0])


def verify_data(file: Path) -> None:
    """Check the hash of a file's tensors. Exports of earlier versions have none.

    Raises:
        UserError: if it is another one, or the file cannot be read.
    """
    expected = read_metadata(file).get(DATA_HASH)
    if expected is None:
        return
    found = _hash_data(file)
    if found != expected:
        raise UserError(
            f"{file}: damaged or edited, the sha256 of its tensors is {found[:12]}… and its header says "
            f"{expected[:12]}…; copy it again"
        )


def hash_export(folder: Path) -> list[str]:
    """Return the sha256 of the tensors of each file of an export, as its header says where it does.

    Args:
        folder: The export's folder, which has been loaded, so that what the headers say is true.

    Raises:
        UserError: for a file that cannot be read.
    """
    files = sorted({file for file, _ in list_entries(folder).values()})
    return [read_metadata(file).get(DATA_HASH) or _hash_data(file) for file in files]


def _hash_data(file: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open_plain(file) as stream:
            stream.seek(min(entry.start for entry in read_header(file).values()))
            while chunk := stream.read(HASH_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); copy it again") from error
    return digest.hexdigest()


def read_export_step(entries: dict[str, tuple[Path, TensorEntry]]) -> int | None:
    """Return the step at which an export with these tensors was made; None if it does not say."""
    text = read_metadata(next(iter(entries.values()))[0]).get("step", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < STEP_DIGITS else None


def list_entries(folder: Path) -> dict[str, tuple[Path, TensorEntry]]:
    """Return file and header entry of each tensor of an export's folder.

    Raises:
        UserError: for a file that is missing or damaged, or a folder without tensors.
    """
    if (folder / WEIGHTS_NAME).exists() or not (folder / WEIGHTS_INDEX_NAME).exists():
        names = {WEIGHTS_NAME}
    else:
        try:
            names = set(json.loads(read_plain(folder / WEIGHTS_INDEX_NAME, INDEX_BYTES_LIMIT))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{folder / WEIGHTS_INDEX_NAME}: no index of tensors ({type(error).__name__}); copy it again"
            ) from None
    entries: dict[str, tuple[Path, TensorEntry]] = {}
    for name in sorted(names, key=str):
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{folder / WEIGHTS_INDEX_NAME}: {str(name)[:80]!r} is no file name; use another export")
        entries |= {key: (folder / name, entry) for key, entry in read_header(folder / name).items()}
    if not entries:
        raise UserError(f"{folder}: its files hold no tensor; copy it again")
    return entries
