"""Rules of the section `finetune` that involve other keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kabrn_dist.config.finetune import FinetuneConfig
    from kabrn_dist.config.model import ModelConfig
    from kabrn_dist.config.run import Config

# Matrices that are never ternary.
PLAIN_TARGETS = ("router", "head")


def check_finetune(config: Config) -> None:
    """Check that a fine-tuning fits the rest of its configuration."""
    finetune, model, parallel = config.finetune, config.model, config.parallel
    if finetune is None:
        return
    if config.run.init_from is not None:
        raise ValueError(
            f"run.init_from {config.run.init_from} and finetune.base {finetune.base} both say what the run starts "
            "from; leave one of them out"
        )
    if model.first_quantized_step:
        raise ValueError(
            f"model.quantize_start_step {model.quantize_start_step} + quantize_warmup_steps "
            f"{model.quantize_warmup_steps}: the model of finetune.base is quantized already; leave both out"
        )
    if not finetune.trains_adapter:
        if finetune.init_adapter is not None:
            raise ValueError(
                f"finetune.init_adapter {finetune.init_adapter}: finetune.method full trains no adapter; leave it out"
            )
        return
    if parallel.shard_ternary:
        raise ValueError(
            f"parallel.shard_ternary shards latents in training, and finetune.method {finetune.method} trains none; "
            "set shard_ternary to false"
        )
    _check_method(finetune, model)


def _check_method(finetune: FinetuneConfig, model: ModelConfig) -> None:
    if finetune.method == "state" and "R" not in model.layers:
        raise ValueError(
            f"finetune.method state trains the states of retention, and no layer of model.layers {model.layers} is "
            "retention; set finetune.method to lora"
        )
    if finetune.method != "ternary_lora":
        return
    if not model.quantize:
        raise ValueError(
            "finetune.method ternary_lora flips ternary codes, and model.quantize is false; set finetune.method to lora"
        )
    if plain := [target for target in finetune.targets if target in PLAIN_TARGETS]:
        raise ValueError(
            f"finetune.targets {', '.join(plain)}: never ternary, so finetune.method ternary_lora has nothing to flip "
            "there; leave it out, or set finetune.method to lora"
        )
