"""Growth of a run: its newest checkpoint, mapped to another configuration, becomes step 0 of a new run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kabrn_dist.checkpoint.fragment import Fragment
from kabrn_dist.checkpoint.layout import checkpoint_path, list_checkpoints
from kabrn_dist.checkpoint.manifest import Manifest
from kabrn_dist.checkpoint.state import CursorState, RunState, read_state
from kabrn_dist.checkpoint.store import CheckpointStore, load_tensor
from kabrn_dist.config import Config
from kabrn_dist.config.file import dump_config, parse_config
from kabrn_dist.data.corpus import open_corpus
from kabrn_dist.data.dataset import TokenDataset
from kabrn_dist.distributed.collectives import Group, group_rank, group_size, run_on_all, run_on_main
from kabrn_dist.grow.mappings import draw_initial, empty_model, list_mappings
from kabrn_dist.grow.plan import GrowthPlan, make_growth_plan
from kabrn_dist.grow.tensors import TENSOR_PARTS, ScratchTensors, SymmetryBreaking, TensorMapping, write_part
from kabrn_dist.inference.run_checkpoint import find_checkpoint
from kabrn_dist.model.router import RouterStates
from kabrn_dist.utils.atomic_io import atomic_write
from kabrn_dist.utils.errors import UserError

FP16_SCALE = 2.0**16


@dataclass(frozen=True)
class Growth:
    """A growth that can be carried out.

    Attributes:
        checkpoint: Folder of the checkpoint to start from.
        manifest: Its manifest.
        old_config: Its configuration.
        config: The new configuration.
        plan: What changes in the model.
        mappings: Origin of each tensor of the new model.
    """

    checkpoint: Path
    manifest: Manifest
    old_config: Config
    config: Config
    plan: GrowthPlan
    mappings: list[TensorMapping]


def plan_growth(source: Path, config: Config, group: Group = None) -> Growth:
    """Return how the newest intact checkpoint of a run becomes a checkpoint for `config`, without writing anything.

    Collective over `group` if torch.distributed is initialized.

    Args:
        source: Folder of the run to start from.
        config: Configuration of the new run.
        group: Ranks that grow together; None for all.

    Raises:
        UserError: on every rank, for a folder without an intact checkpoint, or a difference that growing cannot bridge.
    """
    path, manifest = find_checkpoint(source, group=group)
    before = parse_config(read_state(path, manifest).config, f"{path}/manifest.json")
    if config.training.precision == "auto":
        training = config.training.model_copy(update={"precision": before.training.precision})
        config = config.model_copy(update={"training": training})
    plan = make_growth_plan(before.model, config.model)
    mappings = list_mappings(plan, empty_model(before), empty_model(config))
    missing = [r.source for r in mappings if r.source and f"{r.source}/master" not in manifest.tensors]
    if missing:
        raise UserError(
            f"{path}: has no tensor {missing[0]!r}, so another version wrote it; set run.init_from to a newer run"
        )
    return Growth(path, manifest, before, config, plan, mappings)


def grow(source: Path, config: Config, noise: float | None = None, redraw: float = 0.0, group: Group = None) -> Path:
    """Write the newest checkpoint of the run in `source`, grown to `config`, as step 0 of `config.run.folder`.

    Collective over `group` if torch.distributed is initialized; each rank grows some of the tensors. The result
    depends only on the checkpoint and the arguments. A rank holds one part of one logical tensor in memory. Grown
    tensors are kept in files in the run's folder until the checkpoint is written, so the disk must have room for both.

    Args:
        source: Folder of the run to start from.
        config: Configuration of the new run.
        noise: Relative standard deviation of the noise on copies of experts. Default: 0 for copies of dense layers,
            which diverge because the new router sends them different tokens, and 0.01 for copies of experts.
        redraw: Fraction of each copy's hidden units to draw again (0.5 in drop-upcycling, arXiv 2502.19261).
        group: Ranks that grow together; None for all.

    Returns:
        The folder of the new checkpoint.

    Raises:
        UserError: on every rank, as `plan_growth`; if the new run has a checkpoint; for another tokenizer.
    """
    _check_fractions(noise, redraw)
    folder = config.run.folder
    run_on_main(group, _refuse_existing, folder)
    growth = plan_growth(source, config, group)
    state = run_on_all(group, _initial_state, growth)
    if noise is None:
        noise = default_noise(growth.plan)
    scratch = folder / "growing"
    run_on_main(group, _make_empty_folder, scratch)
    fragments = _grow_fragments(growth, SymmetryBreaking(noise, redraw, config.run.seed), scratch, group)
    saved = CheckpointStore(folder / "checkpoints", group=group).save(0, fragments, state)
    run_on_main(group, shutil.rmtree, scratch)
    if not saved:
        raise UserError(
            f"{folder}: the grown checkpoint could not be written; the reason is logged, start again without it"
        )
    run_on_main(group, atomic_write, folder / "config.yaml", dump_config(growth.config).encode())
    return checkpoint_path(folder / "checkpoints", 0)


def default_noise(plan: GrowthPlan) -> float:
    """Return the relative noise that `grow` uses by default."""
    return 0.01 if plan.copies > 1 else 0.0


def _grow_fragments(growth: Growth, breaking: SymmetryBreaking, scratch: Path, group: Group) -> Iterator[Fragment]:
    """This rank's fragments of the grown checkpoint, each grown when it is needed."""
    rank, size = group_rank(group), group_size(group)
    store = ScratchTensors(scratch / str(rank))
    model = empty_model(growth.config)
    for mapping in growth.mappings[rank::size]:
        for part in TENSOR_PARTS:
            values = store.empty(mapping.shape)
            if mapping.source is not None:
                old = load_tensor(growth.checkpoint, growth.manifest, f"{mapping.source}/{part}")
                write_part(values, old.float(), mapping, part, breaking)
            elif part == "master":
                values.copy_(draw_initial(model, mapping, growth.config.run.seed))
            yield Fragment(f"{mapping.name}/{part}", mapping.shape, 0, values.view(-1), owned=True)
    if rank == 0:
        for name, values in _router_states(growth).items():
            yield Fragment(name, tuple(values.shape), 0, values.view(-1), owned=True)


