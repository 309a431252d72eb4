"""The start of a fine-tuning: the base's weights in each rank's part of the model, and what of it is trained."""

from __future__ import annotations

from kabrn_dist.checkpoint.state import BaseState
from kabrn_dist.config import Config
from kabrn_dist.distributed.collectives import broadcast_json, run_on_all, run_on_main
from kabrn_dist.inference.adapters import hash_model_codes
from kabrn_dist.inference.base import Base, open_base
from kabrn_dist.model.adapter import add_adapter, freeze_base
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.utils.errors import UserError


def start_from_base(model: MixKABRN, config: Config, earlier: BaseState | None) -> BaseState:
    """Load the base of a fine-tuning into a model, and freeze what is not trained. Collective.

    Args:
        model: This rank's part of the model, on its device; not yet under ZeRO.
        config: The whole configuration.
        earlier: What a checkpoint that is resumed says of its base; None at the start of a run.

    Returns:
        What the run's checkpoints say of its base.

    Raises:
        UserError: on every rank, if the base cannot be used, or is another one than before.
    """
    finetune = config.finetune
    assert finetune is not None
    if earlier is not None and not finetune.trains_adapter:
        # Its checkpoints hold the whole model.
        return earlier
    base = open_base(config, None if earlier is None else earlier.step)
    base.fill(model, as_computed=finetune.trains_adapter)
    sha256 = broadcast_json(run_on_main(None, _hash_base, base), None)
    if earlier is not None and sha256 != earlier.sha256:
        raise UserError(
            f"finetune.base {base.folder}: is another model (sha256 {sha256[:12]}…) than the one that this run has "
            f"begun with ({earlier.sha256[:12]}…), of step {earlier.step}; restore that one, or set run.folder to "
            "another folder to start anew"
        )
    if finetune.trains_adapter:
        run_on_all(None, _add_adapter, model, config)
    return earlier or BaseState(sha256=sha256, step=base.step)


def _add_adapter(model: MixKABRN, config: Config) -> None:
    freeze_base(model)
    add_adapter(model, adapter_spec(config), config.run.seed)


def _hash_base(base: Base) -> str:
    return hash_model_codes(base.model())
