"""A model of Hugging Face, planned, described and written as step 0 of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kabrn_dist.config import Config
from kabrn_dist.config.file import EXAMPLE_OVERRIDE, parse_config
from kabrn_dist.data.adapt_tokenizer import AdaptedTokenizer
from kabrn_dist.hub.import_calibrate import calibrate, default_text, encode_rows
from kabrn_dist.hub.import_llama import LLAMA_TYPES, plan_llama
from kabrn_dist.hub.import_retnet import plan_retnet
from kabrn_dist.hub.import_run import write_start
from kabrn_dist.hub.import_source import CONFIG_NAME, ForeignModel
from kabrn_dist.hub.import_tensors import ImportedModel, TensorOrigin
from kabrn_dist.inference.generate import GenerativeModel
from kabrn_dist.inference.load import build_full_model
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.yaml_section import set_value

_STEPS, _LONGEST_SEQUENCE = 1000, 2048
_WORDS = {"exact": "exactly", "approximate": "approximately", "new": "newly drawn"}


@dataclass(frozen=True)
class ModelImport:
    """An import that can be carried out.

    Attributes:
        imported: Origins of all tensors.
        config: Configuration of the run.
        adapted: The run's tokenizer, and what was changed in it.
        own_vocabulary: Whether the tokenizer is the model's own; if not, embedding and head are drawn.
    """

    imported: ImportedModel
    config: Config
    adapted: AdaptedTokenizer
    own_vocabulary: bool

    @property
    def origins(self) -> list[TensorOrigin]:
        """Origin of each tensor, as it is with the run's tokenizer."""
        if self.own_vocabulary:
            return self.imported.origins
        remark = "drawn: the tokenizer is not the model's own"
        ends = ("embedding.weight", "head.weight")
        return [
            TensorOrigin(origin.name, (), "new", remark, None) if origin.name in ends else origin
            for origin in self.imported.origins
        ]


def plan_import(
    folder: Path,
    out: Path,
    adapted: AdaptedTokenizer,
    own_vocabulary: bool = True,
    kind: str = "auto",
    layers: str | None = None,
    data: str | None = None,
    ternary: bool = False,
    overrides: Sequence[str] = (),
) -> ModelImport:
    """Read headers and configuration of a model and decide what becomes of each tensor. Nothing is written.

    Args:
        folder: Model folder of Hugging Face.
        out: Folder of the run.
        adapted: Tokenizer of the run.
        own_vocabulary: Whether that is the model's own tokenizer.
        kind: "retnet", "llama", or "auto" to tell by the model's type.
        layers: For Transformers: R or A for each layer.
        data: Shard set to train on; None if there is none yet.
        ternary: Whether training eases into ternary weights; if not, weights stay plain.
        overrides: Changes `a.b=c` of the run's configuration.

    Raises:
        UserError: for a model of another kind, or a configuration that is wrong.
    """
    source = ForeignModel.of_folder(folder)
    kind = _choose_kind(source, kind)
    if kind == "retnet" and layers is not None:
        raise UserError(f"--layers {layers}: all layers of a RetNet are retention; leave it out")
    imported = plan_retnet(source) if kind == "retnet" else plan_llama(source, layers)
    tree = _make_config(imported, out, adapted, own_vocabulary, data, ternary)
    for override in overrides:
        set_value(tree, override, EXAMPLE_OVERRIDE, Config)
    config = parse_config(tree, "configuration of the run")
    _check_shapes(imported, config)
    plan = ModelImport(imported, config, adapted, own_vocabulary)
    for origin in plan.origins:
        for name in origin.sources:
            source.require(name)
    return plan


def run_import(plan: ModelImport, text: str | None = None, has_data: bool = False) -> tuple[Path, float]:
    """Write the run.

    Args:
        plan: From `plan_import`.
        text: Text on which the scales of approximate matrices are measured; None for Python's own documentation.
        has_data: Whether the plan's configuration names a shard set that is there.

    Returns:
        The checkpoint, and the loss of the model on the beginning of the text in bits per token.

    Raises:
        UserError: as `write_start`, and for tensors that do not fit.
    """
    model = build_imported(plan)
    batch = encode_rows(text or default_text(), plan.adapted.tokenizer, plan.config.model.vocab_size)
    nats = calibrate(model, batch, plan.imported.kind)
    return write_start(plan.config, model, plan.adapted.tokenizer, has_data), nats / log(2)


