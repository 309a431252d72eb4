"""Packs a run's checkpoint or an export into a model file, and says what the file holds."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from kabrn_dist.config.file import load_config
from kabrn_dist.inference.checkpoint_weights import CheckpointWeights
from kabrn_dist.inference.folder import is_export
from kabrn_dist.inference.load import load_export
from kabrn_dist.inference.run import Run
from kabrn_dist.runtime.file_format import find_role
from kabrn_dist.runtime.file_plan import FilePlan, Packing
from kabrn_dist.runtime.tensor_plan import PlannedTensor
from kabrn_dist.runtime.weights import ModelWeights, WeightSource
from kabrn_dist.runtime.writer import pack_weights
from kabrn_dist.utils.errors import UserError

OTHER_PARTS = "routers, functions, convolutions"


class FilePart(NamedTuple):
    """A part of a model file, for people.

    Attributes:
        name: What it holds.
        values: Number of weights.
        bytes: Bytes of their values and scales, padding included.
    """

    name: str
    values: int
    bytes: int


class PackedFolder(NamedTuple):
    """What was packed.

    Attributes:
        plan: What the file holds.
        step: Optimizer steps of the weights.
        lam: How far the matrices are quantized: 1 or 0.
        tokens: Tokens of the tokenizer.
    """

    plan: FilePlan
    step: int
    lam: float
    tokens: int


def pack_folder(folder: Path, out: Path, packing: Packing, step: int | None = None) -> PackedFolder:
    """Write the model file of a run or of an export.

    Args:
        folder: A run, of which parameters are read one at a time, or an export. Of a fine-tuning by `ternary_lora`, its
            base with the codes that were trained.
        out: The file, which appears complete or not at all.
        packing: How it is written.
        step: Step of the run's checkpoint; None takes the newest intact one.

    Raises:
        UserError: for a folder that is neither, contents that are damaged, a model that a file cannot hold, and if the
            disk refuses.
    """
    if is_export(folder):
        if step is not None:
            raise UserError(f"{folder}: is an export, which has one step; leave out --step, or name the run")
        model, tokenizer = load_export(folder)
        config, step, weights = load_config(folder / "config.yaml"), model.routers.step, ModelWeights(model)
        plan = pack_weights(weights, config, tokenizer, step, out, packing)
        return PackedFolder(plan, step, weights.lam, tokenizer.vocab_size)
    run = Run.open(folder, step)
    tokenizer, reader = run.tokenizer(), _open_weights(run)
    plan = pack_weights(reader, run.config, tokenizer, run.step, out, packing)
    return PackedFolder(plan, run.step, reader.lam, tokenizer.vocab_size)


def _open_weights(run: Run) -> WeightSource:
    if run.is_merged:
        return ModelWeights(run.model())
    return CheckpointWeights(run.checkpoint, run.manifest, run.config)


def list_parts(plan: FilePlan) -> list[FilePart]:
    """Return the parts of a model file in its order, of which the last is what is not a weight."""
    sizes: dict[str, tuple[int, int]] = {}
    for planned in plan.tensors:
        tensor = planned.tensor
        values, used = sizes.get(_part_of(planned), (0, 0))
        # Decays and the routers' biases are no parameters.
        values += tensor.matrices * tensor.rows * tensor.columns if planned.names else 0
        sizes[_part_of(planned)] = values, used + tensor.matrices * (tensor.bytes + 4 * tensor.scales)
    parts = [FilePart(name, *size) for name, size in sizes.items()]
    rest = plan.file_bytes - sum(part.bytes for part in parts)
    return [*parts, FilePart("configuration, tokenizer, tables", 0, rest)]


def _part_of(planned: PlannedTensor) -> str:
    role = find_role(planned.tensor.role) or ""
    first, _, second = role.partition(".")
    if role in ("embedding", "head"):
        return role
    if second in ("inner", "outer", "convolution") or first in ("router", "convolution", "log_decay"):
        return OTHER_PARTS
    return {"mixer": "mixers", "routed": "routed experts", "shared": "shared experts and dense layers"}[first]
