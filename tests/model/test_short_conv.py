"""The short convolution: by definition, over documents, and over slices of time on real processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kabrn_dist.config import RetentionConfig
from kabrn_dist.distributed.halo import halo_exchange
from kabrn_dist.distributed.launch_env import read_launch_env
from kabrn_dist.distributed.process_group import init_distributed
from kabrn_dist.model.attention import Attention
from kabrn_dist.model.bitlinear import BitLinear
from kabrn_dist.model.mixer import Mixer, MixerState
from kabrn_dist.model.mixer import make_position_info as find_tokens
from kabrn_dist.model.retention import Retention
from kabrn_dist.model.short_conv import ShortConv, short_conv, short_conv_eager, short_conv_naive
from tests.support import fork_server

BATCH, WIDTH = 2, 5
# Layouts of two rows: the columns where a document starts.
LAYOUTS: dict[str, Any] = {
    "throughout": lambda time: [[], []],
    "one-token": lambda time: [range(time), range(3, 9)],
    "ends-last": lambda time: [[time - 1], [time // 2, time - 2]],
    "several": lambda time: [range(0, time, 5), [1, 3, 4]],
}


def make_positions(starts: Any, time: int) -> Tensor:
    """[B,T] positions within documents that begin at these columns, and at the first."""
    rows = []
    for places in starts:
        begins = {0, *places}
        row = [0]
        for column in range(1, time):
            row.append(0 if column in begins else row[-1] + 1)
        rows.append(row)
    return torch.tensor(rows)


def draw(time: int, taps: int) -> tuple[list[Tensor], Tensor]:
    """x, weights and the columns before, in fp64, needing gradients, and the noise that weighs the outputs."""
    torch.manual_seed(100 * time + taps)
    x, before = torch.randn(BATCH, time, WIDTH).double(), torch.randn(BATCH, taps, WIDTH).double()
    weight, noise = torch.randn(taps, WIDTH).double(), torch.randn(BATCH, time, WIDTH).double()
    return [part.requires_grad_() for part in (x, weight, before)], noise


def near(mine: Tensor, theirs: Tensor, limit: float, what: str = "") -> None:
    torch.testing.assert_close(mine, theirs, atol=limit, rtol=0, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("time", [1, 2, 3, 13, 32])
@pytest.mark.parametrize("taps", [1, 3, 4])
def test_it_is_its_definition(layout: str, time: int, taps: int) -> None:
    inputs, noise = draw(time, taps)
    # Counted on, as in a slice or a continued row, positions let the first tokens see what came before.
    for ahead in (0, 2, 100):
        positions = make_positions(LAYOUTS[layout](time), time)
        positions = positions + ahead * (positions == torch.arange(time))
        expected = short_conv_naive(*inputs, positions)
        out = short_conv(*inputs, positions)
        near(out, expected, 1e-12)
        wanted = torch.autograd.grad((expected * noise).sum(), inputs)
        for mine, theirs in zip(torch.autograd.grad((out * noise).sum(), inputs), wanted, strict=True):
            near(mine, theirs, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("time", "width"), [(1, 1), (7, 33), (300, 16), (513, 40)])
@pytest.mark.parametrize("taps", [1, 3, 64])
def test_one_pass_is_the_steps_in_torch(taps: int, time: int, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(time + taps)
    positions = make_positions([range(0, time, 50), [1, time // 2]], time)
    positions = positions + 2 * (positions == torch.arange(time))
    shapes = (BATCH, time, width), (taps, width), (BATCH, taps, width)
    drawn = [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]
    noise = torch.randn(BATCH, time, width, generator=generator).to(dtype)
    results = []
    before = torch.get_num_threads()
    runs = (short_conv, dtype, 1), (short_conv, dtype, 5), (short_conv_eager, torch.float64, 1)
    for function, kind, threads in runs:
        torch.set_num_threads(threads)
        inputs = [part.to(kind).requires_grad_() for part in drawn]
        out = function(*inputs, positions)
        results.append([out, *torch.autograd.grad((out * noise.to(kind)).sum(), inputs)])
    torch.set_num_threads(before)
    limit = 2e-5 if dtype == torch.float32 else 2**-7
    for mine, other_threads, exact in zip(*results, strict=True):
        assert torch.equal(mine, other_threads) and mine.dtype == dtype
        near(mine.double() / (1 + exact.abs()), exact / (1 + exact.abs()), limit * taps**0.5)


@pytest.mark.parametrize(("batch", "time"), [(2, 0), (0, 5), (0, 0)])
def test_without_tokens_there_is_no_gradient(batch: int, time: int) -> None:
    x, before = torch.randn(batch, time, WIDTH), torch.randn(batch, 64, WIDTH)
    inputs = [part.requires_grad_() for part in (x, torch.randn(64, WIDTH), before)]
    # What freed memory holds is not what the gradient is.
    _ = [torch.full((batch, 64, WIDTH), 7.0) for _ in range(8)]
    out = short_conv(*inputs, torch.zeros(batch, time, dtype=torch.int64))
    for grad, of in zip(torch.autograd.grad(out.sum(), inputs), inputs, strict=True):
        assert grad.shape == of.shape and not grad.any()


def test_nothing_comes_from_another_document_or_from_later() -> None:
    (x, weight, before), _ = draw(12, 3)
    positions = make_positions([[7], [3, 8]], 12)
    whole = short_conv(x, weight, before, positions)
    with torch.no_grad():
        x[0, 6] += 100
        x[1, 7] += 100
        before += 100
    again = short_conv(x, weight, before, positions)
    for row, column in ((0, 6), (1, 7)):
        others = [t for t in range(12) if t != column]
        assert torch.equal(again[row, others], whole[row, others])
        assert not torch.equal(again[row, column], whole[row, column])


def test_weights_begin_at_zero_and_stay_fp32_in_half_precision() -> None:
    layer = ShortConv(WIDTH, 4)
    layer.initialize(1, "convolution")
    x = torch.randn(BATCH, 9, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    before, positions = torch.randn(BATCH, 3, WIDTH).bfloat16(), make_positions([[], [4]], 9)
    out = layer(x, before, positions)
    assert torch.equal(out, x)
    out.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32 and layer.weight.grad.all()
    # 1 + 2⁻¹² is 1 in bf16.
    layer.weight.data.fill_(2.0**-12)
    ones = torch.ones(BATCH, 9, WIDTH, dtype=torch.bfloat16)
    assert torch.equal(layer(512 * ones, 512 * ones[:, :3], positions + 3), (512 * ones).float().add(0.375).bfloat16())
    assert layer(ones, ones[:, :3], positions).dtype == torch.bfloat16


def make_mixer(kind: type[Mixer]) -> Mixer:
    layer = kind(8, RetentionConfig(num_heads=2, key_dim=4, value_dim=6), False, 1.0, kernel_size=4)  # type: ignore[arg-type]
    for name, part in layer.named_modules():
        if isinstance(part, BitLinear):
            part.initialize(3, name)
    torch.manual_seed(1)
    layer.get_submodule("inputs.convolution").weight.data = torch.randn(3, 8)  # type: ignore[union-attr]
    return layer.double()


@pytest.mark.parametrize("kind", [Retention, Attention])
@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 6], [2, 10]])
def test_a_state_continues_the_row_across_documents(kind: type[Mixer], pieces: list[int]) -> None:
    layer = make_mixer(kind)
    x = torch.randn(BATCH, 12, 8, dtype=torch.float64)
    positions = make_positions([[], [4, 5]], 12)
    documents = (positions == 0).cumsum(1) - 1
    whole, _ = layer(x, find_tokens(documents, positions, 4))
    outs, state, start = [], None, 0
    for piece in pieces:
        here = slice(start, start + piece)
        out, state = layer(x[:, here], find_tokens(documents[:, here], positions[:, here], 4), state)
        outs.append(out)
        start += piece
        assert isinstance(state, MixerState) and state.mixer_conv_state.shape == (BATCH, 3, 8)
    # Retention's state is kept in fp32.
    near(torch.cat(outs, 1), whole, 1e-5)


def slice_layouts(length: int, world: int) -> dict[str, Any]:
    """Documents around the slices' edges, two rows each."""
    edges, total = [length * r for r in range(1, world)], length * world
    return {
        "on": [edges, edges[:1]],
        "before": [[e - 1 for e in edges], edges[-1:]],
        "after": [[e + 1 for e in edges], [e + 2 for e in edges]],
        "spanning": [[], []],
        "unlike": [[], [2, total - 1]],
        "one-token": [range(total), [e + n for e in edges for n in (-2, -1, 0, 1)]],
    }


