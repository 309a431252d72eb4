"""Whole layers and models on each process of tests/distributed/test_token_dispatch.py, beside their definition."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kabrn_dist.config import ExpertsConfig, ModelConfig, RetentionConfig
from kabrn_dist.data.dataset import Batch
from kabrn_dist.distributed.all_to_all import ExpertLink, Traffic
from kabrn_dist.distributed.expert_placement import ExpertPlacement
from kabrn_dist.distributed.launch_env import LaunchEnv
from kabrn_dist.distributed.mesh import Mesh, NodeGroups, make_mesh
from kabrn_dist.distributed.process_group import init_distributed
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.model.moe import MixtureOfExperts, RouterInputs, moe_naive
from kabrn_dist.model.router import RouterStates

WIDTH, TIME = 8, 3


class Case(NamedTuple):
    """One comparison.

    Attributes:
        counts: experts on each rank of an expert group.
        rows: sequences of each rank; 0 for a rank without tokens.
        favoured: experts that all tokens choose (top_k of them); none: as the router likes.
        length: tokens of a sequence.
        quantised: fp64 keeps rounding errors too small to flip a code.
        capacity: see `Experts`.
    """

    counts: tuple[int, ...]
    rows: tuple[int, ...]
    favored: tuple[int, ...] = ()
    top_k: int = 2
    form: str = "rational"
    shared: int = 1
    length: int = TIME
    quantized: bool = False
    capacity: float | None = None


CASES = {
    2: [
        Case((1, 3), (3, 1), form="swiglu"),
        Case((4, 4), (2, 5), top_k=3, shared=2, quantized=True),
        Case((5, 1), (1, 4), top_k=1, shared=0, capacity=1.0),
        Case((2, 3), (0, 3), favored=(4,), top_k=1, form="swiglu"),
        Case((1, 3), (1, 0), length=1),
    ],
    3: [
        Case((4, 1, 3), (2, 2, 2), form="swiglu", capacity=1.0),
        Case((2, 1, 2), (1, 0, 4), top_k=3, quantized=True),
        Case((4, 1, 3), (1, 2, 1), favored=(4,), top_k=1),
    ],
    4: [
        Case((1, 3, 1, 3), (2, 0, 3, 1), top_k=3, quantized=True),
        Case((1, 3, 1, 3), (1, 1, 1, 1), favored=(7, 0), form="swiglu"),
        # Two expert groups of two ranks: gradients of an expert add up over the groups.
        Case((1, 3), (2, 1, 1, 3)),
    ],
}


def make(case: Case, wire: ExpertLink) -> MixtureOfExperts:
    settings = ModelConfig(
        vocab_size=2,
        hidden_size=WIDTH,
        layers=1,
        retention=RetentionConfig(num_heads=2, key_dim=2, value_dim=4),
        experts=ExpertsConfig(
            num_experts=sum(case.counts),
            num_shared_experts=case.shared,
            top_k=case.top_k,
            expert_hidden_size=12,
            function_groups=2,
            type=case.form,
            capacity_factor=case.capacity,
        ),
        quantize=case.quantized,
    )
    layer = MixtureOfExperts(settings, 1.0, wire)
    for name, module in layer.named_children():
        module.initialize(2, name)
    layer.router.weight.data *= 30
    if case.favored:
        # All inputs have a first coordinate of 4 or so, before and after the norm.
        layer.router.weight.data[:, 0] = -1
        layer.router.weight.data[list(case.favored), 0] = 3
    return layer.double()


def guide_of(case: Case) -> RouterInputs:
    states = RouterStates.initial(1, sum(case.counts), "cpu")
    return RouterInputs(states.bias[0], states.prev_load[0], 0, None)


def draw(case: Case) -> tuple[Tensor, Tensor]:
    """All ranks' inputs, and the noise that weighs their outputs in the loss."""
    torch.manual_seed(sum(case.rows))
    x, noise = (torch.randn(sum(case.rows), case.length, WIDTH, dtype=torch.float64) for _ in range(2))
    if case.favored:
        x[..., 0] = 9
    return x.requires_grad_(), noise


