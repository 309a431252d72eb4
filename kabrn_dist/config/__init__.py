"""The configuration: frozen sections, one class each, read from YAML. Imports no torch."""

from kabrn_dist.config.data import DataConfig, ExtraSetConfig
from kabrn_dist.config.model import ExpertsConfig, ModelConfig, RetentionConfig, RouterConfig
from kabrn_dist.config.optimizer import OptimizerConfig, SecondStageConfig
from kabrn_dist.config.parallel import ParallelConfig
from kabrn_dist.config.run import Config, RunConfig
from kabrn_dist.config.training import CheckpointConfig, GuardConfig, TrainingConfig, ValidationConfig

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
    "RunConfig",
    "SecondStageConfig",
    "TrainingConfig",
    "ValidationConfig",
]
