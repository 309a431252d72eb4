"""What each process of tests/distributed/test_token_dispatch.py does: dispatch beside its definition, on every rank."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from fairscale.nn.checkpoint import checkpoint_wrapper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.wire import sent_by
from kabrn_dist.distributed.all_to_all import ExpertLink, Traffic
from kabrn_dist.distributed.expert_placement import ExpertPlacement
from kabrn_dist.distributed.launch_env import LaunchEnv
from kabrn_dist.distributed.mesh import Mesh, NodeGroups, make_mesh
from kabrn_dist.distributed.process_group import init_distributed
from kabrn_dist.distributed.token_dispatch import Dispatch, QuantizedRows, dispatch_tokens
from kabrn_dist.distributed.token_permutation import DispatchPlan, plan_dispatch

WIDTH = 5


class Case(NamedTuple):
    """One comparison.

    Attributes:
        counts: experts on each rank of an expert group.
        tokens: of each rank; 0 for a rank without any.
        k: experts a token visits.
        favoured: experts that all tokens choose, k of them; none: any.
        dropped: share of copies that are dropped.
    """

    counts: tuple[int, ...]
    tokens: tuple[int, ...]
    k: int = 2
    favored: tuple[int, ...] = ()
    dropped: float = 0.0


CASES = {
    1: [
        Case((4,), (7,)),
        Case((3,), (6,), k=3, dropped=0.4),
        Case((70,), (40,), k=6),
        Case((2,), (3,), k=1, dropped=1.0),
    ],
    2: [
        Case((2, 2), (6, 5)),
        Case((1, 3), (7, 2), k=3, dropped=0.3),
        Case((5, 1), (3, 9), k=1),
        Case((2, 2), (4, 4), k=4),
        Case((9, 11), (30, 20), k=6),
        Case((1, 3), (1, 0), k=2),  # one token in all
        Case((3, 1), (0, 1), k=1),
        Case((2, 2), (4, 5), k=1, favored=(1,)),  # the second rank receives nothing
        Case((3, 2), (4, 5), favored=(4, 3)),  # the first rank receives nothing
        Case((2, 3), (0, 5), k=1, favored=(4,)),  # … and has nothing
        Case((1, 1), (3, 3), dropped=1.0),
        Case((1, 1), (0, 0)),
    ],
    3: [
        Case((1, 1, 1), (4, 2, 6)),
        Case((4, 1, 3), (5, 0, 7), k=3, dropped=0.2),
        Case((4, 1, 3), (3, 6, 3), k=8),
        Case((4, 1, 3), (3, 6, 3), k=1, favored=(4,)),
        Case((1, 3, 1), (0, 0, 1)),
    ],
    4: [
        Case((2, 2, 2, 2), (4, 7, 1, 5)),
        Case((1, 3, 1, 3), (6, 0, 9, 3), k=3, dropped=0.2),
        Case((1, 3, 1, 3), (6, 2, 4, 3), k=8),
        Case((1, 3, 1, 3), (3, 3, 3, 3), favored=(7, 0)),
        Case((2, 1, 1, 2), (0, 0, 1, 0), k=1),
        # Two expert groups of two ranks: gradients of an expert add up over the groups.
        Case((1, 3), (6, 3, 4, 8)),
        Case((2, 2), (3, 0, 5, 5), k=1, favored=(3,)),
    ],
}


class Data(NamedTuple):
    """All ranks' tokens, their choice, and a vector [D] for each expert; `noise` weighs the outputs in a loss."""

    codes: Tensor
    scale: Tensor
    choice: Tensor
    weights: Tensor
    experts: Tensor
    noise: Tensor


class Outcome(NamedTuple):
    """Output, and the gradients of the codes, weights and experts."""

    out: Tensor
    codes: Tensor
    weights: Tensor
    experts: Tensor


def draw(case: Case, dtype: torch.dtype, int8: bool) -> Data:
    generator = torch.Generator().manual_seed(sum(case.tokens))
    n, total = sum(case.tokens), sum(case.counts)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    codes = torch.randint(-128, 128, (n, WIDTH), generator=generator).to(dtype) if int8 else normal(n, WIDTH)
    scale = (normal(n, 1).abs() + 1).to(torch.promote_types(dtype, torch.float32))
    choice = torch.rand(n, total, generator=generator).argsort(1)[:, : case.k]
    if case.favored:
        choice = torch.tensor([case.favored[: case.k]]).expand(n, -1).contiguous()
    choice = choice.masked_fill(torch.rand(choice.shape, generator=generator) < case.dropped, total)
    return Data(codes, scale, choice, normal(n, case.k).float(), normal(total, WIDTH), normal(n, WIDTH))