def check_slice(layout: str, length: int, taps: int) -> None:
    """This rank's outputs and gradients against one process by definition."""
    world, rank = dist.get_world_size(), dist.get_rank()
    where = f"{layout}, rank {rank} of {world}, length {length}, {taps} taps"
    (x, weight, _), noise = draw(length * world, taps)
    positions = make_positions(slice_layouts(length, world)[layout], length * world)
    expected = short_conv_naive(x, weight, torch.zeros(BATCH, taps, WIDTH).double(), positions)
    wanted = torch.autograd.grad((expected * noise).sum(), (x, weight))

    here = slice(rank * length, (rank + 1) * length)
    mine, weights = x.detach()[:, here].requires_grad_(), weight.detach().requires_grad_()
    out = short_conv(mine, weights, halo_exchange(mine, taps, dist.group.WORLD), positions[:, here])
    near(out, expected[:, here], 1e-12, where)
    for_x, for_weight = torch.autograd.grad((out * noise[:, here]).sum(), (mine, weights))
    near(for_x, wanted[0][:, here], 1e-12, f"gradient of x, {where}")
    dist.all_reduce(for_weight)
    near(for_weight, wanted[1], 1e-12, f"gradient of the weights, {where}")


def work() -> None:
    """One rank of the test below."""
    with init_distributed(read_launch_env()):
        # Also slices that are shorter than the convolution: their columns come from further away.
        for length in (1, 2, 3, 7):
            for taps in (1, 3, 5):
                for layout in slice_layouts(length, dist.get_world_size()):
                    check_slice(layout, length, taps)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_rank_has_the_values_and_gradients_of_one_process(world: int) -> None:
    ended = fork_server.run_ranks("tests.model.test_short_conv:work", (), world, timeout=60, CUDA_VISIBLE_DEVICES="")
    assert ended.exit_code == 0, ended.output
