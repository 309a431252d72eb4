"""The model under DeepSpeed 0.19.8: ZeRO, mixed precision, clipping, expert groups.

This file and train/fragments.py are the only ones that know DeepSpeed. Facts it rests on are in the comments;
the version is pinned because some of them are private.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
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
from deepspeed.utils import groups
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from kabrn_dist.config import Config
from kabrn_dist.data.batches import Batch
from kabrn_dist.errors import UserError
from kabrn_dist.mesh import Mesh
from kabrn_dist.model.bitlinear import ternary
from kabrn_dist.model.mixkabrn import MixKABRN, Sums
from kabrn_dist.train.losses import Losses, Totals, compute_losses

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Update:
    """Outcome of an optimizer step.

    Attributes:
        gradient_norm: global L2 norm before clipping, the same on all ranks.
        skipped: True where fp16 gradients overflowed and nothing was changed.
    """

    gradient_norm: float
    skipped: bool


class Engine:
    """A model in training.

    Args:
        model: this rank's part, with its initial weights.
        config: the whole configuration; the DeepSpeed dictionary is derived from it.
        mesh: this process among the others.

    Raises:
        UserError: where the device cannot train in the chosen precision.
    """

    def __init__(self, model: MixKABRN, config: Config, mesh: Mesh) -> None:
        _check_precision(config.training.precision, mesh.device)
        deepspeed_logger.setLevel(logging.WARNING)
        # DeepSpeed would compile a kernel at every machine's first start that only inference uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.config, self.mesh, self.model = config, mesh, model
        self.stage = config.parallel.zero
        # Copies that chose each expert since the last optimizer step, on this rank.
        self.load = torch.zeros_like(model.routers.bias)
        if mesh.expert > 1:
            _mark_experts(model, mesh, self.stage)
        optimizer = torch.optim.AdamW(
            _parameter_groups(model, config, mesh),
            lr=0.0,
            betas=config.optimizer.betas,
            eps=config.optimizer.epsilon,
            fused=mesh.device.type == "cuda",
        )
        settings = deepspeed_config(config, mesh.world, _reduce_bucket(model, config))
        # As deepspeed.initialize does, with a class of our own.
        deepspeed.init_distributed(dist_init_required=False)
        parsed = DeepSpeedConfig(settings)
        set_optimizer_flags(parsed, model)
        self.deepspeed = _DeepSpeed(
            args=None, model=model, optimizer=optimizer, config=settings, config_class=parsed, dist_init_required=False
        )
        self.optimizer: Any = self.deepspeed.optimizer
        # Without ZeRO, half precision begins with an update by zero gradients (hence the rate of 0), which AdamW
        # counts: its first real updates would be half as large.
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"].zero_()

    def accumulate(self, batch: Batch, totals: Totals) -> tuple[Losses, Sums]:
        """Forward and backward of one micro-batch. Returns detached values of this rank."""
        self.deepspeed.train()
        sums = self.deepspeed(batch)
        losses = compute_losses(sums, totals, self.config.model.router)
        # Losses are shares of the whole step already, so DeepSpeed must not divide by the micro-batches again.
        self.deepspeed.backward(losses.total, scale_wrt_gas=False)
        self.load += sums.load.detach()
        return Losses(*(x.detach() for x in losses)), Sums(*(x.detach() for x in sums))

    def step(self, learning_rate: float) -> Update | None:
        """Clip and update after the step's last micro-batch; after the others only counts it and returns None."""
        boundary = self.deepspeed.is_gradient_accumulation_boundary()
        norm = None
        if boundary:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate * group["rate"]
            if self.stage == 0:
                norm = self._clip_unsharded()
        self.deepspeed.step()
        if not boundary:
            return None
        self.model.routers.update(self.mesh.sum(self.load), self.config.model.router.bias_rate)
        self.load.zero_()
        if norm is None:
            norm = float(self.deepspeed.get_global_grad_norm())
        return Update(norm, not self.deepspeed.was_step_applied())

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Sums:
        """Forward only."""
        self.deepspeed.eval()
        return self.deepspeed(batch)

    def close(self) -> None:
        """Free what DeepSpeed holds, for a process that goes on to train another model."""
        self.deepspeed.destroy()

    @property
    def loss_scale(self) -> float:
        """fp16's dynamic loss scale; 1 in other precisions."""
        return float(self.optimizer.loss_scale) if self.config.training.precision == "fp16" else 1.0

    def set_loss_scale(self, scale: float) -> None:
        """Continue fp16's dynamic loss scale from `scale`; without effect in other precisions."""
        if self.config.training.precision == "fp16":
            holder = "loss_scale_config" if self.stage == 0 else "loss_scaler"
            getattr(self.optimizer, holder).cur_scale = scale

    def ternary_shares(self) -> Tensor:
        """[L,3] share of −1, 0 and +1 among each layer's ternary weights, over all ranks' experts. Collective."""
        counts = torch.zeros(len(self.config.model.layers), 3, device=self.mesh.device)
        for layer, weight in self.model.bit_weights():
            with self._whole(weight):
                codes, _ = ternary(weight.detach().view(-1, *weight.shape[-2:]))
                counts[layer] += torch.stack([(codes == value).sum() for value in (-1, 0, 1)])
        counts = self.mesh.sum(counts)
        return counts / counts.sum(1, keepdim=True)

    @torch.no_grad()
    def function_curves(self, points: Tensor, edges: int) -> dict[int, dict[str, Tensor]]:
        """Layer → values [E,F,P] of the learned functions of this rank's routed experts at `points` [P], on the host.

        Empty for forms without any. `edges`: how many are taken where each edge has one. Collective.
        """
        curves = {}
        for layer in self.config.model.mixture_layers:
            experts: Any = self.model.get_submodule(f"blocks.{layer}.mixture.routed")
            with self._whole(*experts.parameters()):
                found = experts.functions(points.to(self.mesh.device), edges)
            if found:
                curves[layer] = {name: values.float().cpu() for name, values in found.items()}
        return curves

    def _whole(self, *weights: nn.Parameter) -> AbstractContextManager[Any]:
        return GatheredParameters(list(weights)) if self.stage == 3 else nullcontext()

    def _clip_unsharded(self) -> float:
        """Clip gradients by their true global norm.

        DeepSpeed's clipping without ZeRO averages the ranks' norms (fp32) or leaves experts out (bf16, fp16), so the
        result would depend on expert parallelism; its own clipping is switched off for stage 0.
        """
        square = torch.zeros(2, device=self.mesh.device, dtype=torch.float64)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                square[int(is_expert(parameter))] += parameter.grad.double().square().sum()
        if self.mesh.expert_group is not None:
            dist.all_reduce(square[1:], group=self.mesh.expert_group)
        norm = float(square.sum().sqrt()) / self.loss_scale
        clip = self.config.optimizer.clip
        if clip and clip < norm < float("inf"):
            torch._foreach_mul_(gradients, clip / (norm + 1e-6))
        return norm