def build_imported(plan: ModelImport) -> GenerativeModel:
    """Return our model with their weights, plain and not calibrated.

    Raises:
        UserError: for a tensor that is missing, damaged, or of another shape.
    """
    model = build_full_model(plan.config)
    model.set_quantization(0.0)
    for origin in plan.origins:
        if origin.make is not None:
            with torch.no_grad():
                _fill(model.get_parameter(origin.name), origin.make())
    return model


def describe_import(plan: ModelImport) -> str:
    """Return a table with one line per kind of tensor over all layers, and lines about all that is left out."""
    groups: dict[tuple[str, ...], list[TensorOrigin]] = {}
    for origin in plan.origins:
        key = (_local(origin.name), *map(_local, origin.sources[:1]), origin.how, origin.remark)
        groups.setdefault(key, []).append(origin)
    rows = [("tensor", "layers", "from", "carried over", "")]
    for origins in groups.values():
        first = origins[0]
        layers = [int(origin.name.split(".")[1]) for origin in origins if origin.name.startswith("blocks.")]
        theirs = ", ".join(map(_local, first.sources[:1])) or "-"
        rows.append((_local(first.name), _span(layers), theirs, _WORDS[first.how], first.remark))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip()
        for row in rows
    ]
    source = plan.imported.source
    head = f"{source.folder} ({source.model_type}) → {plan.config.run.folder}"
    dropped = [f"left out: {part}" for part in plan.imported.dropped]
    return "\n".join([head, *lines, *dropped, *(f"tokenizer: {change}" for change in plan.adapted.changes)])


def _choose_kind(source: ForeignModel, kind: str) -> str:
    if kind != "auto":
        return kind
    if source.model_type == "retnet":
        return "retnet"
    if source.model_type in LLAMA_TYPES:
        return "llama"
    raise UserError(
        f"{source.folder / CONFIG_NAME}: model_type {source.model_type!r} is none of retnet, {', '.join(LLAMA_TYPES)}; "
        "give --kind if it has the tensors of one of them"
    )


def _make_config(
    imported: ImportedModel, out: Path, adapted: AdaptedTokenizer, own_vocabulary: bool, data: str | None, ternary: bool
) -> dict[str, Any]:
    rows, tokens = imported.model["vocab_size"], adapted.tokenizer.vocab_size
    longest = imported.source.get("max_position_embeddings", default=_LONGEST_SEQUENCE)
    model = {**imported.model, "vocab_size": max(rows, tokens) if own_vocabulary else tokens, "quantize": ternary}
    if ternary:
        model |= {"quantize_start_step": _STEPS // 10, "quantize_warmup_steps": _STEPS // 2}
    return {
        "version": 2,
        "run": {"folder": str(out)},
        "data": {"path": data or "data/none", "sequence_length": min(int(longest), _LONGEST_SEQUENCE)},
        "model": model,
        "optimizer": {"learning_rate": 3e-4, "warmup_steps": _STEPS // 20},
        "training": {"steps": _STEPS, "global_batch_size": 8, "micro_batch_size": 1},
    }


def _check_shapes(imported: ImportedModel, config: Config) -> None:
    """Refuse overrides that ask for another model than the one that is imported."""
    found = config.model.model_dump()
    for key, value in imported.model.items():
        wanted = value.items() if isinstance(value, dict) else ((None, value),)
        for part, expected in wanted:
            actual = found[key][part] if part else found[key]
            if key != "vocab_size" and actual != expected:
                name = f"model.{key}" + (f".{part}" if part else "")
                raise UserError(f"--set {name}={actual}: the imported model has {expected}; leave it out")


def _fill(parameter: Tensor, values: Tensor) -> None:
    """Copy values; rows of an embedding that they lack get the mean row, which is no token's."""
    rows = min(len(values), len(parameter))
    parameter[:rows] = values[:rows]
    if rows < len(parameter):
        parameter[rows:] = values.mean(0)


def _local(name: str) -> str:
    """The name without the number of its layer."""
    return ".".join(part for part in name.split(".") if not part.isdigit()).removeprefix("blocks.")


def _span(layers: list[int]) -> str:
    if not layers:
        return ""
    whole = list(range(layers[0], layers[-1] + 1))
    return ",".join(map(str, layers)) if layers != whole or len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
