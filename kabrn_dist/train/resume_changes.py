"""Differences between the configuration of a checkpoint and the one that a session resumes it with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kabrn_dist.checkpoint.state import RunState, read_model
from kabrn_dist.config import Config, OptimizerConfig
from kabrn_dist.config.migrate import migrate
from kabrn_dist.config.model_changes import FREE_MODEL_KEYS
from kabrn_dist.train.schedule import learning_rate
from kabrn_dist.utils.errors import UserError

# What decides which parameters a fine-tuning trains, and what they mean.
FINETUNE_KEYS = ("finetune.method", "finetune.rank", "finetune.alpha", "finetune.targets")


def describe_changes(path: Path, state: RunState, config: Config) -> list[str]:
    """Return lines about what a session changes in the run that it resumes; none if nothing is changed.

    Args:
        path: the checkpoint.
        state: its state.
        config: the configuration of the session.

    Raises:
        UserError: for changes that would make another model of the checkpoint's weights.
    """
    before = _flatten({**migrate(dict(state.config)), "model": read_model(path, state).model_dump(mode="json")})
    after = _flatten(config.model_dump(mode="json"))
    changed = [
        (key, before[key], value)
        for key, value in after.items()
        if key not in ("version", "run.folder") and key in before and before[key] != value
    ]
    refused = [
        change
        for change in changed
        if change[0].startswith("model.") and change[0].removeprefix("model.") not in FREE_MODEL_KEYS
    ]
    if refused:
        told = ", ".join(
            f"{key} is {_show(then)} in the checkpoint and {_show(now)} here" for key, then, now in refused
        )
        remedy = ", ".join(f"{key} to {_show(then)}" for key, then, _ in refused)
        is_vocabulary = any(key == "model.vocab_size" for key, _, _ in refused)
        data = " and data.path to the shards that it has begun with" if is_vocabulary else ""
        raise UserError(
            f"{path}: {told}, and a run keeps its model; set {remedy}{data}, or set run.folder to another folder to "
            "start anew"
        )
    _refuse_other_finetune(path, before, after)
    lines = [f"changed since the checkpoint: {key} {_show(then)} → {_show(now)}" for key, then, now in changed]
    if config.run.init_from is not None and any(key == "run.init_from" for key, _, _ in changed):
        lines.append("run.init_from has no effect, as this run has begun; set run.folder to another folder to grow it")
    return lines + _describe_schedule(state, before, config)


def _refuse_other_finetune(path: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Refuse a session that would train other parameters than the checkpoint holds."""
    was, now = ("finetune.method" in flat for flat in (before, after))
    if was != now:
        told = "is of a fine-tuning" if was else "is of a run that trains its model from the start"
        remedy = "restore the section finetune" if was else "name that run in finetune.base"
        raise UserError(f"{path}: {told}; {remedy}, or set run.folder to another folder to start anew")
    # Of `full`, only the method says what is trained.
    keys = FINETUNE_KEYS if before.get("finetune.method") != "full" else FINETUNE_KEYS[:1]
    changed = [key for key in keys if before.get(key) != after.get(key)]
    if changed:
        told = ", ".join(
            f"{key} is {_show(before[key])} in the checkpoint and {_show(after[key])} here" for key in changed
        )
        remedy = ", ".join(f"{key} to {_show(before[key])}" for key in changed)
        raise UserError(
            f"{path}: {told}, and a run keeps what it trains; set {remedy}, or set run.folder to another folder to "
            "start anew"
        )


def _describe_schedule(state: RunState, before: dict[str, Any], config: Config) -> list[str]:
    step, steps = state.step, config.training.steps
    if step > steps:
        return [f"training.steps {steps} is less than the {step} steps done: nothing is left to train"]
    try:
        old = OptimizerConfig.model_validate(_unflatten(before, "optimizer"))
        rates = learning_rate(step, int(before["training.steps"]), old), learning_rate(step, steps, config.optimizer)
    except (ValidationError, KeyError, TypeError, ValueError):
        # A schedule that this version refuses cannot be compared, and need not be: it is not used.
        return []
    if step == steps or rates[0] == rates[1]:
        return []
    return [f"the learning rate of step {step + 1} is {rates[1]:.3e}; by the schedule so far it was {rates[0]:.3e}"]


def _flatten(tree: dict[str, Any], parent: str = "") -> dict[str, Any]:
    """Values by their dotted keys; lists are values, and so are mappings in place of a value, such as data.weights."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{parent}{key}"
        is_section = isinstance(value, dict) and name not in ("data.weights", "data.epochs")
        flat |= _flatten(value, f"{name}.") if is_section else {name: value}
    return flat


def _unflatten(flat: dict[str, Any], section: str) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        if key.startswith(f"{section}."):
            *parents, last = key.split(".")[1:]
            inner = tree
            for parent in parents:
                inner = inner.setdefault(parent, {})
            inner[last] = value
    return tree


def _show(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
