"""Schedules of learning rate and weight decay: pure functions of the step, so a resumed run has nothing to restore."""

from __future__ import annotations

import math

from kabrn_dist.config import OptimizerConfig


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of a step.

    With W = `warmup_steps`, p = (step − W) / (steps − W) and f = `min_lr_ratio`:

        step < W:  peak · (step + 1) / W
        linear:    peak of the stage · (1 − (1 − f) · p)
        cosine:    peak of the stage · (f + (1 − f) · (1 + cos πp) / 2)

    The decay spans the whole run; a second stage only has another peak, so the rate drops where it begins. Source of
    the two stages: "The Era of 1-bit LLMs: Training Tips, Code and FAQ" (microsoft/unilm, bitnet), which has them with
    the linear decay and f = 0.

    Args:
        step: the step; 0 is the first.
        steps: steps of the whole run.
        config: the `optimizer` section.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    second = config.second_stage
    peak = second.learning_rate if second and step >= config.second_stage_step(steps) else config.learning_rate
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    left = 1 - progress if config.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)


def weight_decay(step: int, steps: int, config: OptimizerConfig) -> float:
    """Return the weight decay of a step: constant in each stage (same source: 0.1, then 0). Arguments as above."""
    second = config.second_stage
    return second.weight_decay if second and step >= config.second_stage_step(steps) else config.weight_decay
