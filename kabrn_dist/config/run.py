"""The whole configuration: one frozen section per component, unknown keys refused, every field documented.

Nothing in this package imports torch, so mistakes are reported before anything heavy starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from kabrn_dist.config import checks
from kabrn_dist.config.data import DataConfig
from kabrn_dist.config.finetune import FinetuneConfig
from kabrn_dist.config.finetune_checks import check_finetune
from kabrn_dist.config.model import ModelConfig
from kabrn_dist.config.optimizer import OptimizerConfig
from kabrn_dist.config.parallel import ParallelConfig
from kabrn_dist.config.training import CheckpointConfig, GuardConfig, TrainingConfig, ValidationConfig
from kabrn_dist.utils.yaml_section import ConfigSection


class RunConfig(ConfigSection):
    """Where the run lives and how it starts and ends."""

    folder: Path = Field(description="Folder for config.yaml, log.jsonl, tensorboard/ and checkpoints/.")
    seed: int = Field(1, ge=0, description="Seed of the initial weights and of the data order.")
    max_minutes: float | None = Field(
        None, gt=0, description="Time limit of a session in minutes; the run saves and stops when it is reached."
    )
    init_from: Path | None = Field(
        None,
        description="Folder of another run. If this run has no checkpoint yet, it starts from the other run's newest "
        "one, grown to this configuration if it has more experts, mixtures in place of dense layers, or finer grids.",
    )


class Config(ConfigSection):
    """The configuration of a training run.

    Attributes:
        version: Version of the keys; see `kabrn_dist.config.migrate`.
        run: Folder, seed and limits.
        data: Shard sets.
        model: Architecture.
        finetune: Adaptation of a trained model; None for training from the start.
        parallel: Layout over ranks.
        optimizer: AdamW and its schedule.
        training: Steps and batch sizes.
        validation: Evaluation during training.
        checkpoint: Saving.
        guard: Reaction to bad steps and hangs.
    """

    version: Literal[2] = Field(
        2, description="Version of the keys. Files of earlier versions are converted when they are read."
    )
    run: RunConfig
    data: DataConfig
    model: ModelConfig
    finetune: FinetuneConfig | None = Field(
        None, description="Adaptation of a trained model; left out in training from the start."
    )
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig
    training: TrainingConfig
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()

    @model_validator(mode="after")
    def _check_sections(self) -> Config:
        checks.check_shard_ternary(self)
        checks.check_ends_quantized(self)
        checks.check_stage_order(self.optimizer, self.training.steps)
        check_finetune(self)
        return self

    def gradient_accumulation_steps(self, world_size: int) -> int:
        """Return the number of micro-batches per rank and optimizer step on `world_size` processes."""
        data_ranks = world_size // self.parallel.sequence_parallel
        return self.training.global_batch_size // (self.training.micro_batch_size * data_ranks)

    def check_world_size(self, world_size: int) -> None:
        """Refuse a configuration that cannot run on `world_size` processes.

        Raises:
            UserError: with the numbers and the nearest ones that work.
        """
        checks.check_world_size(self, world_size)