class _DeepSpeed(DeepSpeedEngine):
    """Casts the model to its working precision, but for what must stay fp32: routers and function coefficients.

    ZeRO 0–2 keep each parameter group in the dtype it has. ZeRO 3 lays all parameters into one buffer of one dtype, so
    there they are working copies like all others, of fp32 masters; what is computed with them is fp32 in any case.
    """

    def _cast_module_mixed_precision(self, param_dtype: Any, buffer_dtype: Any, *others: Any) -> None:
        kept = (
            [*self.module.coefficients(), *self.module.router_weights()] if self.zero_optimization_stage() < 3 else []
        )
        values = [p.data for p in kept]
        super()._cast_module_mixed_precision(param_dtype, buffer_dtype, *others)
        for parameter, value in zip(kept, values, strict=True):
            parameter.data = value


def is_expert(parameter: nn.Parameter) -> bool:
    """True for parameters that other ranks of the expert group do not hold."""
    return getattr(parameter, "allreduce", True) is False


def deepspeed_config(config: Config, world: int, reduce_bucket: int) -> dict[str, Any]:
    """The DeepSpeed dictionary: derived, never written by the user."""
    stage, bucket = config.parallel.zero, config.parallel.bucket
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
        "train_micro_batch_size_per_gpu": config.training.micro_batch,
        "gradient_accumulation_steps": config.accumulation(world),
        "gradient_clipping": config.optimizer.clip if stage > 0 else 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": config.training.precision == "bf16"},
        "fp16": {"enabled": config.training.precision == "fp16", "initial_scale_power": 16},
        "steps_per_print": 1 << 40,
    }


