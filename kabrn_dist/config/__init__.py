"""The configuration: frozen sections, one class each."""

from kabrn_dist.config.run import (
    Checkpoint,
    Config,
    Data,
    Experts,
    Guard,
    MixedSet,
    Model,
    Optimizer,
    Parallel,
    Retention,
    Router,
    SecondStage,
)

__all__ = [
    "Checkpoint",
    "Config",
    "Data",
    "Experts",
    "Guard",
    "MixedSet",
    "Model",
    "Optimizer",
    "Parallel",
    "Retention",
    "Router",
    "SecondStage",
]
