"""The configuration: frozen sections, one class each."""

from kabrn_dist.config.run import (
    CheckpointConfig,
    Config,
    DataConfig,
    ExpertsConfig,
    ExtraSetConfig,
    GuardConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RetentionConfig,
    RouterConfig,
    SecondStageConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "ExpertsConfig",
    "ExtraSetConfig",
    "GuardConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RetentionConfig",
    "RouterConfig",
    "SecondStageConfig",
]