def _uneven(config: Config) -> bool:
    return config.parallel.expert > 1 and len(set(config.placement())) > 1


def _reduce_bucket(model: MixKABRN, config: Config) -> int:
    """Elements of gradients that are reduced together.

    ZeRO 2 fills one bucket with dense and expert gradients in the order of backward, which is the same on all ranks,
    and reduces it when the next one would not fit. With uneven placement the bucket is made smaller than any expert
    tensor on any rank: each of them is then reduced alone, whatever its size, so sizes of dense tensors, equal on all
    ranks, decide alone which of these go together. ZeRO 1 reduces after backward, dense gradients before any expert.
    """
    if config.parallel.zero != 2 or not _uneven(config):
        return config.parallel.bucket
    local = len(model.placement.local)
    smallest = min(p.numel() // local for p in model.routed_parameters()) * min(config.placement())
    if smallest < 2:
        raise UserError(
            f"parallel.experts_per_rank {list(config.placement())} is uneven, and an expert has a parameter of one "
            "element, which ZeRO 2 cannot reduce alone; set parallel.zero to 1 or 3"
        )
    return min(config.parallel.bucket, smallest - 1)


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
    name = f"ep_size_{mesh.expert}"
    groups._EXPERT_PARALLEL_GROUP[name] = mesh.expert_group
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = mesh.expert_data_group
    first = mesh.rank - mesh.expert_rank
    groups._EXPERT_PARALLEL_GROUP_RANKS[name] = range(first, first + mesh.expert)
    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = range(mesh.expert_rank, mesh.world, mesh.expert)
    tags: dict[str, Any] = {"allreduce": False, "group_name": name}
    if stage == 3:
        tags |= {
            "ds_zero_placement_family": "autoep_expert",
            "ds_zero_partition_group_name": name,
            "ds_zero_partition_process_group": mesh.expert_data_group,
            "ds_zero_partition_rank": dist.get_rank(mesh.expert_data_group),
            "ds_zero_partition_world_size": dist.get_world_size(mesh.expert_data_group),
        }
    for parameter in model.routed_parameters():
        for tag, value in tags.items():
            setattr(parameter, tag, value)
    if stage < 3:
        # Stage 3 refuses the marker and needs only the attributes above.
        model.deepspeed_marker = _ExpertMarker(model.settings.experts.routed, mesh.expert)


def _parameter_groups(model: MixKABRN, config: Config, mesh: Mesh) -> list[dict[str, Any]]:
    """Matrices decay; function coefficients do not. Each apart for experts where DeepSpeed must tell them.

    The first group's dtype is what DeepSpeed takes for the model's. `rate` multiplies the learning rate.
    """
    coefficients, routers = list(model.coefficients()), list(model.router_weights())
    apart = {id(p) for p in (*coefficients, *routers)}
    matrices = [p for p in model.parameters() if id(p) not in apart]
    decay, rate = config.optimizer.weight_decay, config.optimizer.coefficient_rate
    split: list[dict[str, Any]] = [
        {"params": matrices, "name": "matrices", "weight_decay": decay, "rate": 1.0},
        {"params": routers, "name": "routers", "weight_decay": decay, "rate": 1.0},
        {"params": coefficients, "name": "coefficients", "weight_decay": 0.0, "rate": rate},
    ]
    split = [group for group in split if group["params"]]
    if mesh.expert > 1 and config.parallel.zero < 3:
        split = split_params_into_different_moe_groups_for_optimizer(split, max_group_size=None)
    return [group for group in split if group["params"]]
