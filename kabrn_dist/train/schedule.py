"""The learning rate as a pure function of the step, so that a resumed run has nothing to restore."""

from __future__ import annotations

import math

from kabrn_dist.config import Optimizer


def learning_rate(step: int, steps: int, settings: Optimizer) -> float:
    """Learning rate of `step` (0 is the first) of `steps`: linear warm-up, then a cosine down to `final`."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, steps - settings.warmup)
    share = settings.final + (1 - settings.final) * 0.5 * (1 + math.cos(math.pi * progress))
    return settings.learning_rate * share