def _router_states(growth: Growth) -> dict[str, Tensor]:
    """Copies keep the bias of their expert and split its load; new mixtures start with an even load."""
    plan = growth.plan
    states = RouterStates.initial(len(plan.new.moe_layers), plan.new.experts.num_experts, "cpu").named()
    # Copies split a softmax score, and the bias is added to what is left of it.
    divisors = {
        "router/bias": 1 if plan.new.router.score_func == "sigmoid" else plan.copies,
        "router/share": plan.copies,
    }
    for name, values in states.items():
        if not plan.copied_layers or name not in growth.manifest.tensors:
            continue
        old = load_tensor(growth.checkpoint, growth.manifest, name) / divisors[name]
        for row, layer in enumerate(plan.new.moe_layers):
            if layer in plan.copied_layers:
                values[row] = old[plan.old.moe_layers.index(layer)].repeat(plan.copies)
    return states


def _initial_state(growth: Growth) -> dict[str, Any]:
    """The state of the new run, which has not read any data."""
    config, old = growth.config, read_state(growth.checkpoint, growth.manifest)
    data = config.data
    corpus = open_corpus(data)
    cursor = TokenDataset(corpus, "train", data.sequence_length, config.run.seed).state(0)
    tokenizer = corpus.tokenizer_sha256
    if tokenizer != old.tokenizer_sha256:
        raise UserError(
            f"{data.path}/tokenizer.json is not the one that {growth.checkpoint} was trained with, "
            "so the embedding would not match; prepare the data with that run's tokenizer "
            "(`mixkabrn prepare --tokenizer FILE`)"
        )
    is_fp16, was_fp16 = (each.training.precision == "fp16" for each in (config, growth.old_config))
    scale = (old.loss_scale if was_fp16 else FP16_SCALE) if is_fp16 else 1.0
    state = RunState(
        step=0,
        updates=old.updates,
        cursor=CursorState(**asdict(cursor)),
        precision=config.training.chosen_precision,
        loss_scale=scale,
        config=config.model_dump(mode="json"),
        tokenizer_sha256=tokenizer,
    )
    return state.model_dump()


def _check_fractions(noise: float | None, redraw: float) -> None:
    if noise is not None and not 0 <= noise < 1:
        raise UserError(
            f"noise {noise:g} is not a fraction of the weights; set it to 0 or more and below 1, such as 0.01"
        )
    if not 0 <= redraw <= 1:
        raise UserError(f"redraw {redraw:g} is not a fraction of the hidden units; set it to 0 to 1, such as 0.5")


def _refuse_existing(folder: Path) -> None:
    if existing := list_checkpoints(folder / "checkpoints"):
        raise UserError(f"{existing[0]}: the new run has begun already; choose another run.folder, or move it away")


def _make_empty_folder(scratch: Path) -> None:
    if scratch.exists():
        shutil.rmtree(scratch)
    scratch.mkdir(parents=True)
