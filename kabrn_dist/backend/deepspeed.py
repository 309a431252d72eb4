"""Start of DeepSpeed 0.19.8: its configuration, parameter groups, expert groups, and which parameters stay fp32.

The version is pinned because some of the facts in the comments are private to DeepSpeed.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import set_optimizer_flags
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID
from deepspeed.utils import groups
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from kabrn_dist.config import Config
from kabrn_dist.distributed.expert_placement import plan_expert_counts
from kabrn_dist.distributed.mesh import Mesh
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.model.parameters import ParameterInfo
from kabrn_dist.utils.errors import UserError


def start_deepspeed(model: MixKABRN, config: Config, mesh: Mesh) -> DeepSpeedEngine:
    """Return the model under ZeRO, with AdamW. Shards of ternary matrices are left to each rank. Collective.

    Args:
        model: this rank's part of the model.
        config: the whole configuration.
        mesh: this process among the others.

    Raises:
        UserError: if the device cannot train in the chosen precision, or ZeRO cannot with this expert placement.
    """
    _check_precision(config.training.precision, mesh.device)
    deepspeed_logger.setLevel(logging.WARNING)
    # DeepSpeed would compile a kernel at every machine's first start that only inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    shards = model.select_parameters(lambda p: p.sharded) if mesh.world_size > 1 else []
    trains_experts = any(p.requires_grad for p in model.select_parameters(lambda p: p.routed))
    split_groups = (mesh.expert_parallel > 1 and trains_experts) or bool(shards)
    if mesh.expert_parallel > 1:
        _mark_experts(model, mesh, config.parallel.zero_stage)
    if shards:
        _mark_shards(shards, mesh)
    if split_groups and config.parallel.zero_stage < 3:
        # Stage 3 refuses the marker and needs only the attributes of the parameters.
        model.deepspeed_marker = _ExpertMarker(model.config.experts.num_experts, mesh.expert_parallel)
    optimizer = torch.optim.AdamW(
        _parameter_groups(model, config, split_groups),
        lr=0.0,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        fused=True,
    )
    dictionary = deepspeed_config(config, mesh.world_size, _reduce_bucket(model, config))
    # As deepspeed.initialize does, with a class of our own.
    deepspeed.init_distributed(dist_init_required=False)
    parsed = DeepSpeedConfig(dictionary)
    set_optimizer_flags(parsed, model)
    started = _DeepSpeed(
        args=None, model=model, optimizer=optimizer, config=dictionary, config_class=parsed, dist_init_required=False
    )
    # Without ZeRO, half precision begins with an update by zero gradients (hence the rate of 0), which AdamW counts:
    # its first real updates would be half as large.
    for state in started.optimizer.state.values():
        if "step" in state:
            state["step"].zero_()
    if config.parallel.zero_stage in (1, 2):
        _share_masters(started.optimizer)
    return started


def _share_masters(optimizer: Any) -> None:
    """Hold parameters once where the parameter is as precise as its fp32 master, of which ZeRO 1 and 2 make a copy."""
    for partitions, master, group in zip(
        optimizer.parallel_partitioned_bit16_groups,
        optimizer.single_partition_of_fp32_groups,
        optimizer.real_dp_process_group,
        strict=True,
    ):
        own = partitions[dist.get_rank(group)]
        if own.dtype == master.dtype:
            master.data = own
    optimizer._link_all_hp_params()


def gathered(weights: list[nn.Parameter], stage: int) -> AbstractContextManager[Any]:
    """Return a context within which the weights are whole, also under ZeRO 3, where it is collective."""
    return GatheredParameters(weights) if stage == 3 else nullcontext()


def local_gradients(engine: DeepSpeedEngine, stage: int) -> list[Tensor]:
    """Return this rank's part of the step's reduced gradients, after the backward of its last micro-batch."""
    if stage == 0:
        return [p.grad for p in engine.module.parameters() if p.grad is not None]
    return [gradient for group in engine.optimizer.averaged_gradients.values() for gradient in group or ()]


class _DeepSpeed(DeepSpeedEngine):
    """DeepSpeed's engine, which can also skip a step and leaves some parameters in fp32.

    These are routers, function parameters, shards of ternary matrices, and adapters, which only fp16 casts: DeepSpeed
    scales the loss where a trained parameter is fp16. All others are cast to the working precision.

    ZeRO 0–2 keep each parameter group in the dtype it has. ZeRO 3 lays all parameters into one buffer of one dtype, so
    there they are working copies like all others, of fp32 masters; what is computed with them is fp32 in any case.
    """

    _skipping = False

    def _cast_module_mixed_precision(self, param_dtype: Any, buffer_dtype: Any, *others: Any) -> None:
        # ZeRO 3 needs one dtype; see above.
        keep_fp32 = self.zero_optimization_stage() < 3
        roles = {"router"} if param_dtype == torch.float16 else {"router", "adapter"}
        parameters = self.module.select_parameters(
            lambda p: p.sharded or (keep_fp32 and (p.learned_function or p.role in roles))
        )
        values = [p.data for p in parameters]
        super()._cast_module_mixed_precision(param_dtype, buffer_dtype, *others)
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value

    def skip_step(self) -> None:
        """End an optimizer step without changing anything; its gradients are discarded wherever they are kept."""
        self._skipping = True
        self.step()
        self._skipping = False

    def _take_model_step(self, lr_kwargs: Any) -> None:
        if not self._skipping:
            super()._take_model_step(lr_kwargs)
            return
        if self.zero_optimization_stage() > 0:
            _discard_gradients(self.optimizer, self.zero_optimization_stage())
        self.zero_grad()
        self.losses = None
        self.global_steps += 1
        self.skipped_steps += 1


def _discard_gradients(optimizer: Any, stage: int) -> None:
    """Do what DeepSpeed's own steps do after an overflow of gradients, except for the loss scale, which stays."""
    if stage == 3:
        optimizer._pre_step()
        optimizer._partition_all_parameters()
        optimizer._overflow_clean_up(optimizer.loss_scale)
        # fp16 records overflows here as they occur, and would skip the next step for them too.
        optimizer.inf_or_nan_tracker.zero_()
        return
    optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
    optimizer.zero_grad(set_to_none=True)
    optimizer._release_preflattened_grad_buffers()
    for group in optimizer.averaged_gradients:
        optimizer.averaged_gradients[group] = None
        optimizer.all_grad_tensors[group] = None


