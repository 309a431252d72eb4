"""The model in training: forward and backward, clipping, the optimizer's step, and what can be read of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kabrn_dist.backend.deepspeed import gathered, is_expert, local_gradients, start_deepspeed
from kabrn_dist.backend.losses import Losses, StepTotals, compute_losses
from kabrn_dist.backend.ternary_sharding import TernaryShard, TernaryShards
from kabrn_dist.config import Config
from kabrn_dist.data.dataset import Batch
from kabrn_dist.distributed.mesh import Mesh
from kabrn_dist.model.mixkabrn import BatchStats, MixKABRN
from kabrn_dist.ops.packing import WIRE_FORMATS
from kabrn_dist.utils.fault_injection import inject_fault
from kabrn_dist.utils.precision import TORCH_DTYPES


@dataclass(frozen=True)
class StepResult:
    """Outcome of an optimizer step.

    Attributes:
        gradient_norm: global L2 norm before clipping, the same on all ranks; infinite where not known to be finite.
        applied: False where nothing was changed, as fp16 gradients overflowed or the step was dropped.
    """

    gradient_norm: float
    applied: bool


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
        self.config, self.mesh, self.model = config, mesh, model
        self.stage = config.parallel.zero_stage
        # Copies that chose each expert since the last optimizer step, on this rank.
        self.load = torch.zeros_like(model.routers.bias)
        self.shards = shard_ternary(model, config, mesh) if config.parallel.shard_ternary else None
        self.deepspeed = start_deepspeed(model, config, mesh)
        self.optimizer: Any = self.deepspeed.optimizer
        # A second stage decays no more than the first, so groups that do not decay now never do.
        self.decaying = [group["weight_decay"] > 0 for group in self.optimizer.param_groups]

    def forward_backward(self, batch: Batch, totals: StepTotals) -> tuple[Losses, BatchStats]:
        """Forward and backward of one micro-batch; `update` or `drop` ends the step after its last one.

        Returns detached values of this rank.
        """
        self._begin(self.deepspeed.is_gradient_accumulation_boundary())
        self.deepspeed.train()
        sums = self.deepspeed(batch)
        losses = compute_losses(sums, totals, self.config.model.router)
        if inject_fault("loss"):
            losses = losses._replace(total=losses.total * float("nan"))
        # Losses are shares of the whole step already, so DeepSpeed must not divide by the micro-batches again.
        self.deepspeed.backward(losses.total, scale_wrt_gas=False)
        self.load += sums.tokens_per_expert.detach()
        if not self.deepspeed.is_gradient_accumulation_boundary():
            # Only counts it.
            self.deepspeed.step()
        return Losses(*(x.detach() for x in losses)), BatchStats(*(x.detach() for x in sums))

    def local_grad_norm(self) -> Tensor:
        """Scalar that is finite where this rank's gradients of the whole step are: an L2 norm of what it holds of them.

        Not under fp16, whose loss scaling looks for overflows by itself: there it is always 0.
        """
        gradients = [] if self.config.training.precision == "fp16" else local_gradients(self.deepspeed, self.stage)
        if not gradients:
            return torch.zeros((), device=self.mesh.device)
        return torch.stack(torch._foreach_norm(gradients, 2.0, torch.float32)).norm()

    def optimizer_step(self, learning_rate: float, weight_decay: float) -> StepResult:
        """Clip and change the weights, after the step's last micro-batch. Collective."""
        for group, decays in zip(self.optimizer.param_groups, self.decaying, strict=True):
            group["lr"] = learning_rate * group["rate"]
            group["weight_decay"] = weight_decay if decays else 0.0
        norm = self._clip_unsharded() if self.stage == 0 else None
        self.deepspeed.step()
        applied = self.deepspeed.was_step_applied()
        self._end_step(applied)
        if norm is None:
            norm = float(self.deepspeed.get_global_grad_norm())
        return StepResult(norm, applied)

    def skip_step(self) -> StepResult:
        """End the step as if its micro-batches had never been: gradients and loads are forgotten."""
        self.deepspeed.drop_step()
        self._end_step(applied=False)
        return StepResult(float("inf"), applied=False)

    def _begin(self, last: bool) -> None:
        """Before a forward pass, whose gradients, if any, complete a step where it is the `last`. Collective."""
        self.model.quant.lam = self.config.model.quantization_lambda(self.model.routers.step)
        if self.shards is not None:
            self.shards.expect(last)
        self.refresh()

    def _end_step(self, applied: bool) -> None:
        if applied:
            self.weights_changed()
            self.model.routers.update(self.mesh.all_reduce_sum(self.load), self.config.model.router.bias_update_rate)
        else:
            self.model.routers.step += 1
        self.load.zero_()

    def refresh(self) -> None:
        """Have the codes of the latents as they are now. Collective."""
        if self.shards is not None and self.shards.stale:
            self.shards.gather()

    def ternary_shard(self, parameter: torch.nn.Parameter) -> TernaryShard | None:
        """What this rank's piece of a ternary matrix belongs to; None where it is whole."""
        return None if self.shards is None else self.shards.find(parameter)

    def weights_changed(self) -> None:
        """Latents are others now, by an update or by loading: their codes are gathered again before they are used."""
        if self.shards is not None:
            self.shards.stale = True

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> BatchStats:
        """Forward only."""
        self._begin(last=True)
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

    @torch.no_grad()
    def function_curves(self, points: Tensor, edges: int) -> dict[int, dict[str, Tensor]]:
        """Layer → values [E,F,P] of the learned functions of this rank's routed experts at `points` [P], on the host.

        Empty for forms without any. `edges`: how many are taken where each edge has one. Collective.
        """
        curves = {}
        self.refresh()
        for layer in self.config.model.moe_layers:
            experts: Any = self.model.get_submodule(f"blocks.{layer}.mixture.routed")
            with gathered(list(experts.parameters()), self.stage):
                found = experts.functions(points.to(self.mesh.device), edges)
            if found:
                curves[layer] = {name: values.float().cpu() for name, values in found.items()}
        return curves

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
        clip = self.config.optimizer.max_grad_norm
        if clip and clip < norm < float("inf"):
            torch._foreach_mul_(gradients, clip / (norm + 1e-6))
        return norm


def shard_ternary(model: MixKABRN, config: Config, mesh: Mesh) -> TernaryShards:
    """Keep this rank's pieces of the ternary matrices only."""
    dtype = TORCH_DTYPES[config.training.precision]
    packing, bucket = WIRE_FORMATS[config.parallel.ternary_wire_format], config.parallel.bucket_size
    everyone = dist.group.WORLD if mesh.world_size > 1 else None
    holders = mesh.expert_data_group if mesh.world_size > mesh.expert_parallel else None
    return TernaryShards(model, everyone, holders, dtype, packing, bucket)
