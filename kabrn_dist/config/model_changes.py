"""Differences between two sections `model`: which of them make another model of the same weights."""

from __future__ import annotations

from typing import Any

from kabrn_dist.config.model import ModelConfig

# These affect training, not what the model computes.
TRAINING_KEYS = {
    "activation_checkpointing",
    "retention.chunk_size",
    *(
        f"router.{key}"
        for key in ("bias_update_rate", "seq_aux_loss_weight", "global_aux_loss_weight", "z_loss_weight", "jitter_eps")
    ),
}
# What may change within a run: it decides about training, not about the trained model.
FREE_MODEL_KEYS = TRAINING_KEYS | {"quantize_start_step", "quantize_warmup_steps"}


def describe_other_model(trained: ModelConfig, given: ModelConfig) -> str:
    """Return which keys of `given` would make another model of the weights of `trained`; "" if none does."""
    before, now = flatten_model(trained), flatten_model(given)
    return ", ".join(
        f"model.{key} is {now[key]}, and {value} in what was trained"
        for key, value in before.items()
        if key not in FREE_MODEL_KEYS and now[key] != value
    )


def flatten_model(model: ModelConfig) -> dict[str, Any]:
    """Return the values of a section `model` by their dotted keys, as JSON has them."""
    flat: dict[str, Any] = {}
    for key, value in model.model_dump(mode="json").items():
        flat |= {f"{key}.{name}": part for name, part in value.items()} if isinstance(value, dict) else {key: value}
    return flat
