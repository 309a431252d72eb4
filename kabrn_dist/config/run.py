"""What can be set: one frozen section per component, unknown keys refused, every field documented.

Nothing here imports torch, so a mistake is reported before anything heavy starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from kabrn_dist.config.model import (
    ExpertsConfig,
    ModelConfig,
    RetentionConfig,
    RouterConfig,
    divisors,
    join,
)
from kabrn_dist.config.optimizer import OptimizerConfig, SecondStageConfig
from kabrn_dist.config.parallel import ParallelConfig
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.yaml_section import ConfigSection

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


class RunConfig(ConfigSection):
    folder: Path = Field(description="Where config.yaml, log.jsonl, tensorboard/ and checkpoints/ are written.")
    seed: int = Field(1, ge=0, description="Seeds the initial weights and the order of the data.")
    max_minutes: float | None = Field(
        None, gt=0, description="Time limit of a session in minutes; the run saves and stops when it is reached."
    )
    init_from: Path | None = Field(
        None,
        description="Another run's folder: a run without a checkpoint of its own starts from that one's newest, grown "
        "to this configuration where it has more experts, mixtures for dense layers, or finer grids.",
    )


class ExtraSetConfig(ConfigSection):
    """One more shard set that training draws from."""

    path: str = Field(description="Folder or URL of shards and index.json.")
    weight: float = Field(1.0, gt=0, description="Multiplies the weights of its sources.")


class DataConfig(ConfigSection):
    path: str = Field(
        description="Folder of shards and index.json, made by `python -m data_prep`; or its URL: s3://, gs://, "
        "http(s)://, hf://."
    )
    sequence_length: int = Field(ge=2, description="Tokens in one training sequence.")
    extra_sets: tuple[ExtraSetConfig, ...] = Field(
        (), description="More shard sets of the same tokenizer, drawn from by weight."
    )
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, description="Source name: share of the sequences, in any unit; overrides the index's."
    )
    epochs: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="Source name: passes after which it is drawn from no more; overrides."
    )
    cache_dir: Path = Field(Path("data/cache"), description="Where shards of a URL are kept on this machine.")
    cache_size_gb: float = Field(20.0, gt=0, description="Most that the cache holds, in GB.")


class TrainingConfig(ConfigSection):
    steps: PositiveInt = Field(description="Optimizer steps of the whole run.")
    global_batch_size: PositiveInt = Field(description="Sequences of one optimizer step, over all ranks.")
    micro_batch_size: PositiveInt = Field(description="Sequences of one forward pass on one rank.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Working copy of weights and activations; masters are fp32. fp16 scales the loss."
    )
    log_interval: PositiveInt = Field(1, description="Steps between lines of the console, log.jsonl and TensorBoard.")


class ValidationConfig(ConfigSection):
    eval_interval: int = Field(100, ge=0, description="Steps between validations; 0 validates at the end only.")
    eval_sequences: PositiveInt = Field(256, description="Sequences of the validation split that are scored.")


class CheckpointConfig(ConfigSection):
    save_interval: int = Field(
        500, ge=0, description="Steps between checkpoints; 0 saves at the end and when stopped only."
    )
    keep_last: int = Field(2, ge=2, description="Newest checkpoints kept.")
    keep_every: int = Field(0, ge=0, description="Also keep each checkpoint whose step this divides; 0: none.")
    async_save: bool = Field(
        True, description="Write in a thread while training goes on; costs a copy in host memory of what a rank owns."
    )


class GuardConfig(ConfigSection):
    """What is watched while a run goes on, and what is done about it."""

    stop_exit_code: int = Field(
        0, ge=0, le=125, description="Exit code when stopped before the end; 75 asks many schedulers to requeue."
    )
    max_bad_steps: PositiveInt = Field(
        5,
        description="Steps in a row with a non-finite loss or gradient, each of them skipped, after which the run goes "
        "back to its last checkpoint and passes over the data since.",
    )
    spike: Literal["off", "warn", "skip"] = Field(
        "warn",
        description="What is done about a spike of the loss; more than max_bad_steps in a row are taken for a new level.",
    )
    spike_sigma: float = Field(6.0, gt=0, description="A loss this many standard deviations above the mean is a spike.")
    spike_window: int = Field(128, ge=8, description="Steps that this mean and deviation are taken over.")
    hang_timeout_s: float = Field(
        1800.0, ge=0, description="A rank that ends no step for so long prints all its stacks and dies; 0: never."
    )


class Config(ConfigSection):
    version: Literal[2] = Field(
        2, description="Version of the keys; files of earlier versions are converted when they are read."
    )
    run: RunConfig
    data: DataConfig
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig
    training: TrainingConfig
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()

    @model_validator(mode="after")
    def _check_shard_ternary(self) -> Config:
        if not self.parallel.shard_ternary:
            return self
        if self.parallel.zero_stage != 1:
            raise ValueError(
                f"parallel.shard_ternary shares out ternary matrices itself and leaves the rest to ZeRO 1, not to "
                f"parallel.zero_stage {self.parallel.zero_stage}; set parallel.zero_stage to 1, or shard_ternary to false"
            )
        if not self.model.quantize:
            raise ValueError(
                "parallel.shard_ternary sends ternary codes, but model.quantize is false; set shard_ternary to "
                "false, or quantise to true"
            )
        if self.model.first_quantized_step:
            raise ValueError(
                f"parallel.shard_ternary sends ternary codes, but the first {self.model.first_quantized_step} steps "
                "(model.quantize_start_step + quantize_warmup_steps) are not wholly ternary; train these with shard_ternary "
                "false, then set both to 0 and resume with shard_ternary true"
            )
        return self

    @model_validator(mode="after")
    def _check_ends_quantized(self) -> Config:
        at, steps = self.model.first_quantized_step, self.training.steps
        if at >= steps:
            raise ValueError(
                f"model.quantize_start_step {self.model.quantize_start_step} + quantize_warmup_steps {self.model.quantize_warmup_steps} = {at} "
                f"leaves none of training.steps {steps} quantised; let them end before step {steps}"
            )
        return self

    @model_validator(mode="after")
    def _check_stage_order(self) -> Config:
        self.optimizer.check_stage_order(self.training.steps)
        return self

    def gradient_accumulation_steps(self, world_size: int) -> int:
        """Micro-batches per rank and optimizer step."""
        return self.training.global_batch_size // (
            self.training.micro_batch_size * (world_size // self.parallel.sequence_parallel)
        )

    def expert_counts(self) -> tuple[int, ...]:
        """Routed experts on each rank of an expert group; `auto` is replaced by numbers before (resolve_placement)."""
        counts = self.parallel.experts_per_rank
        if counts is not None and self.parallel.expert_parallel > 1:
            assert counts != "auto", "resolve_placement comes first"
            return counts
        return (self.model.experts.num_experts // self.parallel.expert_parallel,) * self.parallel.expert_parallel

    def check_world_size(self, world_size: int) -> None:
        """Refuse combinations that cannot run on `world` processes.

        Raises:
            UserError: naming the numbers and the nearest that work.
        """
        expert, routed, counts = (
            self.parallel.expert_parallel,
            self.model.experts.num_experts,
            self.parallel.experts_per_rank,
        )
        fits = [e for e in divisors(world_size) if routed % e == 0]
        if world_size % expert:
            raise UserError(
                f"parallel.expert_parallel {expert} does not divide the {world_size} processes; "
                f"it can be {join(fits)}, or start a multiple of {expert} processes"
            )
        if expert > routed:
            raise UserError(
                f"parallel.expert_parallel {expert} ranks cannot each hold one of model.experts.num_experts {routed}; "
                f"set it to {join(fits)}"
            )
        if counts is None and routed % expert:
            raise UserError(
                f"parallel.expert_parallel {expert} does not divide model.experts.num_experts {routed}; set it to "
                f"{join(fits)}, or name the shares in parallel.experts_per_rank, such as "
                f"{_nearest_expert_counts((), expert, routed)}"
            )
        if isinstance(counts, tuple) and (len(counts) != expert or sum(counts) != routed):
            raise UserError(
                f"parallel.experts_per_rank {list(counts)} has {len(counts)} entries that sum to {sum(counts)}; "
                f"it needs parallel.expert_parallel = {expert} entries that sum to model.experts.num_experts = {routed}, such as "
                f"{_nearest_expert_counts(counts, expert, routed)}"
            )
        self._check_sequence(world_size)
        sequence = self.parallel.sequence_parallel
        step = self.training.micro_batch_size * (world_size // sequence)
        if self.training.global_batch_size % step:
            near = _nearest_multiple(self.training.global_batch_size, step)
            over = (
                f"{world_size} processes"
                if sequence == 1
                else f"{world_size} processes / parallel.sequence_parallel {sequence}"
            )
            raise UserError(
                f"training.global_batch_size {self.training.global_batch_size} is not a multiple of training.micro_batch_size "
                f"{self.training.micro_batch_size} × {over} = {step}; set training.global_batch_size to {near}"
            )

    def _check_sequence(self, world: int) -> None:
        sequence, length = self.parallel.sequence_parallel, self.data.sequence_length
        if world % sequence:
            raise UserError(
                f"parallel.sequence_parallel {sequence} does not divide the {world} processes; it can be "
                f"{join(divisors(world))}, or start a multiple of {sequence} processes"
            )
        if length % sequence:
            below = length // sequence * sequence
            near = [n for n in (below, below + sequence) if n >= 2]
            raise UserError(
                f"data.sequence_length {length} cannot be cut into parallel.sequence_parallel {sequence} equal slices; "
                f"the nearest lengths that can: {join(near)}"
            )


def _nearest_multiple(value: int, step: int) -> int:
    return max(step, round(value / step) * step)


def _nearest_expert_counts(counts: tuple[int, ...], ranks: int, routed: int) -> list[int]:
    """As few experts moved as needed for shares that work; from scratch where `counts` is of little help."""
    near = list(counts) if len(counts) == ranks and sum(counts) <= 2 * routed else [1] * ranks
    while sum(near) > routed:
        near[near.index(max(near))] -= 1
    while sum(near) < routed:
        near[near.index(min(near))] += 1
    return near
