"""Expert parallelism on real processes: the same values and gradients as one process, whatever the placement."""

from __future__ import annotations

import multiprocessing
import os
import time
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fairscale.nn.checkpoint import checkpoint_wrapper
from torch import Tensor

from kabrn_dist.config import Experts, Model, Retention
from kabrn_dist.data.batches import Batch
from kabrn_dist.mesh import Mesh, Place, free_port, join_processes, make_mesh
from kabrn_dist.model.bitlinear import rms_norm
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.model.moe import MixtureOfExperts, mixture_naive
from kabrn_dist.parallel.placement import Placement

multiprocessing.set_forkserver_preload(["torch", "pytest", "kabrn_dist.model.mixkabrn", "kabrn_dist.checkpoint.store"])

WIDTH, TIME = 8, 3


class Case(NamedTuple):
    """One comparison.

    Attributes:
        counts: experts on each rank of an expert group.
        rows: sequences of each rank; 0 for a rank without tokens.
        favoured: experts that all tokens choose (top_k of them); none: as the router likes.
        length: tokens of a sequence.
        quantised: fp64 keeps rounding errors too small to flip a code.
    """

    counts: tuple[int, ...]
    rows: tuple[int, ...]
    favoured: tuple[int, ...] = ()
    top_k: int = 2
    form: str = "rational"
    shared: int = 1
    length: int = TIME
    quantised: bool = False


CASES = {
    2: [
        Case((2, 2), (2, 2)),
        Case((1, 3), (3, 1), form="swiglu"),
        Case((4, 4), (2, 5), top_k=3, shared=2),
        Case((1, 3), (3, 2), quantised=True),
        Case((5, 1), (1, 4), top_k=1, shared=0),
        Case((1, 1), (2, 2), top_k=2),
        Case((1, 3), (1, 0), length=1),  # one token in all
        Case((3, 1), (0, 1), top_k=1, length=1),
        Case((2, 2), (2, 3), favoured=(1,), top_k=1),  # the second rank receives nothing
        Case((3, 2), (2, 3), favoured=(4, 3)),  # the first rank receives nothing
        Case((2, 3), (0, 3), favoured=(4,), top_k=1, form="swiglu"),  # … and has nothing
    ],
    3: [
        Case((1, 1, 1), (1, 2, 3)),
        Case((4, 1, 3), (2, 2, 2), form="swiglu"),
        Case((2, 1, 2), (1, 0, 4), top_k=3),
        Case((2, 1, 2), (1, 0, 4), top_k=3, form="swiglu", quantised=True),
        Case((4, 1, 3), (1, 2, 1), favoured=(4,), top_k=1),
        Case((1, 3, 1), (0, 0, 1), length=1),
    ],
    4: [
        Case((2, 2, 2, 2), (1, 2, 1, 2)),
        Case((1, 3, 1, 3), (2, 1, 3, 1), top_k=3),
        Case((1, 3, 1, 3), (2, 0, 3, 1), top_k=3, quantised=True),
        Case((1, 3, 1, 3), (1, 1, 1, 1), favoured=(7, 0), form="swiglu"),
        Case((2, 1, 1, 2), (0, 0, 1, 0), length=1),
        # Two expert groups of two ranks: gradients of an expert add up over the groups.
        Case((1, 3), (2, 1, 1, 3)),
        Case((2, 2), (1, 0, 2, 2), favoured=(3,), top_k=1),
    ],
}


def make(case: Case, placement: Placement, group: dist.ProcessGroup | None) -> MixtureOfExperts:
    settings = Experts(
        routed=sum(case.counts), shared=case.shared, top_k=case.top_k, hidden=12, groups=2, form=case.form
    )
    layer = MixtureOfExperts(WIDTH, settings, case.quantised, 1.0, placement, group)
    for name, module in layer.named_children():
        module.initialise(2, name)
    layer.router.weight.data *= 30
    if case.favoured:
        # All inputs have a first coordinate of 4 or so, before and after the norm.
        layer.router.weight.data[:, 0] = -1
        layer.router.weight.data[list(case.favoured), 0] = 3
    return layer.double()


def draw(case: Case) -> tuple[Tensor, Tensor]:
    """All ranks' inputs, and the noise that weighs their outputs in the loss."""
    torch.manual_seed(sum(case.rows))
    x, noise = (torch.randn(sum(case.rows), case.length, WIDTH, dtype=torch.float64) for _ in range(2))
    if case.favoured:
        x[..., 0] = 9
    return x.requires_grad_(), noise


def reference(case: Case) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """By definition on one process over all ranks' tokens: output, input gradient, parameter gradients, load."""
    layer = make(case, Placement((sum(case.counts),), 0), None)
    x, noise = draw(case)
    out = mixture_naive(layer, x)
    sums = layer.router(rms_norm(x))[2]
    ((out * noise).sum() + sums.balance + sums.z).backward()
    if case.favoured:
        assert set(sums.load.nonzero().flatten().tolist()) == set(case.favoured)
    return out.detach(), x.grad, {name: p.grad for name, p in layer.named_parameters()}, sums.load


