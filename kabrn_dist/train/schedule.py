"""Learning rate and weight decay as pure functions of the step, so that a resumed run has nothing to restore."""

from __future__ import annotations

import math

from kabrn_dist.config import OptimizerConfig


def learning_rate(step: int, steps: int, settings: OptimizerConfig) -> float:
    """Learning rate of `step` (0 is the first) of `steps`.

    With W steps of warm-up, p = (step − W) / (steps − W) and f = `final`:

        step < W:  peak · (step + 1) / W
        linear:    peak of the stage · (1 − (1 − f) · p)
        cosine:    peak of the stage · (f + (1 − f) · (1 + cos πp) / 2)

    The decay spans the whole run; a second stage only has another peak, so the rate drops where it begins. Source of
    the two stages: "The Era of 1-bit LLMs: Training Tips, Code and FAQ" (microsoft/unilm, bitnet), which has them with
    the linear decay and f = 0.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    second = settings.second_stage
    peak = second.learning_rate if second and step >= settings.second_stage_step(steps) else settings.learning_rate
    progress = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    left = 1 - progress if settings.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * left)


def weight_decay(step: int, steps: int, settings: OptimizerConfig) -> float:
    """Weight decay of `step` (0 is the first) of `steps`: constant in each stage (same source: 0.1, then 0)."""
    second = settings.second_stage
    return second.weight_decay if second and step >= settings.second_stage_step(steps) else settings.weight_decay
