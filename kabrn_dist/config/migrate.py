"""Configurations of earlier versions: convert them to the current keys when they are read.

A configuration names its version in the key `version`, which `dump_config` writes. A file without it counts as
version 1 if it uses a key that version 2 renamed, and as current otherwise, so nobody has to write the key by hand.
"""

from __future__ import annotations

import copy
from typing import Any

from kabrn_dist.utils.errors import UserError

CURRENT_VERSION = 2

RENAMED_KEYS = {
    "run.start_from": "run.init_from",
    "guard.max_minutes": "run.max_minutes",
    "data.also": "data.extra_sets",
    "data.cache": "data.cache_dir",
    "data.cache_gb": "data.cache_size_gb",
    "model.vocabulary": "model.vocab_size",
    "model.width": "model.hidden_size",
    "model.convolution": "model.short_conv_size",
    "model.quantise": "model.quantize",
    "model.quantise_from": "model.quantize_start_step",
    "model.quantise_warmup": "model.quantize_warmup_steps",
    "model.scale_group": "model.scale_group_size",
    "model.activations": "model.activation_checkpointing",
    "model.retention.heads": "model.retention.num_heads",
    "model.retention.key_width": "model.retention.key_dim",
    "model.retention.value_width": "model.retention.value_dim",
    "model.retention.chunk": "model.retention.chunk_size",
    "model.experts.form": "model.experts.type",
    "model.experts.routed": "model.experts.num_experts",
    "model.experts.shared": "model.experts.num_shared_experts",
    "model.experts.hidden": "model.experts.expert_hidden_size",
    "model.experts.every": "model.experts.moe_layer_interval",
    "model.experts.first_dense": "model.experts.num_dense_layers",
    "model.experts.dense_hidden": "model.experts.dense_hidden_size",
    "model.experts.capacity": "model.experts.capacity_factor",
    "model.experts.groups": "model.experts.function_groups",
    "model.experts.grid": "model.experts.grid_size",
    "model.experts.degree": "model.experts.spline_order",
    "model.experts.range": "model.experts.grid_range",
    "model.router.score": "model.router.score_func",
    "model.router.renormalise": "model.router.norm_topk_prob",
    "model.router.groups": "model.router.n_group",
    "model.router.groups_per_token": "model.router.topk_group",
    "model.router.bias_rate": "model.router.bias_update_rate",
    "model.router.balance": "model.router.seq_aux_loss_weight",
    "model.router.global_balance": "model.router.global_aux_loss_weight",
    "model.router.z": "model.router.z_loss_weight",
    "model.router.jitter": "model.router.jitter_eps",
    "parallel.sequence": "parallel.sequence_parallel",
    "parallel.exchange": "parallel.state_exchange",
    "parallel.expert": "parallel.expert_parallel",
    "parallel.wire": "parallel.dispatch_dtype",
    "parallel.wire_backward": "parallel.dispatch_grad_dtype",
    "parallel.node": "parallel.ranks_per_node",
    "parallel.bitlinear_shards": "parallel.shard_ternary",
    "parallel.bitlinear_packing": "parallel.ternary_wire_format",
    "parallel.zero": "parallel.zero_stage",
    "parallel.bucket": "parallel.bucket_size",
    "optimizer.final": "optimizer.min_lr_ratio",
    "optimizer.warmup": "optimizer.warmup_steps",
    "optimizer.decay": "optimizer.lr_schedule",
    "optimizer.second_stage.at": "optimizer.second_stage.start_fraction",
    "optimizer.epsilon": "optimizer.eps",
    "optimizer.coefficient_rate": "optimizer.function_lr_ratio",
    "optimizer.clip": "optimizer.max_grad_norm",
    "training.batch": "training.global_batch_size",
    "training.micro_batch": "training.micro_batch_size",
    "training.log_every": "training.log_interval",
    "validation.every": "validation.eval_interval",
    "validation.sequences": "validation.eval_sequences",
    "checkpoint.every": "checkpoint.save_interval",
    "checkpoint.keep": "checkpoint.keep_last",
    "checkpoint.background": "checkpoint.async_save",
    "guard.stop_code": "guard.stop_exit_code",
    "guard.bad_steps": "guard.max_bad_steps",
    "guard.hang_seconds": "guard.hang_timeout_s",
}


def migrate(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration `tree` with the keys and meanings of the current version.

    Args:
        tree: sections and keys as YAML or JSON has them, of this version or an earlier one; it is not changed.

    Returns:
        A new tree whose `version` is the current one. Values are not validated.

    Raises:
        UserError: for a version that this code does not know, or a key that is given under both its names.
    """
    tree = copy.deepcopy(tree)
    version = detect_version(tree)
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= CURRENT_VERSION:
        raise UserError(
            f"version {version!r} is unknown to this code, which reads versions 1 to {CURRENT_VERSION}; "
            "update MixKABRN, or remove the key if you wrote the file by hand"
        )
    if version == 1:
        for old, new in RENAMED_KEYS.items():
            _move(tree, old, new)
    return {**tree, "version": CURRENT_VERSION}


def detect_version(tree: dict[str, Any]) -> Any:
    """Return `tree`'s `version`; without one, 1 if it has a key of version 1 and the current version otherwise."""
    if "version" in tree:
        return tree["version"]
    return 1 if any(_parent(tree, key) is not None for key in RENAMED_KEYS) else CURRENT_VERSION


def rename_hint(key: str, value: str = "") -> str | None:
    """Return how a message explains that `key` is one of version 1, or None for any other key.

    Args:
        key: the dotted key, such as `training.batch`.
        value: "=value" as it was given on the command line, repeated in the remedy.
    """
    new = RENAMED_KEYS.get(key)
    if new is None:
        return None
    if new == "model.short_conv_size":
        return f"was renamed to {new}, which counts one token more (convolution: 3 is short_conv_size: 4); use {new}"
    return f"was renamed to {new}; use {new}{value}"


def _move(tree: dict[str, Any], old: str, new: str) -> None:
    section = _parent(tree, old)
    if section is None:
        return
    *parents, last = new.split(".")
    target: Any = tree
    for name in parents:
        target = target.setdefault(name, {}) if isinstance(target, dict) else None
    if not isinstance(target, dict):
        # The value in the section's place is reported by the validation.
        return
    if last in target:
        raise UserError(f"{old} is the old name of {new}, and both are given; remove {old}")
    value = section.pop(old.rsplit(".", 1)[1])
    target[last] = _kernel_size(value) if new == "model.short_conv_size" else value


def _parent(tree: dict[str, Any], key: str) -> dict[str, Any] | None:
    """The section that holds `key`, or None."""
    *parents, last = key.split(".")
    section: Any = tree
    for name in parents:
        section = section.get(name) if isinstance(section, dict) else None
    return section if isinstance(section, dict) and last in section else None


def _kernel_size(tokens_before: Any) -> Any:
    """Version 1 counted the tokens before the current one; values that were never valid stay as they are."""
    if isinstance(tokens_before, bool):
        return tokens_before
    try:
        size = int(tokens_before)
        return size + 1 if size > 0 and size == float(tokens_before) else tokens_before
    except (TypeError, ValueError, OverflowError):
        return tokens_before