def run(data: Data, wire: ExpertLink, visit: Callable[..., Tensor]) -> Outcome:
    """Forward and backward pass of one rank's part."""
    codes, weights, experts = (part.clone().requires_grad_() for part in (data.codes, data.weights, data.experts))
    out = visit(codes, data.scale, data.choice, weights, experts, wire)
    (out * data.noise).sum().backward()
    assert codes.grad is not None and weights.grad is not None and experts.grad is not None
    return Outcome(out.detach(), codes.grad, weights.grad, experts.grad)


def visit_experts(
    codes: Tensor, scale: Tensor, choice: Tensor, weights: Tensor, experts: Tensor, wire: ExpertLink
) -> Tensor:
    """The real thing. An expert divides codes by their scale and multiplies by its vector."""
    int8_codes = codes.detach().to(torch.int8) if wire.int8 else None
    exchange = dispatch_tokens((codes, scale, int8_codes), choice, wire)

    def apply(rows: QuantizedRows, tokens_per_expert: list[int]) -> Tensor:
        arrived, its_scale, _ = rows
        assert len(arrived) == sum(tokens_per_expert) and len(tokens_per_expert) == len(wire.placement.local)
        vectors = experts.repeat_interleave(torch.tensor(tokens_per_expert), 0)
        return (arrived / its_scale).to(codes.dtype) * vectors

    exchange.apply(apply)
    return exchange.combine(weights)


def visit_experts_naive(
    codes: Tensor, scale: Tensor, choice: Tensor, weights: Tensor, experts: Tensor, _: ExpertLink
) -> Tensor:
    """The definition: each token goes to each of its experts."""
    out = []
    for token in range(len(codes)):
        total = torch.zeros_like(codes[token])
        for copy, expert in enumerate(choice[token].tolist()):
            if expert < len(experts):
                result = (codes[token] / scale[token]).to(codes.dtype) * experts[expert]
                total = total + weights[token, copy].to(codes.dtype) * result
        out.append(total)
    # Experts and weights are in the graph whatever was chosen.
    nothing = codes.sum() * 0 + weights.sum().to(codes.dtype) * 0 + experts.sum() * 0
    return torch.stack(out) + nothing if out else codes * 1 + nothing


def alone_wire(case: Case, int8: bool) -> ExpertLink:
    return ExpertLink(ExpertPlacement.single(sum(case.counts)), None, None, int8, False, Traffic())


def part_of(data: Data, case: Case, rank: int, placement: ExpertPlacement) -> Data:
    here = slice(sum(case.tokens[:rank]), sum(case.tokens[: rank + 1]))
    local = slice(placement.local.start, placement.local.stop)
    own = (part[here] for part in (data.codes, data.scale, data.choice, data.weights))
    return Data(*own, data.experts[local], data.noise[here])


def check(case: Case, mesh: Mesh, nodes: NodeGroups | None, dtype: torch.dtype, int8: bool) -> None:
    """This rank's part against the definition on one process, and bits against the real thing on one process."""
    where = f"rank {mesh.rank} of {case}, {dtype}, int8 {int8}, nodes {nodes is not None}"
    data = draw(case, dtype, int8)
    placement = ExpertPlacement(case.counts, mesh.expert_rank)
    wire = ExpertLink(placement, mesh.expert_group, nodes, int8, False, Traffic())
    LOG.clear()
    mine = run(part_of(data, case, mesh.rank, placement), wire, visit_experts)
    sent = sum(size for event, size in LOG if event == "launch")
    # Counts there, rows and copies there and home; each in two steps between machines, and sizes of the first.
    launches = 0 if wire.group is None else 10 if nodes else 5
    assert [event for event, _ in LOG].count("launch") == launches, where

    alone = run(data, alone_wire(case, int8), visit_experts)
    here = slice(sum(case.tokens[: mesh.rank]), sum(case.tokens[: mesh.rank + 1]))
    assert torch.equal(mine.out, alone.out[here]), where
    naive = run(data, alone_wire(case, int8), visit_experts_naive)
    experts = mine.experts.clone()
    dist.all_reduce(experts, group=mesh.expert_data_group)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    largest = max(1.0, float(data.codes.abs().max())) if len(data.codes) else 1.0
    for name, ours, theirs in (
        ("output", mine.out, naive.out[here]),
        ("gradient of codes", mine.codes, naive.codes[here]),
        ("gradient of weights", mine.weights, naive.weights[here]),
        ("gradient of experts", experts, naive.experts[placement.local.start : placement.local.stop]),
    ):
        torch.testing.assert_close(
            ours,
            theirs,
            atol=tolerance * largest,
            rtol=tolerance,
            msg=lambda text, name=name: f"{name}, {where}: {text}",
        )
    taken = wire.traffic.take()
    assert taken.bytes_sent == sent, f"{taken} for {sent}, {where}"
    if mesh.world_size == len(case.counts):
        assert taken.routed_tokens == sum(int((data.choice == expert).sum()) for expert in placement.local), where
    assert wire.traffic == Traffic()