def deepspeed_config(config: Config, world: int, reduce_bucket: int) -> dict[str, Any]:
    """Return the DeepSpeed dictionary: derived, never written by the user."""
    stage, bucket = config.parallel.zero_stage, config.parallel.bucket_size
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": reduce_bucket,
        # ZeRO 1 and 2 refuse odd ones.
        "allgather_bucket_size": bucket + bucket % 2,
        "contiguous_gradients": True,
    }
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": bucket,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 20 * bucket,
        }
        if _uneven(config):
            # Gradients of experts never share a bucket with dense ones here, but these three count elements of both:
            # ranks with other experts would gather dense weights at other times, or in other parts.
            zero |= {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0, "sub_group_size": 1 << 60}
    else:
        # Reductions then follow the order of the parameter groups, dense ones first, on every rank.
        zero["overlap_comm"] = False
    return {
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps(world),
        "gradient_clipping": config.optimizer.max_grad_norm if stage > 0 else 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": config.training.precision == "bf16"},
        "fp16": {"enabled": config.training.precision == "fp16", "initial_scale_power": 16},
        "steps_per_print": 1 << 40,
    }


def _uneven(config: Config) -> bool:
    return len(set(plan_expert_counts(config) or ())) > 1


def _reduce_bucket(model: MixKABRN, config: Config) -> int:
    """Elements of gradients that are reduced together.

    ZeRO 2 fills one bucket with dense and expert gradients in the order of backward, which is the same on all ranks,
    and reduces it when the next one would not fit. With uneven placement the bucket is made smaller than any expert
    tensor on any rank: each of them is then reduced alone, whatever its size, so sizes of dense tensors, equal on all
    ranks, decide alone which of these go together. ZeRO 1 reduces after backward, dense gradients before any expert.
    """
    # Memory is taken for the whole bucket, so it is not made larger than what could ever be in it.
    trained = [p for p in model.parameters() if p.requires_grad]
    bucket = min(config.parallel.bucket_size, 2 * sum(p.numel() for p in trained) + 1024)
    experts = [p for p in model.select_parameters(lambda p: p.routed) if p.requires_grad]
    if config.parallel.zero_stage != 2 or not _uneven(config) or not experts:
        return bucket
    local = len(model.placement.local)
    smallest = min(p.numel() // local for p in experts) * min(model.placement.counts)
    if smallest < 2:
        raise UserError(
            f"parallel.experts_per_rank {list(model.placement.counts)} is uneven, and an expert has a parameter of one "
            "element, which ZeRO 2 cannot reduce alone; set parallel.zero_stage to 1 or 3"
        )
    return min(bucket, smallest - 1)


def _check_precision(precision: str, device: torch.device) -> None:
    accelerator = deepspeed.accelerator.get_accelerator()
    supported = {
        "fp32": True,
        "bf16": accelerator.is_bf16_supported(),
        "fp16": bool(accelerator.is_fp16_supported()),
    }
    if not supported[precision]:
        possible = ", ".join(name for name, works in supported.items() if works)
        raise UserError(
            f"training.precision {precision} does not work on this {device.type}; set it to one of: {possible}"
        )


class _ExpertMarker(MoE):
    """DeepSpeed's ZeRO 0–2 look for experts only where a module of its own class stands; this one is empty."""

    def __init__(self, experts: int, degree: int) -> None:
        nn.Module.__init__(self)
        self.num_experts, self.ep_size, self.num_local_experts = experts, degree, 0
        self.expert_group_name = f"ep_size_{degree}"

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        pass


def _mark_experts(model: MixKABRN, mesh: Mesh, stage: int) -> None:
    """Tell DeepSpeed which parameters are experts and which of the mesh's groups they are averaged in."""
    first = mesh.rank - mesh.expert_rank
    together, alike = (
        range(first, first + mesh.expert_parallel),
        range(mesh.expert_rank, mesh.world_size, mesh.expert_parallel),
    )
    name = _register(mesh.expert_parallel, (mesh.expert_group, together), (mesh.expert_data_group, alike))
    tags: dict[str, Any] = {"allreduce": False, "group_name": name}
    if stage == 3:
        tags |= {
            "ds_zero_placement_family": "autoep_expert",
            "ds_zero_partition_group_name": name,
            "ds_zero_partition_process_group": mesh.expert_data_group,
            "ds_zero_partition_rank": dist.get_rank(mesh.expert_data_group),
            "ds_zero_partition_world_size": dist.get_world_size(mesh.expert_data_group),
        }
    for parameter in model.select_parameters(lambda p: p.routed):
        for tag, value in tags.items():
            setattr(parameter, tag, value)


def _mark_shards(shards: list[nn.Parameter], mesh: Mesh) -> None:
    """Shards are to DeepSpeed what experts are that only one rank holds: their gradients are not averaged."""
    all_ranks, this_rank = range(mesh.world_size), range(mesh.rank, mesh.rank + 1)
    name = _register(mesh.world_size, (dist.group.WORLD, all_ranks), (mesh.self_group, this_rank))
    for parameter in shards:
        parameter.allreduce, parameter.group_name = False, name  # type: ignore[attr-defined]


def _register(degree: int, together: tuple[Any, range], alike: tuple[Any, range]) -> str:
    """Name an expert parallelism for DeepSpeed, with the groups, and their ranks, of all experts and of the same."""
    name = f"ep_size_{degree}"
    groups._EXPERT_PARALLEL_GROUP[name], groups._EXPERT_PARALLEL_GROUP_RANKS[name] = together
    groups._EXPERT_DATA_PARALLEL_GROUP[name], groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = alike
    return name


def _parameter_groups(model: MixKABRN, config: Config, split: bool) -> list[dict[str, Any]]:
    """Matrices have weight decay; function parameters do not. Experts have groups of their own if DeepSpeed needs them.

    The first group's dtype is what DeepSpeed takes for the model's. `rate` multiplies the learning rate.
    """
    by_group: dict[str, list[nn.Parameter]] = {"matrices": [], "routers": [], "pieces": [], "coefficients": []}
    table = model.parameter_table()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            by_group[_group_of(table[name])].append(parameter)
    decay, rate = config.optimizer.weight_decay, config.optimizer.function_lr_ratio
    found: list[dict[str, Any]] = [
        {"params": params, "name": name, "weight_decay": decay, "rate": 1.0} for name, params in by_group.items()
    ]
    found[-1] |= {"weight_decay": 0.0, "rate": rate}
    found = [group for group in found if group["params"]]
    if split and config.parallel.zero_stage < 3:
        found = split_params_into_different_moe_groups_for_optimizer(found, max_group_size=None)
    return [group for group in found if group["params"]]


def _group_of(info: ParameterInfo) -> str:
    if info.sharded:
        return "pieces"
    if info.learned_function:
        return "coefficients"
    return "routers" if info.role == "router" else "matrices"
