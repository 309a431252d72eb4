"""Attention by blocks is attention by definition, documents never mix, and slices of time are the whole row."""

from __future__ import annotations

import multiprocessing
import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn import functional as F

from kabrn_dist.config import RetentionConfig
from kabrn_dist.distributed import kv_gather as gather
from kabrn_dist.distributed.launch_env import LaunchEnv, free_port
from kabrn_dist.distributed.process_group import init_distributed
from kabrn_dist.model import attention as module
from kabrn_dist.model.attention import Attention, KVCache, attention, attention_naive
from kabrn_dist.model.bitlinear import BitLinear
from kabrn_dist.model.mixer import make_position_info

multiprocessing.set_forkserver_preload(["torch", "pytest", "kabrn_dist.model.attention"])

BATCH, HEADS, WIDTH = 2, 2, 12
# Layouts of two rows: the columns where a document starts.
LAYOUTS: dict[str, Any] = {
    "throughout": lambda time: [[], []],
    "one-token": lambda time: [range(time), range(3, 9)],
    "ends-last": lambda time: [[time - 1], [time // 2, time - 2]],
    "several": lambda time: [range(0, time, 5), [3]],
}


def make_documents(starts: Any, time: int) -> tuple[Tensor, Tensor]:
    """[B,T] document ids that rise at each start, and positions within documents."""
    marks = torch.zeros(len(starts), time, dtype=torch.int64)
    for row, places in zip(marks, starts, strict=True):
        row[[t for t in places if 0 < t < time]] = 1
    columns = torch.arange(time).expand(len(starts), -1)
    return marks.cumsum(1), columns - (columns * marks).cummax(1).values


def draw(time: int, key: int = 4, value: int = 6) -> tuple[list[Tensor], Tensor]:
    """q, k, v in fp64, needing gradients, and the noise that weighs the outputs in the loss."""
    torch.manual_seed(time)
    q, k, v, noise = (torch.randn(BATCH, HEADS, time, w, dtype=torch.float64) for w in (key, key, value, value))
    return [x.requires_grad_() for x in (q, k, v)], noise


def near(mine: Tensor, theirs: Tensor, limit: float, what: str = "") -> None:
    torch.testing.assert_close(mine, theirs, atol=limit, rtol=0, msg=lambda text: f"{what}: {text}")


def make_layer(quantized: bool = False, group: dist.ProcessGroup | None = None) -> Attention:
    layer = Attention(WIDTH, RetentionConfig(num_heads=HEADS, key_dim=4, value_dim=6), quantized, 1.0, group)
    for name, part in layer.named_modules():
        if isinstance(part, BitLinear):
            part.initialize(3, name)
    return layer.double()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("time", [1, 2, 13, 37, 64])
@pytest.mark.parametrize("widths", [(4, 6), (6, 4), (4, 4), (2, 1)])
def test_blocks_agree_with_the_definition(layout: str, time: int, widths: tuple[int, int]) -> None:
    inputs, noise = draw(time, *widths)
    documents, _ = make_documents(LAYOUTS[layout](time), time)
    expected = attention_naive(*inputs, documents)
    grads = torch.autograd.grad((expected * noise).sum(), inputs)
    for block in (1, 7, 12, 13, 64, 1000):
        out = attention(*inputs, documents, block)
        near(out, expected, 1e-10, f"block {block}")
        for mine, theirs in zip(torch.autograd.grad((out * noise).sum(), inputs), grads, strict=True):
            near(mine, theirs, 1e-9, f"gradient, block {block}")
        for last in {1, (time + 1) // 2}:
            out = attention(inputs[0][:, :, -last:], *inputs[1:], documents, block)
            near(out, expected[:, :, -last:], 1e-10, f"last {last}")


def test_a_mask_is_made_only_where_documents_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, bool]] = []
    plain = F.scaled_dot_product_attention

    def noted(q: Tensor, k: Tensor, v: Tensor, **named: Any) -> Tensor:
        calls.append((q.shape[2], k.shape[2], named.get("is_causal", False)))
        return plain(q, k, v, **named)

    monkeypatch.setattr(module.F, "scaled_dot_product_attention", noted)
    (q, k, v), _ = draw(20)
    with torch.no_grad():
        attention(q, k, v, make_documents([[], []], 20)[0] + 3, 8)
        attention(q, k, v, make_documents([[], [19]], 20)[0], 8)
        attention(q, k, v, make_documents([[6, 15], [7, 13]], 20)[0], 8)
    assert calls[:4] == [(20, 20, True), (8, 8, False), (8, 16, False), (4, 20, False)]
    # Queries 8 and 16 lie in documents that start at 6 and 7, and at 15 and 13.
    assert calls[4:] == [(8, 8, False), (8, 10, False), (4, 7, False)]


def test_backward_keeps_no_mask() -> None:
    """What autograd saves grows with T, not with T²."""

    def saved(time: int) -> int:
        inputs, sizes = draw(time)[0], {}

        def pack(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            _kept = attention(*inputs, make_documents([[], [1]], time)[0], 16)
        return sum(sizes.values())

    assert saved(1024) < 4.2 * saved(256)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("pieces", [[40, 1, 1, 1], [1] * 43, [16, 16, 11], [1, 41, 1]])
def test_a_cache_continues_the_row(pieces: list[int], quantized: bool) -> None:
    layer = make_layer(quantized)
    layer.block_size = 16
    torch.manual_seed(0)
    x = torch.randn(BATCH, 43, WIDTH, dtype=torch.float64)
    ids, positions = torch.zeros(BATCH, 43, dtype=torch.int64), torch.arange(43).expand(BATCH, -1)
    whole, last = layer(x, make_position_info(ids, positions, 4))
    outs, state, start = [], None, 0
    for piece in pieces:
        here = slice(start, start + piece)
        out, state = layer(x[:, here], make_position_info(ids[:, here], positions[:, here], 4), state)
        outs.append(out)
        start += piece
    near(torch.cat(outs, 1), whole, 1e-10)
    assert isinstance(state, KVCache) and isinstance(last, KVCache)
    for mine, theirs in zip(state, last, strict=True):
        near(mine, theirs, 1e-12)


@pytest.mark.parametrize("block", [3, 8, 1000])
def test_documents_never_mix(block: int) -> None:
    (q, k, v), _ = draw(24)
    documents, _ = make_documents([[10], [5, 17]], 24)
    before = attention(q, k, v, documents, block)
    with torch.no_grad():
        for x in (q, k, v):
            x[0, :, 9] += 100
            x[1, :, 16] -= 100
    after = attention(q, k, v, documents, block)
    for row, last in ((0, 9), (1, 16)):
        assert torch.equal(after[row, :, last + 1 :], before[row, :, last + 1 :])
        assert torch.equal(after[row, :, :last], before[row, :, :last])
        assert not torch.equal(after[row, :, last], before[row, :, last])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_types_stay_near_the_definition(dtype: torch.dtype) -> None:
    inputs, noise = draw(50)
    narrow = [x.detach().to(dtype).requires_grad_() for x in inputs]
    documents, _ = make_documents(LAYOUTS["several"](50), 50)
    out = attention(*narrow, documents, 16)
    assert out.dtype == dtype
    limit = 0.05 if dtype == torch.bfloat16 else 1e-5
    near(out.double(), attention_naive(*inputs, documents), limit)
    (out * noise.to(dtype)).sum().backward()
    assert all(x.grad is not None and x.grad.dtype == dtype and x.grad.isfinite().all() for x in narrow)


def test_scores_are_those_of_normalized_queries_and_keys() -> None:
    (q, k, v), _ = draw(9)
    documents, positions = make_documents([[4], []], 9)
    layer, place = make_layer(), make_position_info(documents, positions, 4)
    out, cache = layer.mix(q, k, v, place, None)
    unit_q, unit_k = (2 * x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    near(out, attention_naive(unit_q, unit_k, v, documents), 1e-4)
    near(layer.mix(100 * q, 0.1 * k, v, place, None)[0], out, 1e-2)
    assert cache is not None and torch.equal(cache.documents, documents)


def slice_layouts(length: int, world: int) -> dict[str, Any]:
    """Documents around the slices' edges, two rows each."""
    edges, total = [length * r for r in range(1, world)], length * world
    return {
        "on": [edges, edges[:1]],
        "before": [[e - 1 for e in edges], edges[-1:]],
        "after": [[e + 1 for e in edges], [edges[0] + 1]],
        "spanning": [[], []],
        "unlike": [[], [2, total - 1]],
        "one-token": [range(total), range(edges[0] - 2, edges[0] + 2)],
    }


def check_slice(layout: str, length: int, block: int, world: int, rank: int) -> None:
    """This rank's outputs and gradients of q, k, v against one process by definition and in one pass."""
    where = f"{layout}, rank {rank} of {world}, length {length}, block {block}"
    documents, positions = make_documents(slice_layouts(length, world)[layout], length * world)
    here = slice(rank * length, (rank + 1) * length)
    inputs, noise = draw(length * world)
    place = make_position_info(documents, positions, 4)
    whole, _ = make_layer().mix(*inputs, place, None)
    near(whole, attention_naive(*map(module.rms_norm, inputs[:2]), inputs[2], documents), 1e-10, where)
    expected = torch.autograd.grad((whole * noise).sum(), inputs)

    layer = make_layer(group=dist.group.WORLD)
    layer.block_size = block
    mine = [x.detach()[:, :, here].requires_grad_() for x in inputs]
    CALLS.clear()
    out, state = layer.mix(*mine, make_position_info(documents[:, here], positions[:, here], 4), None)
    grads = torch.autograd.grad((out * noise[:, :, here]).sum(), mine)
    assert CALLS == ["gather", "gather", "sum"] and state is None
    near(out, whole[:, :, here], 1e-10, where)
    for name, grad, theirs in zip("qkv", grads, expected, strict=True):
        near(grad, theirs[:, :, here], 1e-9, f"gradient of {name}, {where}")

    narrow = [x.detach().bfloat16().requires_grad_() for x in mine]
    out, _ = layer.mix(*narrow, make_position_info(documents[:, here], positions[:, here], 4), None)
    assert all(x.dtype == torch.bfloat16 and x.isfinite().all() for x in torch.autograd.grad(out.sum(), narrow)), where
    with pytest.raises(ValueError, match=r"cache .state. with a sequence group"):
        layer.mix(*mine, place, KVCache(mine[1], mine[2], documents[:, here]))


CALLS: list[str] = []


def noted(name: str, plain: Any) -> Any:
    """`plain`, noting each call in CALLS."""
    return lambda *arguments, **named: (CALLS.append(name), plain(*arguments, **named))[1]


def work(rank: int, world: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    gather._all_gather = noted("gather", gather._all_gather)
    gather.reduce_scatter_sum = noted("sum", gather.reduce_scatter_sum)
    with init_distributed(LaunchEnv(rank, world, rank, world)):
        for length, block in ((3, 1000), (5, 2), (6, 3), (7, 1000)):
            for layout in slice_layouts(length, world):
                check_slice(layout, length, block, world, rank)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_rank_has_the_values_and_gradients_of_one_process(world: int) -> None:
    context = mp.start_processes(work, (world, free_port()), nprocs=world, join=False, start_method="forkserver")
    # A rank that waits for another for ever must fail the test, not stop it.
    end = time.monotonic() + 60
    while not context.join(timeout=1):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            pytest.fail(f"{world} processes hang")