LOG: list[tuple[str, int]] = []


def log_exchanges() -> None:
    """Let all-to-all note in LOG what it sends to other ranks, and when it is waited for; it still exchanges."""
    plain = dist.all_to_all_single

    def logged(out: Tensor, data: Tensor, receives: Any = None, sends: Any = None, **named: Any) -> Any:
        rank, world = dist.get_rank(named["group"]), dist.get_world_size(named["group"])
        row = data.element_size() * (data[0].numel() if len(data) else 0)
        LOG.append(("launch", row * (len(data) - (sends[rank] if sends else len(data) // world))))
        work = plain(out, data, receives, sends, **named)
        return _Logged(work) if named.get("async_op") else work

    dist.all_to_all_single = logged


class _Logged:
    def __init__(self, work: Any) -> None:
        self.work = work

    def wait(self) -> None:
        LOG.append(("wait", 0))
        self.work.wait()


def check_overlap(mesh: Mesh) -> None:
    """Work between a start and its finish runs between launch and wait, and so does its backward, layer by layer."""
    wire = ExpertLink(ExpertPlacement((2, 2), mesh.rank), mesh.expert_group, None, True, False, Traffic())
    x = torch.ones(4, WIDTH, requires_grad=True)
    LOG.clear()
    out = x
    for layer in range(2):
        choice = torch.tensor([[0, 2], [1, 3], [3, 0], [2, 1]])
        exchange = dispatch_tokens((out, torch.ones(4, 1), None), choice, wire)
        shared = _Note.apply(out, f"shared {layer}")
        exchange.apply(lambda rows, _, layer=layer: _Note.apply(rows[0], f"experts {layer}"))
        beside = _Note.apply(shared, f"beside {layer}")
        out = exchange.combine(torch.ones(4, 2)) + beside
    out.sum().backward()
    events = [event for event, _ in LOG]
    for layer in range(2):
        one = ["launch", "launch", f"shared {layer}", "wait", f"experts {layer}", "launch", f"beside {layer}", "wait"]
        assert events[8 * layer :][:8] == one, events
        back = ["launch", f"beside {layer}", "wait", f"experts {layer}", "launch", f"shared {layer}", "wait"]
        assert events[16 + 7 * (1 - layer) :][:7] == back, events


class _Note(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        ctx.name = name
        LOG.append((name, 0))
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        LOG.append((ctx.name, 0))
        return grad, None


def check_recomputation(mesh: Mesh) -> None:
    """The same gradients where the exchange itself is done again in backward, in either kind of checkpointing."""
    case = Case((1, 3), (5, 7))
    data = part_of(draw(case, torch.float64, False), case, mesh.rank, ExpertPlacement(case.counts, mesh.rank))
    wire = ExpertLink(ExpertPlacement(case.counts, mesh.rank), mesh.expert_group, None, False, False, Traffic())

    class Visit(nn.Module):
        def forward(self, *arguments: Any) -> Tensor:
            return visit_experts(*arguments)

    def again(*arguments: Any) -> Tensor:
        return checkpoint(visit_experts, *arguments, use_reentrant=False)

    plain = run(data, wire, visit_experts)
    for visit in (again, checkpoint_wrapper(Visit())):
        for ours, theirs in zip(run(data, wire, visit), plain, strict=True):
            assert torch.equal(ours, theirs)


def check_backward_int8(mesh: Mesh, nodes: NodeGroups | None) -> None:
    """Forward is left as it is; a gradient is off by a rounding step for each rank visited at most."""
    case = Case((2,) * mesh.world_size, (50,) * mesh.world_size, k=2)
    placement = ExpertPlacement(case.counts, mesh.rank)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        data = part_of(draw(case, dtype, True), case, mesh.rank, placement)
        results = [
            run(data, ExpertLink(placement, mesh.expert_group, nodes, True, backward, Traffic()), visit_experts)
            for backward in (False, True, True)
        ]
        assert torch.equal(results[0].out, results[1].out) and torch.equal(results[0].experts, results[1].experts)
        assert torch.equal(results[1].codes, results[2].codes)
        # A row's gradient sums up to two copies of one rank; every rank divides its own largest element by 127.
        off = (results[1].codes - results[0].codes).abs()
        assert off.mean() > 0 and off.max() <= 2 * 4 * results[0].codes.abs().max() / 127


def measure_dispatch(mesh: Mesh) -> tuple[float, float]:
    """Dispatch in int8 over bf16, a message for each copy, and over our own in bf16; the kernel counts each byte."""
    width, tokens, k, total = 256, 512, 2, 8
    generator = torch.Generator().manual_seed(mesh.rank)
    codes = torch.randint(-128, 128, (tokens, width), generator=generator).bfloat16()
    scale = torch.rand(tokens, 1, generator=generator) + 1
    choice = torch.rand(tokens, total, generator=generator).argsort(1)[:, :k]
    placement = ExpertPlacement((total // mesh.world_size,) * mesh.world_size, mesh.rank)
    elsewhere = sum(not placement.local.start <= expert < placement.local.stop for expert in choice.flatten().tolist())
    counted = []
    for int8 in (True, False):
        wire = ExpertLink(placement, mesh.expert_group, None, int8, False, Traffic())
        plan = plan_dispatch(choice, wire)
        rows = (codes, scale, codes.to(torch.int8) if wire.int8 else None)
        sent = sent_by(partial(exchange, rows, plan, wire))
        dispatched = wire.traffic.dispatch_bytes
        assert dispatched <= sent <= 1.02 * dispatched + 4096, f"{dispatched} counted, {sent} sent"
        counted.append(sent)
    return counted[0] / (elsewhere * width * 2), counted[0] / counted[1]


def exchange(rows: QuantizedRows, plan: DispatchPlan, wire: ExpertLink) -> None:
    """Send rows to their experts and wait for those of others."""
    Dispatch(rows, plan, wire).wait()


def check_nodes(place: LaunchEnv, device: torch.device) -> NodeGroups:
    """Groups inside and between machines of two, and none where machines and group do not fit."""
    for expert, node in ((4, None), (4, 1), (4, 3), (4, 4), (2, 2)):
        assert make_mesh(place, device, expert, ranks_per_node=node).expert_nodes is None
    unlike = LaunchEnv(place.rank, place.world_size, place.local_rank, 1 + place.rank // 2)
    assert make_mesh(unlike, device, 4).expert_nodes is None
    nodes = make_mesh(LaunchEnv(place.rank, place.world_size, place.rank % 2, 2), device, 4).expert_nodes
    assert nodes is not None and (nodes.ranks_per_node, nodes.num_nodes) == (2, 2)
    first = place.rank // 2 * 2
    assert dist.get_process_group_ranks(nodes.intra_node) == [first, first + 1]
    assert dist.get_process_group_ranks(nodes.inter_node) == [place.rank % 2, place.rank % 2 + 2]
    return nodes


def work(rank: int, world: int, port: int) -> None:
    """All checks of one number of processes."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    place = LaunchEnv(rank, world, rank, world)
    log_exchanges()
    with init_distributed(place) as device:
        meshes = {size: make_mesh(place, device, size) for size in {len(case.counts) for case in CASES[world]}}
        both: list[NodeGroups | None] = [None, check_nodes(place, device)] if world == 4 else [None]
        for case in CASES[world]:
            for nodes in both if len(case.counts) == 4 else [None]:
                check(case, meshes[len(case.counts)], nodes, torch.float64, False)
                check(case, meshes[len(case.counts)], nodes, torch.float32, True)
                check(case, meshes[len(case.counts)], nodes, torch.bfloat16, True)
        if world == 2:
            check_overlap(meshes[2])
            check_recomputation(meshes[2])
        if world in (2, 4):
            for nodes in both:
                check_backward_int8(meshes[world], nodes)
            per_copy, plain = measure_dispatch(meshes[world])
            assert per_copy <= 0.53 and plain <= 0.53, f"{per_copy} of a copy each in bf16, {plain} of our own"
