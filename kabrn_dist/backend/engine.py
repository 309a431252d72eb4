"""The model in training: forward and backward passes, gradient clipping, optimizer steps, and reading of weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kabrn_dist.backend.deepspeed import gathered, local_gradients, start_deepspeed
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
        gradient_norm: global L2 norm before clipping, the same on all ranks; infinite if it is not known to be finite.
        applied: False if nothing was changed, because fp16 gradients overflowed or the step was skipped.
    """

    gradient_norm: float
    applied: bool


class Engine:
    """A model in training.

    Args:
        model: this rank's part of the model, with its initial weights.
        config: the whole configuration; the DeepSpeed dictionary is derived from it.
        mesh: this process among the others.

    Attributes:
        stage: ZeRO stage.
        tokens_per_expert: [L,E] tokens that this rank has routed to each expert since the last optimizer step.
        shards: the sharded ternary matrices; None if they are whole on every rank.
        is_adapter: whether an adapter is trained, and the model beside it is frozen, its routers' states too.
        deepspeed: DeepSpeed's engine.
        optimizer: DeepSpeed's optimizer.

    Raises:
        UserError: if the device cannot train in the chosen precision.
    """

    def __init__(self, model: MixKABRN, config: Config, mesh: Mesh) -> None:
        self.config, self.mesh, self.model = config, mesh, model
        self.stage = config.parallel.zero_stage
        self.tokens_per_expert = torch.zeros_like(model.routers.bias)
        self.shards = shard_ternary(model, config, mesh) if config.parallel.shard_ternary else None
        self.is_adapter = config.finetune is not None and config.finetune.trains_adapter
        self.deepspeed = start_deepspeed(model, config, mesh)
        self.optimizer: Any = self.deepspeed.optimizer
        # A second stage decays no more than the first, so groups that do not decay now never do.
        self._decays = [group["weight_decay"] > 0 for group in self.optimizer.param_groups]

    def forward_backward(self, batch: Batch, totals: StepTotals) -> tuple[Losses, BatchStats]:
        """Run forward and backward of one micro-batch. Collective.

        `optimizer_step` or `skip_step` ends the step after its last micro-batch.

        Args:
            batch: this rank's micro-batch, on its device.
            totals: totals of the step, which its losses are means over.

        Returns:
            The losses and statistics of this rank, detached.
        """
        self._begin_forward(self.deepspeed.is_gradient_accumulation_boundary())
        self.deepspeed.train()
        sums = self.deepspeed(batch)
        losses = compute_losses(sums, totals, self.config.model.router)
        if inject_fault("loss"):
            losses = losses._replace(total=losses.total * float("nan"))
        # Losses are parts of the whole step's means already, so DeepSpeed must not divide by the micro-batches again.
        self.deepspeed.backward(losses.total, scale_wrt_gas=False)
        self.tokens_per_expert += sums.tokens_per_expert.detach()
        if not self.deepspeed.is_gradient_accumulation_boundary():
            # Only counts it.
            self.deepspeed.step()
        return Losses(*(x.detach() for x in losses)), BatchStats(*(x.detach() for x in sums))

    def local_grad_norm(self) -> Tensor:
        """Return the L2 norm of what this rank holds of the step's gradients: finite if they are.

        Always 0 under fp16, whose loss scaling looks for overflows by itself.
        """
        gradients = [] if self.config.training.precision == "fp16" else local_gradients(self.deepspeed, self.stage)
        if not gradients:
            return torch.zeros((), device=self.mesh.device)
        return torch.stack(torch._foreach_norm(gradients, 2.0, torch.float32)).norm()

    def optimizer_step(self, learning_rate: float, weight_decay: float) -> StepResult:
        """Clip the gradients and update the weights, after the step's last micro-batch. Collective."""
        for group, decays in zip(self.optimizer.param_groups, self._decays, strict=True):
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
        """End the step without an update: its gradients and expert loads are discarded."""
        self.deepspeed.skip_step()
        self._end_step(applied=False)
        return StepResult(float("inf"), applied=False)

    def _begin_forward(self, last: bool) -> None:
        """Prepare a forward pass; the gradients of the `last` one complete a step. Collective."""
        self.model.set_quantization(self.config.model.quantization_lambda(self.model.routers.step))
        if self.shards is not None:
            self.shards.expect(last)
        self.refresh()

    def _end_step(self, applied: bool) -> None:
        if applied and not self.is_adapter:
            self.weights_changed()
            self.model.routers.update(
                self.mesh.all_reduce_sum(self.tokens_per_expert), self.config.model.router.bias_update_rate
            )
        else:
            self.model.routers.step += 1
        self.tokens_per_expert.zero_()

    def refresh(self) -> None:
        """Gather the codes of sharded ternary matrices if latents have changed. Collective."""
        if self.shards is not None and self.shards.stale:
            self.shards.gather()

    def ternary_shard(self, parameter: torch.nn.Parameter) -> TernaryShard | None:
        """Return the sharded matrix that a parameter is a shard of; None for a whole parameter."""
        return None if self.shards is None else self.shards.find(parameter)

    def weights_changed(self) -> None:
        """Mark the codes of ternary matrices as stale, after an update or a load."""
        if self.shards is not None:
            self.shards.stale = True

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> BatchStats:
        """Return the statistics of a batch without a backward pass. Collective."""
        self._begin_forward(last=True)
        self.deepspeed.eval()
        stats: BatchStats = self.deepspeed(batch)
        # What such a pass exchanges counts for no step.
        for traffic in self.model.traffic:
            traffic.take()
        return stats

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits [B,T,C] fp32 of this rank's slice of a batch. Collective.

        This is the forward pass of `evaluate`, so it works in every layout: where experts, sequences or weights lie
        on several ranks, all ranks call it with the same tokens.
        """
        outputs: list[Tensor] = []
        hook = self.model.head.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        try:
            self.evaluate(batch)
        finally:
            hook.remove()
        return outputs[0].float()

    def close(self) -> None:
        """Free DeepSpeed's memory, for a process that goes on to train another model."""
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
        """Return the learned functions of this rank's routed experts, by layer and name. Collective.

        Args:
            points: [P] where to evaluate them.
            edges: number of edges to take where each edge has a function of its own.

        Returns:
            Values [E,F,P] on the host; empty for experts without learned functions.
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
        table, spread = self.model.parameter_table(), self.mesh.expert_group is not None
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                square[int(table[name].routed and spread)] += parameter.grad.double().square().sum()
        if self.mesh.expert_group is not None:
            dist.all_reduce(square[1:], group=self.mesh.expert_group)
        norm = float(square.sum().sqrt()) / self.loss_scale
        clip = self.config.optimizer.max_grad_norm
        if clip and clip < norm < float("inf"):
            torch._foreach_mul_(gradients, clip / (norm + 1e-6))
        return norm


def shard_ternary(model: MixKABRN, config: Config, mesh: Mesh) -> TernaryShards:
    """Keep only this rank's shards of the ternary matrices, and return how they are sharded."""
    dtype = TORCH_DTYPES[config.training.precision]
    packing, bucket = WIRE_FORMATS[config.parallel.ternary_wire_format], config.parallel.bucket_size
    everyone = dist.group.WORLD if mesh.world_size > 1 else None
    holders = mesh.expert_data_group if mesh.world_size > mesh.expert_parallel else None
    return TernaryShards(model, everyone, holders, dtype, packing, bucket)
