"""The start of a fine-tuning: the base's weights in each rank's part of the model, and what of it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from kabrn_dist.adapters.folder import write_adapter
from kabrn_dist.checkpoint.manifest import read_manifest
from kabrn_dist.checkpoint.state import BaseState
from kabrn_dist.config import Config
from kabrn_dist.data.default_template import find_chat_template
from kabrn_dist.data.index import CHAT_TEMPLATE_NAME, TOKENIZER_NAME
from kabrn_dist.data.tokenizer import Tokenizer, read_chat_template
from kabrn_dist.distributed.collectives import broadcast_json, run_on_all, run_on_main
from kabrn_dist.inference.adapters import hash_model_codes
from kabrn_dist.inference.base import (
    Base,
    adapt_base,
    adapter_spec,
    attach_new_adapter,
    check_same_base,
    open_base,
)
from kabrn_dist.inference.init_adapter import load_init_adapter
from kabrn_dist.inference.make_adapter import collect_adapter
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.planner.count import count_parameters


class FinetuneStart(NamedTuple):
    """How a fine-tuning starts.

    Attributes:
        base: The base; None where a resumed run needs it no more.
        state: What the run's checkpoints say of it.
        lines: What the console says.
    """

    base: Base | None
    state: BaseState
    lines: list[str]


def start_from_base(model: MixKABRN, config: Config, earlier: BaseState | None) -> FinetuneStart:
    """Load the base of a fine-tuning into a model, and freeze what is not trained. Collective.

    Args:
        model: This rank's part of the model, on its device; not yet under ZeRO.
        config: The whole configuration.
        earlier: What a checkpoint that is resumed says of its base; None at the start of a run.

    Raises:
        UserError: on every rank, if the base cannot be used, is another one than before, or has nothing that is to be
            trained.
    """
    finetune = config.finetune
    assert finetune is not None
    if earlier is not None and not finetune.trains_adapter:
        # Its checkpoints hold the whole model.
        return FinetuneStart(None, earlier, [_describe(model, config, earlier)])
    base = open_base(config, None if earlier is None else earlier.step)
    base.fill(model, as_computed=finetune.trains_adapter)
    sha256 = broadcast_json(run_on_main(None, _hash_base, base), None)
    if earlier is not None:
        check_same_base(base, earlier, sha256)
    if finetune.trains_adapter:
        run_on_all(None, attach_new_adapter, model, config)
    state = earlier or BaseState(sha256=sha256, step=base.step)
    lines = [_describe(model, config, state)]
    if earlier is None and finetune.init_adapter is not None:
        lines.append(load_init_adapter(model, config, sha256))
    return FinetuneStart(base, state, lines)


def describe_finished(config: Config, base: Base | None, checkpoint: Path) -> list[str]:
    """Return lines about what to do with a finished fine-tuning, after writing its adapter into the run's folder.

    Not collective: one rank calls it.

    Args:
        config: The configuration of the fine-tuning.
        base: Its base; not needed for the method `full`.
        checkpoint: The last checkpoint.

    Raises:
        UserError: if the checkpoint or the base cannot be read, or the disk refuses.
    """
    finetune, run = config.finetune, config.run.folder
    assert finetune is not None
    command = "chat" if (run / CHAT_TEMPLATE_NAME).exists() else "generate"
    if not finetune.trains_adapter or base is None:
        return [f"next        mixkabrn {command} {run}", f"            mixkabrn export {run} FOLDER"]
    manifest, folder = read_manifest(checkpoint), run / "adapter"
    model = adapt_base(base, config, checkpoint, manifest)
    adapter = collect_adapter(model, adapter_spec(finetune), run.resolve().name, manifest.step, str(finetune.base))
    write_adapter(adapter, folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    flipped = sum(len(patch.places) for patch in adapter.patches.values())
    told = f", {flipped:,} flipped codes" if adapter.patches else ""
    return [
        f"adapter     {folder} ({size / 2**10:,.0f} KiB{told})",
        f"next        mixkabrn {command} {finetune.base} --adapter {folder}",
        f"            mixkabrn pack {finetune.base}{_name_template(run, base)} --out base.mkb",
        f"            mixkabrn {command} base.mkb --adapter {folder}",
    ]


def _name_template(run: Path, base: Base) -> str:
    """Return the option of `mixkabrn pack` for a chat template that the base would not be packed with."""
    own, tokenizer = run / CHAT_TEMPLATE_NAME, base.folder / TOKENIZER_NAME
    if not own.exists() or not tokenizer.exists():
        return ""
    return "" if read_chat_template(own) == find_chat_template(Tokenizer.load(tokenizer)) else f" --template {own}"


def _hash_base(base: Base) -> str:
    return hash_model_codes(base.model())


def _describe(model: MixKABRN, config: Config, base: BaseState) -> str:
    finetune = config.finetune
    assert finetune is not None
    table, experts, local = model.parameter_table(), config.model.experts.num_experts, len(model.placement.local)
    trained = sum(
        parameter.numel() * experts // local if table[name].routed else parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    )
    whole = count_parameters(config.model).total
    replay = f", {finetune.replay:.1%} of the sequences replay its data" if finetune.replay else ""
    return (
        f"fine-tuning {finetune.method} of {finetune.base} (step {base.step}, sha256 {base.sha256[:12]}…): trains "
        f"{trained:,} parameters, {trained / whole:.1%} of the model's {whole:,}{replay}"
    )
