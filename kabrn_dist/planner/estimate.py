"""Estimate of a run from its configuration: parallel layout, parameters and length."""

from __future__ import annotations

from kabrn_dist.config import Config
from kabrn_dist.distributed.expert_placement import plan_expert_counts
from kabrn_dist.planner.count import count_adapter_parameters, count_parameters
from kabrn_dist.planner.memory import estimate_memory, format_bytes


def describe_plan(config: Config, world_size: int) -> str:
    """Return a description of the layout on `world_size` processes, the parameters and the length of the run.

    `mixkabrn plan` prints it.
    """
    counts, training = count_parameters(config.model), config.training
    layers, expert_counts = len(config.model.moe_layers), plan_expert_counts(config)
    held = sorted({counts.replicated + counts.per_expert * n * layers for n in expert_counts or ()})
    expert, sequence = config.parallel.expert_parallel, config.parallel.sequence_parallel
    tokens = training.global_batch_size * config.data.sequence_length
    need = estimate_memory(config, world_size)
    ternary_mib = (counts.ternary / 4 + 2 * (counts.total - counts.ternary)) / 2**20
    groups = (
        "; ".join(str(list(range(a, a + expert))) for a in range(0, world_size, expert)[:4]) if expert > 1 else "none"
    )
    more = " …" if expert > 1 and world_size // expert > 4 else ""
    lines = [
        f"processes            {world_size} (ZeRO {config.parallel.zero_stage}, expert parallelism {expert}, "
        f"sequence parallelism {sequence}: slices of {config.data.sequence_length // sequence} tokens)",
        f"expert groups        {groups}{more}",
        f"experts per rank     {list(expert_counts) if expert_counts else 'auto: measured at the start'}",
        f"parameters           {counts.total:,} in all, {counts.active:,} active per token",
        f"of one expert        {counts.per_expert:,} (× {config.model.experts.num_experts} routed × {layers} layers)",
        f"ternary              {counts.ternary:,} ({counts.ternary / counts.total:.1%}); "
        f"{ternary_mib:.2f} MiB at 2 bits each and 2 bytes for the rest",
        f"held per rank        {' or '.join(f'{n:,}' for n in held) or 'as measured'} before ZeRO",
        f"memory per process   at least {format_bytes(sum(need))}: {format_bytes(need.state)} for weights, gradients "
        f"and moments, {format_bytes(need.activations + need.batch)} for activations and data",
        f"one step             {training.global_batch_size} sequences = {tokens:,} tokens: "
        f"{world_size // sequence} data ranks × "
        f"{config.gradient_accumulation_steps(world_size)} micro-batches × {training.micro_batch_size}",
        f"the run              {training.steps:,} steps = {training.steps * tokens:,} tokens, {training.precision}",
    ]
    if config.finetune is not None and config.finetune.trains_adapter:
        trained = count_adapter_parameters(config)
        told = (
            f"{trained:,} parameters are trained ({trained / counts.total:.1%}), beside those of {config.finetune.base}"
        )
        lines.insert(4, f"{config.finetune.method:<21}{told}")
    return "\n".join(lines)
