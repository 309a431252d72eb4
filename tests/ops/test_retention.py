"""The three forms of retention agree, documents never mix, and decays survive casts and long sequences."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kabrn_dist.config import ExpertsConfig, ModelConfig, RetentionConfig
from kabrn_dist.distributed.expert_placement import ExpertPlacement
from kabrn_dist.distributed.mesh import single_process_mesh
from kabrn_dist.model.bitlinear import BitLinear
from kabrn_dist.model.mixer import make_position_info
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.model.retention import Retention
from kabrn_dist.ops.retention import (
    log_decays,
    retention_chunk,
    retention_naive,
    retention_recurrent,
    retention_step,
)
from kabrn_dist.ops.retention_chunkwise import retention_torch
from kabrn_dist.ops.retention_fla import retention_fla

BATCH, HEADS, KEY, VALUE = 2, 3, 3, 4
CHUNKS = (16, 17, 63, 64, 65, 100, 256)
EDGES = (16, 17, 63, 64, 65, 100, 128, 256)


class Run(NamedTuple):
    """What a form gives: values, and gradients of q, k, v and, where there is one, the initial state."""

    out: Tensor
    state: Tensor
    grads: tuple[Tensor, ...]


def starts_to_documents(starts: list[list[int]], time: int) -> Tensor:
    """[B,T] ids that rise by one at each of a row's starts."""
    marks = torch.zeros(len(starts), time, dtype=torch.int64)
    for row, places in zip(marks, starts, strict=True):
        row[[t for t in places if 0 < t < time]] = 1
    return marks.cumsum(1)


