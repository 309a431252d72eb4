"""Settings that have no effect where they stand: valid, but hardly what was meant, so a run says them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kabrn_dist.utils.yaml_section import ConfigSection

if TYPE_CHECKING:
    from kabrn_dist.config.run import Config


def list_idle_settings(config: Config, world_size: int) -> list[str]:
    """Return a line for each setting that differs from its default and has no effect.

    Args:
        config: the whole configuration.
        world_size: number of processes.
    """
    return [
        f"{section}.{key} {_show(getattr(values, key))} has no effect: {reason}"
        for section, values, key, reason in _conditions(config, world_size)
        if getattr(values, key) != type(values).model_fields[key].default
    ] + _list_schedule(config)


def _conditions(config: Config, world_size: int) -> Iterator[tuple[str, ConfigSection, str, str]]:
    """Keys whose condition is not met: section, its values, key, and the reason."""
    for section, values, keys, is_used, reason in [
        *_parallel_conditions(config, world_size),
        *_model_conditions(config),
        *_other_conditions(config),
    ]:
        if not is_used:
            yield from ((section, values, key, reason) for key in keys.split())


def _parallel_conditions(config: Config, world_size: int) -> list[tuple[str, ConfigSection, str, bool, str]]:
    parallel = config.parallel
    experts = "experts_per_rank rank_weights dispatch_dtype dispatch_grad_dtype ranks_per_node"
    return [
        ("parallel", parallel, experts, parallel.expert_parallel > 1, "parallel.expert_parallel is 1"),
        ("parallel", parallel, "state_exchange", parallel.sequence_parallel > 1, "parallel.sequence_parallel is 1"),
        ("parallel", parallel, "shard_ternary", world_size > 1, "there is one process"),
        ("parallel", parallel, "ternary_wire_format", parallel.shard_ternary, "parallel.shard_ternary is false"),
        (
            "parallel",
            parallel,
            "bucket_size",
            parallel.zero_stage > 0 or parallel.shard_ternary,
            "parallel.zero_stage is 0",
        ),
    ]


def _model_conditions(config: Config) -> list[tuple[str, ConfigSection, str, bool, str]]:
    model, router, experts = config.model, config.model.router, config.model.experts
    kind, has_mixtures = f"model.experts.type is {experts.type}", bool(model.moe_layers)
    none = "no layer has a mixture"
    groups = router.topk_group is not None and router.topk_group < router.n_group
    losses = "bias_update_rate seq_aux_loss_weight global_aux_loss_weight z_loss_weight jitter_eps"
    shared = "capacity_factor num_shared_experts"
    has_grid = experts.type in ("hat", "bspline")
    return [
        ("model.experts", experts, "function_groups", experts.type in ("rational", "chebyshev"), kind),
        ("model.experts", experts, "grid_size", has_grid, kind),
        ("model.experts", experts, "spline_order", experts.type == "bspline", kind),
        ("model.experts", experts, "grid_range", has_grid or experts.type == "chebyshev", kind),
        ("model.experts", experts, "dense_hidden_size", model.has_dense_layers, "no layer is dense"),
        ("model.experts", experts, shared, has_mixtures, none),
        ("model.router", router, losses, has_mixtures, none),
        ("model.router", router, "n_group", groups, "model.router.topk_group does not limit the groups"),
        ("model.router", router, "topk_group", groups, f"there are {router.n_group} groups in all"),
        ("model", model, "scale_group_size", model.quantize, "model.quantize is false"),
        ("model.retention", model.retention, "decay chunk_size", "R" in model.layers, "no layer is retention"),
    ]


def _other_conditions(config: Config) -> list[tuple[str, ConfigSection, str, bool, str]]:
    optimizer, guard, data, checkpoint = config.optimizer, config.guard, config.data, config.checkpoint
    learns = config.model.experts.type not in ("swiglu", "relu2")
    remote = any("://" in path for path in (data.path, *(extra.path for extra in data.extra_sets)))
    kept = checkpoint.save_interval > 0
    validation, tasks = config.validation, "task_data task_interval task_examples"
    return [
        ("optimizer", optimizer, "function_lr_ratio", learns, f"model.experts.type is {config.model.experts.type}"),
        ("guard", guard, "spike_sigma spike_window", guard.spike != "off", "guard.spike is off"),
        ("data", data, "cache_dir cache_size_gb", remote, "no shard set is a URL"),
        ("checkpoint", checkpoint, "keep_every", kept, "checkpoint.save_interval is 0"),
        ("validation", validation, tasks, bool(validation.tasks), "validation.tasks names none"),
    ]


def _list_schedule(config: Config) -> list[str]:
    warmup, steps = config.optimizer.warmup_steps, config.training.steps
    if warmup < steps or not warmup:
        return []
    return [
        f"optimizer.warmup_steps {warmup} is not less than training.steps {steps}: the run ends in its warm-up, at "
        f"{steps / warmup:.0%} of optimizer.learning_rate at most"
    ]


def _show(value: Any) -> str:
    return (
        str(list(value)) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else str(value)
    )