def near(mine: Tensor, theirs: Tensor, what: str) -> None:
    torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=0, msg=lambda text: f"{what}: {text}")


def check(case: Case, mesh: Mesh, recompute: bool) -> int:
    """Compare this rank's part with the reference. Returns the number of all-to-alls."""
    placement = Placement(case.counts, mesh.expert_rank)
    layer = make(case, placement, mesh.expert_group)
    if recompute:
        layer.routed = checkpoint_wrapper(layer.routed)
        if layer.shared is not None:
            layer.shared = checkpoint_wrapper(layer.shared)
    everyone, noise = draw(case)
    here = slice(sum(case.rows[: mesh.rank]), sum(case.rows[: mesh.rank + 1]))
    x = everyone.detach()[here].requires_grad_()
    CALLS.clear()
    out, sums = layer(x)
    ((out * noise[here]).sum() + sums.balance + sums.z).backward()
    calls = len(CALLS)

    expected, for_x, grads, load = reference(case)
    where = f"rank {mesh.rank} of {case}"
    near(out.detach(), expected[here], f"output, {where}")
    near(x.grad, for_x[here], f"input gradient, {where}")
    near(mesh.sum(sums.load), load, f"load, {where}")
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, f"{name}, {where}"
        if name.startswith("routed."):
            # As training does: ranks with the same experts add up, and a rank's experts are a piece of the whole.
            total = parameter.grad.clone()
            dist.all_reduce(total, group=mesh.expert_data_group)
            near(total, grads[name][placement.local.start : placement.local.stop], f"{name}, {where}")
        else:
            near(mesh.sum(parameter.grad), grads[name], f"{name}, {where}")
    return calls


def check_model(activations: str, mesh: Mesh) -> tuple[int, Tensor, list[Tensor]]:
    """All-to-alls, language loss and gradients of a whole model's forward and backward pass."""
    settings = Model(
        vocabulary=11,
        width=WIDTH,
        layers=2,
        retention=Retention(heads=2, key_width=2, value_width=4, chunk=2),
        experts=Experts(routed=4 * mesh.expert, top_k=2, hidden=12, groups=2),
        activations=activations,
    )
    model = MixKABRN(settings, Placement((4,) * mesh.expert, mesh.expert_rank), mesh)
    model.initialise(1)
    tokens = (torch.arange(10).view(2, 5) * (mesh.rank + 3)) % 11
    zeros = torch.zeros_like(tokens)
    CALLS.clear()
    language = model(Batch(tokens, tokens, zeros, torch.arange(5).expand(2, -1))).language
    language.backward()
    return len(CALLS), language.detach(), [p.grad for p in model.parameters() if p.grad is not None]


CALLS: list[int] = []


def count_exchanges() -> None:
    """Let torch's all-to-all note each call in CALLS; it still exchanges."""
    plain = dist.all_to_all_single

    def counted(*arguments: Any, **named: Any) -> Any:
        CALLS.append(1)
        return plain(*arguments, **named)

    dist.all_to_all_single = counted


def work(rank: int, world: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    place = Place(rank, world, rank, world)
    count_exchanges()
    with join_processes(place) as device:
        meshes = {size: make_mesh(place, device, size) for size in {len(case.counts) for case in CASES[world]}}
        for case in CASES[world]:
            mesh = meshes[len(case.counts)]
            assert mesh.expert_rank == rank % len(case.counts)
            calls = {check(case, mesh, recompute) for recompute in (False, True)}
            # Loads, codes, scales and results out and home; codes and results again in backward.
            assert calls == {6}, f"{calls} all-to-alls on rank {rank} of {case}"
        calls, language, grads = check_model("keep", meshes[world])
        assert calls == 12 and len(grads) == 2 + 2 * (5 + 1 + 6 + 6)
        for activations in ("recompute", "offload"):
            again, its_language, its_grads = check_model(activations, meshes[world])
            assert again == calls and torch.equal(its_language, language)
            for mine, theirs in zip(its_grads, grads, strict=True):
                torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("world", sorted(CASES))
def test_every_rank_has_the_values_and_gradients_of_one_process(world: int) -> None:
    context = mp.start_processes(work, (world, free_port()), nprocs=world, join=False, start_method="forkserver")
    # A rank that waits for another for ever must fail the test, not stop it.
    end = time.monotonic() + 60
    while not context.join(timeout=1):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            pytest.fail(f"{world} processes hang")


@pytest.mark.parametrize("counts", [(3,), (1, 3), (4, 1, 3)])
def test_placement_covers_every_expert_once(counts: tuple[int, ...]) -> None:
    ranges = [Placement(counts, rank).local for rank in range(len(counts))]
    assert [expert for local in ranges for expert in local] == list(range(sum(counts)))
    assert [len(local) for local in ranges] == list(counts)
    assert Placement(counts, 0).total == sum(counts)