def reference(case: Case) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """By definition on one process over all ranks' tokens: output, input gradient, parameter gradients, load."""
    layer = make(
        case, ExpertLink(ExpertPlacement.single(sum(case.counts)), None, None, case.quantized, False, Traffic())
    )
    x, noise = draw(case)
    _, sums = layer(x, guide_of(case))
    out = moe_naive(layer, x, guide_of(case))
    ((out * noise).sum() + sums.balance + sums.z).backward()
    if case.favored:
        assert set(sums.tokens_per_expert.nonzero().flatten().tolist()) == set(case.favored)
    assert x.grad is not None
    return (
        out.detach(),
        x.grad,
        {name: p.grad for name, p in layer.named_parameters() if p.grad is not None},
        sums.tokens_per_expert,
    )


def near(mine: Tensor, theirs: Tensor, what: str) -> None:
    torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=0, msg=lambda text: f"{what}: {text}")


def check(case: Case, mesh: Mesh, nodes: NodeGroups | None) -> None:
    """Compare this rank's part with the reference."""
    placement = ExpertPlacement(case.counts, mesh.expert_rank)
    layer = make(case, ExpertLink(placement, mesh.expert_group, nodes, case.quantized, False, Traffic()))
    everyone, noise = draw(case)
    here = slice(sum(case.rows[: mesh.rank]), sum(case.rows[: mesh.rank + 1]))
    x = everyone.detach()[here].requires_grad_()
    out, sums = layer(x, guide_of(case))
    ((out * noise[here]).sum() + sums.balance + sums.z).backward()

    expected, for_x, grads, load = reference(case)
    where = f"rank {mesh.rank} of {case}"
    assert x.grad is not None
    near(out.detach(), expected[here], f"output, {where}")
    near(x.grad, for_x[here], f"input gradient, {where}")
    near(mesh.all_reduce_sum(sums.tokens_per_expert), load, f"load, {where}")
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, f"{name}, {where}"
        if name.startswith("routed."):
            # As training does: ranks with the same experts add up, and a rank's experts are a piece of the whole.
            total = parameter.grad.clone()
            dist.all_reduce(total, group=mesh.expert_data_group)
            near(total, grads[name][placement.local.start : placement.local.stop], f"{name}, {where}")
        else:
            near(mesh.all_reduce_sum(parameter.grad), grads[name], f"{name}, {where}")


def run_model(activations: str, mesh: Mesh) -> tuple[int, Tensor, list[Tensor]]:
    """Bytes sent, language loss and gradients of a whole model's forward and backward pass."""
    settings = ModelConfig(
        vocab_size=11,
        hidden_size=WIDTH,
        layers=2,
        retention=RetentionConfig(num_heads=2, key_dim=2, value_dim=4, chunk_size=2),
        experts=ExpertsConfig(num_experts=4 * mesh.expert_parallel, top_k=2, expert_hidden_size=12, function_groups=2),
        activation_checkpointing=activations,
    )
    model = MixKABRN(settings, ExpertPlacement((4,) * mesh.expert_parallel, mesh.expert_rank), mesh)
    model.initialize(1)
    tokens = (torch.arange(10).view(2, 5) * (mesh.rank + 3)) % 11
    zeros = torch.zeros_like(tokens)
    language = model(Batch(tokens, tokens, zeros, torch.arange(5).expand(2, -1), zeros[:, 0])).language
    language.backward()
    sent = sum(traffic.take().bytes_sent for traffic in model.traffic)
    return sent, language.detach(), [p.grad for p in model.parameters() if p.grad is not None]


def work(rank: int, world: int, port: int) -> None:
    """All checks of one number of processes."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    place = LaunchEnv(rank, world, rank, world)
    with init_distributed(place) as device:
        meshes = {size: make_mesh(place, device, size) for size in {len(case.counts) for case in CASES[world]}}
        nodes = make_mesh(place, device, world, ranks_per_node=2).expert_nodes
        for case in CASES[world]:
            check(case, meshes[len(case.counts)], nodes if len(case.counts) == world else None)
        sent, language, grads = run_model("keep", meshes[world])
        assert sent and len(grads) == 2 + 2 * (5 + 1 + 6 + 6)
        for activations in ("recompute", "offload"):
            again, its_language, its_grads = run_model(activations, meshes[world])
            # What is recomputed sends nothing again.
            assert again == sent and torch.equal(its_language, language)
            for mine, theirs in zip(its_grads, grads, strict=True):
                torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
