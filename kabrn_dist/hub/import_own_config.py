"""config.json of an exported model as the section `model` of a run: the inverse of kabrn_dist/hub/model_config.py."""

from __future__ import annotations

from fractions import Fraction
from math import prod
from typing import Any

from pydantic import ValidationError

from kabrn_dist.config import ModelConfig
from kabrn_dist.config.model import MAX_LAYERS
from kabrn_dist.hub.import_source import CONFIG_NAME, ForeignModel
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.mistakes import explain_errors

# Steps from a plain model to a ternary one, where the export does not say.
WARMUP_START, WARMUP_STEPS = 100, 500
MAX_STEP = 10**9 - 10**6
# Schedules of quantization are at most so long.
_MAX_WARMUP = 10**7
_SIZES = {
    "retention": {"num_heads": "num_heads", "key_dim": "key_dim", "value_dim": "value_dim", "chunk_size": "chunk_size"},
    "experts": {
        "type": "expert_type",
        "num_experts": "num_experts",
        "num_shared_experts": "num_shared_experts",
        "top_k": "num_experts_per_tok",
        "expert_hidden_size": "expert_hidden_size",
        "dense_hidden_size": "dense_hidden_size",
        "function_groups": "function_groups",
        "grid_size": "grid_size",
        "spline_order": "spline_order",
        "grid_range": "grid_range",
    },
    "router": {key: key for key in ("score_func", "norm_topk_prob", "n_group", "topk_group")},
}
_TOP = ("vocab_size", "hidden_size", "layers", "short_conv_size", "quantize", "scale_group_size")
# Sizes that no tensor has.
_FREE_SIZES = ("chunk_size", "scale_group_size")


def read_step(source: ForeignModel) -> int:
    """Return the optimizer steps of the weights.

    Raises:
        UserError: for another value than a step.
    """
    step = source.get("step", default=0)
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step <= MAX_STEP:
        raise UserError(f"{source.folder / CONFIG_NAME}: step is {str(step)[:40]}, no step; get the folder again")
    return step


def read_model_section(source: ForeignModel) -> ModelConfig:
    """Return the model that config.json describes. No memory is taken for its weights.

    Args:
        source: The exported model.

    Raises:
        UserError: for a key that is missing or wrong, or a size that the weights cannot have.
    """
    section: dict[str, Any] = {key: _value(source, key) for key in _TOP}
    _check_layers(source, section["layers"])
    for name, keys in _SIZES.items():
        section[name] = {ours: _value(source, theirs) for ours, theirs in keys.items()}
    section["retention"]["decay"] = _name_decay(_value(source, "decay"), section["retention"]["num_heads"])
    section["experts"] |= _find_moe_layers(source, len(section["layers"]))
    section |= _find_schedule(source, read_step(source))
    try:
        model = ModelConfig.model_validate(section)
    except ValidationError as error:
        mistakes = "; ".join(mistake.text for mistake in explain_errors(error, ModelConfig))
        raise UserError(
            f"{source.folder / CONFIG_NAME}: describes no model ({mistakes}); get the folder again"
        ) from None
    experts = model.experts
    if experts.dense_hidden_size == experts.expert_hidden_size * (experts.num_shared_experts + experts.top_k):
        model = model.model_copy(update={"experts": experts.model_copy(update={"dense_hidden_size": None})})
    return model


def _value(source: ForeignModel, key: str) -> Any:
    """The value of a key, which is there; a size is none that the weights have not."""
    if key not in source.config:
        raise UserError(f"{source.folder / CONFIG_NAME}: has no key {key!r}; get the folder again")
    value = source.config[key]
    limit = sum(prod(entry.shape) * (4 if entry.dtype == "U8" else 1) for _, entry in source.tensors.values())
    if isinstance(value, int) and key not in _FREE_SIZES and value > max(limit, 1):
        raise UserError(
            f"{source.folder / CONFIG_NAME}: {key} is {str(value)[:40]}, and all weights together are {limit} numbers; "
            "get the folder again"
        )
    return value


def _check_layers(source: ForeignModel, layers: Any) -> None:
    if not isinstance(layers, str) or not 0 < len(layers) <= MAX_LAYERS or set(layers) - {"R", "A"}:
        raise UserError(
            f"{source.folder / CONFIG_NAME}: layers is {str(layers)[:40]!r}, not a letter R or A for each layer; get "
            "the folder again"
        )
    held = {name.split(".")[2] for name in source.tensors if name.startswith("model.blocks.")}
    if held != set(map(str, range(len(layers)))):
        raise UserError(
            f"{source.folder / CONFIG_NAME}: layers has {len(layers)} letters, and the weights have {len(held)} "
            "layers; get the folder again"
        )


def _name_decay(decay: Any, heads: Any) -> Any:
    """The schedule by its name, if it has one; the pair of a schedule of many heads is none of its own."""
    if isinstance(heads, int) and decay == [5.0, 4.0 + heads]:
        return "exponent"
    return "linspace" if decay == [5.0, 9.0] else decay


def _find_moe_layers(source: ForeignModel, count: int) -> dict[str, int]:
    """Interval and leading dense layers that give the layers with a mixture."""
    found = _value(source, "moe_layers")
    if found == []:
        return {"moe_layer_interval": 1, "num_dense_layers": count}
    if isinstance(found, list) and all(isinstance(layer, int) and 0 <= layer < count for layer in found):
        interval = found[1] - found[0] if len(found) > 1 else count - found[0]
        leading = found[0] - interval + 1
        if interval > 0 and leading >= 0 and found == list(range(found[0], count, interval)):
            return {"moe_layer_interval": interval, "num_dense_layers": leading}
    raise UserError(
        f"{source.folder / CONFIG_NAME}: moe_layers is {str(found)[:60]}, not every n-th of {count} layers after the "
        "first dense ones; get the folder again"
    )


def _find_schedule(source: ForeignModel, step: int) -> dict[str, int]:
    """The slowest schedule that has quantized the weights, at their step, as far as they are."""
    lam = _value(source, "quantization")
    if not isinstance(lam, int | float) or isinstance(lam, bool) or not 0 <= lam <= 1:
        raise UserError(f"{source.folder / CONFIG_NAME}: quantization is {str(lam)[:40]}, not 0 to 1; get it again")
    if not source.config.get("quantize") or lam == 1:
        return {}
    if lam == 0:
        return {"quantize_start_step": step + WARMUP_START, "quantize_warmup_steps": WARMUP_STEPS}
    part = Fraction(lam).limit_denominator(_MAX_WARMUP)
    times = (step + 1) // part.numerator if part.numerator else 0
    if not times or part.numerator / part.denominator != lam:
        raise UserError(
            f"{source.folder / CONFIG_NAME}: quantization is {lam} at step {step}, which no schedule gives; get the "
            "folder again"
        )
    # Never more steps than the longest schedule.
    times = min(times, max(1, _MAX_WARMUP // part.denominator))
    done = part.numerator * times
    return {"quantize_start_step": step + 1 - done, "quantize_warmup_steps": part.denominator * times - 1}
