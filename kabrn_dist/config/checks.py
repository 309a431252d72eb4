"""Rules that involve several keys: one function each, which names the keys, their values and a remedy.

Rules of the configuration alone raise ValueError, which validation turns into a message; rules of the number of
processes raise UserError.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kabrn_dist.utils.errors import UserError

if TYPE_CHECKING:
    from kabrn_dist.config.model import ModelConfig
    from kabrn_dist.config.optimizer import OptimizerConfig
    from kabrn_dist.config.run import Config


MAX_PROCESSES = 1_000_000
# A message lists so many numbers.
MAX_LISTED = 24
# Expert counts further from working than this are not corrected one by one.
MAX_CORRECTION = 1000


def check_function_groups(model: ModelConfig) -> None:
    """Check that groups of channels divide every width that functions are applied to."""
    if model.experts.type not in ("rational", "chebyshev"):
        return
    widths = [
        ("model.hidden_size", model.hidden_size),
        ("model.experts.expert_hidden_size", model.experts.expert_hidden_size),
    ]
    if model.has_dense_layers:
        widths.append(("model.experts.dense_hidden_size", model.dense_hidden_size))
    for name, width in widths:
        if width % model.experts.function_groups:
            common = divisors(math.gcd(*(w for _, w in widths)))
            raise ValueError(
                f"model.experts.function_groups {model.experts.function_groups} does not divide {name} {width}; "
                f"for these widths it can be {join(common)}"
            )


def check_quantize_schedule(model: ModelConfig) -> None:
    """Check that only ternary models schedule their quantization."""
    for name in ("quantize_start_step", "quantize_warmup_steps"):
        if getattr(model, name) and not model.quantize:
            raise ValueError(
                f"model.{name} {getattr(model, name)} is for quantised models; set model.quantize to true, or leave "
                f"{name} out"
            )


def check_scale_groups(model: ModelConfig) -> None:
    """Check that the type of experts supports several scales per matrix."""
    if model.scale_group_size is not None and model.experts.type in ("hat", "bspline"):
        raise ValueError(
            f"model.scale_group_size {model.scale_group_size} is not for model.experts.type {model.experts.type}, "
            "whose matrices have one scale each; leave scale_group_size out, or set model.experts.type to another type"
        )


def check_router_groups(model: ModelConfig) -> None:
    """Check that groups of experts are equal and that the allowed ones hold top_k experts."""
    num_experts, top_k, n_group = model.experts.num_experts, model.experts.top_k, model.router.n_group
    if num_experts % n_group:
        raise ValueError(
            f"model.router.n_group {n_group} does not divide model.experts.num_experts {num_experts}; "
            f"it can be {join(divisors(num_experts))}"
        )
    topk_group = model.router.topk_group
    if topk_group is None:
        return
    if topk_group > n_group:
        raise ValueError(
            f"model.router.topk_group {topk_group} exceeds model.router.n_group {n_group}; set it to {n_group} or less"
        )
    if top_k > topk_group * (num_experts // n_group):
        needed = -(-top_k * n_group // num_experts)
        raise ValueError(
            f"model.router.topk_group {topk_group} groups of {num_experts // n_group} experts hold fewer than "
            f"model.experts.top_k {top_k}; set topk_group to {needed} or more"
        )


def check_shard_ternary(config: Config) -> None:
    """Check that matrices that are sharded as ternary codes are ternary, and that ZeRO leaves them alone."""
    model, parallel = config.model, config.parallel
    if not parallel.shard_ternary:
        return
    if parallel.zero_stage != 1:
        raise ValueError(
            "parallel.shard_ternary shards the ternary matrices itself and leaves the rest to ZeRO 1, not to "
            f"parallel.zero_stage {parallel.zero_stage}; set parallel.zero_stage to 1, or shard_ternary to false"
        )
    if not model.quantize:
        raise ValueError(
            "parallel.shard_ternary sends ternary codes, but model.quantize is false; set shard_ternary to false, or "
            "quantize to true"
        )
    if model.first_quantized_step:
        raise ValueError(
            f"parallel.shard_ternary sends ternary codes, but the first {model.first_quantized_step} steps "
            "(model.quantize_start_step + quantize_warmup_steps) are not wholly ternary; train these with "
            "shard_ternary false, then set both to 0 and resume with shard_ternary true"
        )


def check_ends_quantized(config: Config) -> None:
    """Check that the last step of a run is wholly quantized, as the model in use will be."""
    model, first, steps = config.model, config.model.first_quantized_step, config.training.steps
    if first >= steps:
        raise ValueError(
            f"model.quantize_start_step {model.quantize_start_step} + quantize_warmup_steps "
            f"{model.quantize_warmup_steps} = {first} leaves none of training.steps {steps} quantised; "
            f"let them end before step {steps}"
        )


def check_stage_order(optimizer: OptimizerConfig, steps: int) -> None:
    """Check that warm-up, second stage and the end of a run of `steps` come in this order."""
    stage = optimizer.second_stage
    if stage is None:
        return
    begins, first = optimizer.second_stage_step(steps), max(1, optimizer.warmup_steps)
    if first <= begins < steps:
        return
    if first < steps:
        remedy = f"set start_fraction to {max(0.5, first / steps):.9g}"
    else:
        remedy = f"set training.steps to {2 * first} or more and start_fraction to 0.5"
    raise ValueError(
        f"optimizer.second_stage.start_fraction {stage.start_fraction:g} of training.steps {steps} is step {begins}, "
        f"not after optimizer.warmup_steps {optimizer.warmup_steps} and before the end; {remedy}, or leave out "
        "second_stage"
    )


def check_world_size(config: Config, world_size: int) -> None:
    """Check that the layout and the batch fit `world_size` processes.

    Raises:
        UserError: with the numbers and the nearest ones that work.
    """
    if not 0 < world_size <= MAX_PROCESSES:
        raise UserError(f"{world_size} processes are not 1 to {MAX_PROCESSES}; start or plan so many")
    _check_expert_parallel(config, world_size)
    _check_sequence_parallel(config, world_size)
    training, sequence = config.training, config.parallel.sequence_parallel
    divisor = training.micro_batch_size * (world_size // sequence)
    if training.global_batch_size % divisor:
        nearest = max(divisor, round(training.global_batch_size / divisor) * divisor)
        slices = "" if sequence == 1 else f" / parallel.sequence_parallel {sequence}"
        raise UserError(
            f"training.global_batch_size {training.global_batch_size} is not a multiple of training.micro_batch_size "
            f"{training.micro_batch_size} × {world_size} processes{slices} = {divisor}; "
            f"set training.global_batch_size to {nearest}"
        )


def _check_expert_parallel(config: Config, world_size: int) -> None:
    expert_parallel, counts = config.parallel.expert_parallel, config.parallel.experts_per_rank
    num_experts = config.model.experts.num_experts
    valid = join([size for size in divisors(world_size) if num_experts % size == 0])
    if world_size % expert_parallel:
        raise UserError(
            f"parallel.expert_parallel {expert_parallel} does not divide the {world_size} processes; "
            f"it can be {valid}, or start a multiple of {expert_parallel} processes"
        )
    if expert_parallel > num_experts:
        raise UserError(
            f"parallel.expert_parallel {expert_parallel} ranks cannot each hold one of model.experts.num_experts "
            f"{num_experts}; set it to {valid}"
        )
    if counts is None and num_experts % expert_parallel:
        raise UserError(
            f"parallel.expert_parallel {expert_parallel} does not divide model.experts.num_experts {num_experts}; "
            f"set it to {valid}, or name the experts of each rank in parallel.experts_per_rank, such as "
            f"{_nearest_expert_counts((), expert_parallel, num_experts)}"
        )
    if isinstance(counts, tuple) and (len(counts) != expert_parallel or sum(counts) != num_experts):
        raise UserError(
            f"parallel.experts_per_rank {list(counts)} has {len(counts)} entries that sum to {sum(counts)}; "
            f"it needs parallel.expert_parallel = {expert_parallel} entries that sum to model.experts.num_experts = "
            f"{num_experts}, such as {_nearest_expert_counts(counts, expert_parallel, num_experts)}"
        )


def _check_sequence_parallel(config: Config, world_size: int) -> None:
    sequence, length = config.parallel.sequence_parallel, config.data.sequence_length
    if world_size % sequence:
        raise UserError(
            f"parallel.sequence_parallel {sequence} does not divide the {world_size} processes; it can be "
            f"{join(divisors(world_size))}, or start a multiple of {sequence} processes"
        )
    if length % sequence:
        below = length // sequence * sequence
        nearest = [n for n in (below, below + sequence) if n >= 2]
        raise UserError(
            f"data.sequence_length {length} cannot be cut into parallel.sequence_parallel {sequence} equal slices; "
            f"the nearest lengths that can: {join(nearest)}"
        )


def divisors(n: int) -> list[int]:
    """Return the divisors of `n` in ascending order; of a number above 10¹², those up to 10⁶ and their partners."""
    small = [d for d in range(1, min(math.isqrt(n), 10**6) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def join(values: list[int]) -> str:
    """Return numbers as a message lists them: 1, 2, 4."""
    shown = ", ".join(map(str, values[:MAX_LISTED]))
    return f"{shown} and {len(values) - MAX_LISTED} more" if len(values) > MAX_LISTED else shown


def _nearest_expert_counts(counts: tuple[int, ...], ranks: int, num_experts: int) -> list[int]:
    """Counts that work and move as few experts as possible; equal ones if `counts` is far from working."""
    near = len(counts) == ranks and abs(sum(counts) - num_experts) <= min(num_experts, MAX_CORRECTION)
    nearest = list(counts) if near else [num_experts // ranks] * ranks
    while sum(nearest) > num_experts:
        nearest[nearest.index(max(nearest))] -= 1
    while sum(nearest) < num_experts:
        nearest[nearest.index(min(nearest))] += 1
    return nearest
