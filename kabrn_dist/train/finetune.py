"""The start of a fine-tuning: the base's weights in each rank's part of the model, and what of it is trained."""

from __future__ import annotations

from typing import NamedTuple

from kabrn_dist.checkpoint.state import BaseState
from kabrn_dist.config import Config
from kabrn_dist.distributed.collectives import broadcast_json, run_on_all, run_on_main
from kabrn_dist.inference.adapters import hash_model_codes
from kabrn_dist.inference.base import Base, attach_new_adapter, check_same_base, open_base
from kabrn_dist.inference.init_adapter import load_init_adapter
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.planner.count import count_parameters


class FinetuneStart(NamedTuple):
    """How a fine-tuning starts.

    Attributes:
        base: What the run's checkpoints say of its base.
        lines: What the console says.
    """

    base: BaseState
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
        return FinetuneStart(earlier, [_describe(model, config, earlier)])
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
    return FinetuneStart(state, lines)


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