LAYOUTS: dict[str, Callable[[int], list[list[int]]]] = {
    "throughout": lambda time: [[], []],
    "one-token": lambda time: [list(range(time)), list(range(5, 12))],
    "ends-last": lambda time: [[time - 1], [time // 2, time - 2]],
    "on-edges": lambda time: [list(EDGES), [64, 65]],
    "around-edges": lambda time: [[edge - 1 for edge in EDGES], [edge + 1 for edge in EDGES]],
    "several-a-chunk": lambda time: [list(range(0, time, 5)), list(range(3, time, 11))],
}


def draw(time: int, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """q, k, v and an initial state in fp64, all needing gradients, and log decays of fast and slow heads."""
    torch.manual_seed(seed)
    shapes = [(time, KEY), (time, KEY), (time, VALUE), (KEY, VALUE)]
    inputs = [torch.randn(BATCH, HEADS, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    return inputs, torch.tensor(log_decays((1.0, 12.0), HEADS), dtype=torch.float64)


def differentiate(form: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor], *rest: object) -> Run:
    """Run a form and differentiate a loss that weighs every output and the last state by fixed noise."""
    out, state = form(*inputs[:3], *rest)
    noise = torch.Generator().manual_seed(9)
    loss = sum((x * torch.randn(x.shape, generator=noise, dtype=x.dtype)).sum() for x in (out, state))
    assert isinstance(loss, Tensor)
    return Run(out, state, torch.autograd.grad(loss, inputs))


def stepwise(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, ids: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """retention_step over all tokens, as decoding does it."""
    state = q.new_zeros(BATCH, HEADS, KEY, VALUE) if state is None else state
    before = torch.cat([ids[:, :1], ids[:, :-1]], 1)
    out = []
    for t in range(q.shape[2]):
        o, state = retention_step(q[:, :, t], k[:, :, t], v[:, :, t], log_decay, state, ids[:, t] != before[:, t])
        out.append(o)
    return torch.stack(out, 2), state


def assert_same(found: Run, expected: Run) -> None:
    for x, y in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(x, y, atol=1e-10, rtol=0)
    for x, y in zip(found.grads, expected.grads, strict=True):
        torch.testing.assert_close(x, y, atol=1e-9, rtol=0)


LENGTHS = [1, 2, 63, 64, 65, 500, pytest.param(1000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("time", LENGTHS)
def test_forms_agree(time: int, layout: str) -> None:
    inputs, log_decay = draw(time)
    ids = starts_to_documents(LAYOUTS[layout](time), time)
    for given in (inputs[:3], inputs):
        state = given[3] if len(given) > 3 else None
        expected = differentiate(retention_naive, given, log_decay, ids, state)
        assert_same(differentiate(stepwise, given, log_decay, ids, state), expected)
        # The longest lengths are costly: there the odd chunks and one even one are enough.
        for chunk in CHUNKS if time < 500 else (17, 64, 100):
            assert_same(differentiate(retention_chunk, given, log_decay, ids, state, chunk), expected)


@pytest.mark.slow
def test_chunk_form_passes_gradcheck() -> None:
    inputs, log_decay = draw(7)
    ids = starts_to_documents([[3, 4], [6]], 7)
    assert torch.autograd.gradcheck(
        lambda q, k, v, state: retention_chunk(q, k, v, log_decay, ids, state, 3), tuple(inputs)
    )


@pytest.mark.parametrize("layout", ["throughout", "several-a-chunk"])
def test_prefill_in_pieces_then_steps_is_one_pass(layout: str) -> None:
    (q, k, v, state), log_decay = draw(150)
    ids = starts_to_documents(LAYOUTS[layout](150), 150)
    whole, last = retention_naive(q, k, v, log_decay, ids, state)
    outs, before = [], ids[:, 0]
    for start, stop in ((0, 1), (1, 70), (70, 134), (134, 140)):
        # The chunk form continues the document of its first token: a row whose document ended starts anew.
        state = state * (ids[:, start] == before)[:, None, None, None]
        parts = (x[:, :, start:stop] for x in (q, k, v))
        out, state = retention_chunk(*parts, log_decay, ids[:, start:stop], state, 32)
        outs.append(out)
        before = ids[:, stop - 1]
    for t in range(140, 150):
        parts = (x[:, :, t] for x in (q, k, v))
        out, state = retention_step(*parts, log_decay, state, ids[:, t] != ids[:, t - 1])
        outs.append(out[:, :, None])
    torch.testing.assert_close(torch.cat(outs, 2), whole, atol=1e-10, rtol=0)
    torch.testing.assert_close(state, last, atol=1e-10, rtol=0)


@pytest.mark.parametrize("start", [1, 63, 64, 65, 127, 128, 129])
def test_slow_heads_leak_nothing_across_documents(start: int) -> None:
    inputs, _ = draw(200)
    q, k, v = (x.detach().float() for x in inputs[:3])
    log_decay = torch.tensor(log_decays((20.0, 30.0), HEADS))
    ids = starts_to_documents([[start], [start]], 200)
    out, state = retention_chunk(q, k, v, log_decay, ids, None, 64)
    for changed in (q, k, v):
        changed[:, :, start - 1] += 100
    again, state_again = retention_chunk(q, k, v, log_decay, ids, None, 64)
    assert torch.equal(out[:, :, start:], again[:, :, start:]) and torch.equal(state, state_again)
    assert not torch.equal(out[:, :, start - 1], again[:, :, start - 1])


def test_schedules_of_decays() -> None:
    decays = torch.tensor(log_decays("exponent", 32))
    assert decays.dtype == torch.float32 and len(set(decays.tolist())) == 32 and bool((decays < 0).all())
    expected = [math.log1p(-(2.0 ** (-5 - head))) for head in range(32)]
    torch.testing.assert_close(decays, torch.tensor(expected), atol=0, rtol=1e-6)
    lines = torch.tensor(log_decays("linspace", 8), dtype=torch.float64)
    paper = 1 - torch.linspace(math.log(1 / 32), math.log(1 / 512), 8, dtype=torch.float64).exp()
    torch.testing.assert_close(lines.exp(), paper, atol=1e-12, rtol=0)
    assert log_decays((1.5, 7.0), 2) == [math.log1p(-(2.0**-1.5)), math.log1p(-(2.0**-7))]


def small_model(heads: int) -> MixKABRN:
    retention = RetentionConfig(num_heads=heads, key_dim=2, value_dim=3, decay="exponent", chunk_size=16)
    experts = ExpertsConfig(num_experts=2, top_k=1, expert_hidden_size=8, function_groups=2)
    settings = ModelConfig(vocab_size=5, hidden_size=8, layers=2, retention=retention, experts=experts)
    model = MixKABRN(settings, ExpertPlacement.single(2), single_process_mesh())
    model.initialize(1)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [[96], [1] * 96, [40, 1, 55]])
def test_bfloat16_leaves_decays_intact(pieces: list[int]) -> None:
    model = small_model(heads=12).bfloat16()
    # With a zero stream nothing enters the state, which only decays: by γ⁹⁶, told from γ = 1 up to the last head.
    model.embedding.weight.data.zero_()
    states = [torch.ones(1, 12, 2, 3) for _ in range(2)]
    start = 0
    for piece in pieces:
        positions = torch.arange(start, start + piece)[None] + 7
        zeros = torch.zeros(1, piece, dtype=torch.int64)
        _, states = model.decode(zeros, zeros, positions, states)
        start += piece
    decays = torch.tensor(log_decays("exponent", 12), dtype=torch.float64)
    expected = (96 * decays).exp()[None, :, None, None].expand(1, 12, 2, 3)
    assert float((1 - expected).min()) > 1e-3
    for state in states:
        assert state.dtype == torch.float32
        torch.testing.assert_close(state.double(), expected, atol=2e-5, rtol=0)


@pytest.mark.slow
def test_a_million_tokens_stay_finite_and_right() -> None:
    time = 10**6
    ones = torch.ones(1, 2, time, 1)
    log_decay = torch.tensor(log_decays((1.5, 7.0), 2))
    out, state = retention_chunk(ones, ones, ones, log_decay, torch.zeros(1, time, dtype=torch.int64), None, 16)
    assert bool(out.isfinite().all() and state.isfinite().all())
    # Σ γⁿ of a long document.
    limit = 1 / (1 - log_decay.exp())
    torch.testing.assert_close(out[0, :, -1, 0], limit, atol=0, rtol=1e-4)
    torch.testing.assert_close(state[0, :, 0, 0], limit, atol=0, rtol=1e-4)


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("pieces", [[50, 40, 30], [1, 64, 55], [100] + [1] * 20])
def test_layer_in_pieces_is_one_pass(pieces: list[int], quantized: bool) -> None:
    settings = RetentionConfig(num_heads=2, key_dim=4, value_dim=6, decay=(1.5, 7.0), chunk_size=32)
    layer = Retention(16, settings, quantized, init_gain=1.0)
    for name, module in layer.named_modules():
        if isinstance(module, BitLinear):
            module.initialize(3, name)
    layer = layer.double()
    torch.manual_seed(0)
    x = torch.randn(2, 120, 16, dtype=torch.float64)
    ids, positions = torch.zeros(2, 120, dtype=torch.int64), torch.arange(120).expand(2, -1)
    whole, last = layer(x, make_position_info(ids, positions, settings.key_dim))
    outs, state, start = [], None, 0
    for piece in pieces:
        here = slice(start, start + piece)
        out, state = layer(x[:, here], make_position_info(ids[:, here], positions[:, here], settings.key_dim), state)
        outs.append(out)
        start += piece
    # Decays are fp32 powers in the chunk form, so pieces agree to fp32's precision.
    torch.testing.assert_close(torch.cat(outs, 1), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(state, last, atol=1e-5, rtol=0)


def by_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g_gamma: Tensor,
    scale: float,
    initial_state: Tensor,
    output_final_state: bool,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """What fla's `chunk_simple_gla` is documented to do: sequences packed in one row [1,T,H,…], a state for each."""
    assert output_final_state
    outs, states = [], []
    for number, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        here = [x[:, start:stop].transpose(1, 2) for x in (q * scale, k, v)]
        ids = torch.zeros(1, stop - start, dtype=torch.int64)
        out, state = retention_naive(*here, g_gamma, ids, initial_state[number : number + 1])
        outs.append(out.transpose(1, 2))
        states.append(state)
    return torch.cat(outs, 1), torch.cat(states)


def test_documents_are_packed_for_flash_linear_attention_and_unpacked_again() -> None:
    ids = torch.tensor([[0, 0, 1, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0, 1], [0] * 7])
    log_decay = torch.tensor([-0.2, -0.01], dtype=torch.float64)
    results = []
    for form in (partial(retention_fla, by_sequence), retention_torch):
        torch.manual_seed(1)
        q, k, v = (torch.randn(3, 2, 7, w, dtype=torch.float64, requires_grad=True) for w in (4, 4, 5))
        state = torch.randn(3, 2, 4, 5, dtype=torch.float64, requires_grad=True)
        out, after = form(q, k, v, log_decay, ids, state)
        (out.square().sum() + after.sin().sum()).backward()
        results.append([out, after, q.grad, k.grad, v.grad, state.grad])
    for packed, plain in zip(*results, strict=True):
        torch.testing.assert_close(packed, plain, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("k", lambda x: {**x, "k": x["k"][:, :, 1:]}),
        ("v", lambda x: {**x, "v": x["v"][:, :1]}),
        ("log_decay", lambda x: {**x, "log_decay": x["log_decay"][:1]}),
        ("documents", lambda x: {**x, "documents": x["documents"].flip(1)}),
        ("documents", lambda x: {**x, "documents": x["documents"][:, 1:]}),
        ("state", lambda x: {**x, "state": torch.zeros(1, 2, 3, 4)}),
        ("q", lambda x: {**x, "q": x["q"][:, :, :0]}),
    ],
)
def test_arguments_that_do_not_fit_are_named(name: str, change: Callable[[dict], dict]) -> None:
    arguments = {
        "q": torch.randn(1, 2, 5, 3),
        "k": torch.randn(1, 2, 5, 3),
        "v": torch.randn(1, 2, 5, 3),
        "log_decay": torch.tensor([-0.1, -0.2]),
        "documents": torch.tensor([[0, 0, 1, 1, 2]]),
    }
    with pytest.raises(ValueError, match=f"^{name}: "):
        retention_chunk(**change(arguments))


def kept_bytes(time: int) -> int:
    """Bytes that autograd keeps between forward and backward."""
    q, k, v = (torch.randn(1, 2, time, 16, requires_grad=True) for _ in range(3))
    seen: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        retention_chunk(q, k, v, torch.tensor([-0.1, -0.01]), torch.zeros(1, time, dtype=torch.int64))
    return sum(seen.values())


def test_memory_for_backward_grows_linearly() -> None:
    short, long = kept_bytes(2048), kept_bytes(16384)
    assert long <= 8.2 * short
    assert long <= 16384 * 2 * (3 * 16 + 16) * 4, "q, k, v and one state of 16×16 a chunk of 64, and nothing else"


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("time", [48, 50])
def test_inputs_may_lie_in_memory_as_layers_leave_them(batch: int, time: int) -> None:
    """[B,T,H,…] transposed: reshaping that to chunks is a view for one row and a copy for two."""
    log_decay = torch.tensor([-0.05, -0.01], dtype=torch.float64)
    ids = torch.zeros(batch, time, dtype=torch.int64)
    torch.manual_seed(time)
    lying = [torch.randn(batch, time, 2, w, dtype=torch.float64).requires_grad_() for w in (3, 3, 4)]
    results = []
    for form in (
        lambda *x: retention_chunk(*x, log_decay, ids, None, 16),
        lambda *x: retention_naive(*x, log_decay, ids),
    ):
        out, state = form(*(x.transpose(1, 2) for x in lying))
        grads = torch.autograd.grad((out.sin().sum() + state.square().sum()), lying)
        results.append([out, state, *grads])
    for chunkwise, naive in zip(*results, strict=True):
        torch.testing.assert_close(chunkwise, naive, atol=1e-9, rtol=0)


def test_the_recurrent_form_agrees_however_many_tokens_are_read_at_once() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 37, 6), torch.randn(2, 3, 37, 6), torch.randn(2, 3, 37, 5)
    decay = torch.tensor(log_decays((1.5, 7.0), 3))
    documents = torch.tensor([[0] * 20 + [1] * 17, [0] * 37])
    starts = torch.cat([torch.ones(2, 1, dtype=torch.bool), documents.diff() != 0], 1)
    expected, last = retention_naive(q.double(), k.double(), v.double(), decay.double(), documents)
    whole, state = retention_recurrent(q, k, v, decay, starts)
    torch.testing.assert_close(whole, expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last.float(), rtol=1e-5, atol=1e-5)
    pieces, state_of_pieces = [], None
    for part in (slice(0, 1), slice(1, 25), slice(25, 37)):
        out, state_of_pieces = retention_recurrent(
            q[:, :, part], k[:, :, part], v[:, :, part], decay, starts[:, part], state_of_pieces
        )
        pieces.append(out)
    assert torch.equal(torch.cat(pieces, 2), whole) and torch.equal(state_of_pieces, state)
