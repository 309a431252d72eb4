"""The mixture on one process against its definition, the router's sums, and the whole model."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kabrn_dist.config import Experts
from kabrn_dist.config import Model as ModelSettings
from kabrn_dist.config import Retention as RetentionSettings
from kabrn_dist.data.batches import Batch
from kabrn_dist.mesh import alone
from kabrn_dist.model.bitlinear import rms_norm
from kabrn_dist.model.mixkabrn import MixKABRN, Sums
from kabrn_dist.model.moe import MixtureOfExperts, Router, mixture_naive
from kabrn_dist.parallel.placement import Placement

WIDTH, ROUTED = 16, 5


def make(quantised: bool, **changes: Any) -> MixtureOfExperts:
    settings = Experts(**{"routed": ROUTED, "shared": 1, "top_k": 2, "hidden": 12, "groups": 4, **changes})
    layer = MixtureOfExperts(WIDTH, settings, quantised, 1.0, Placement((settings.routed,), 0), None)
    for name, module in layer.named_children():
        module.initialise(2, name)
    # Routers start nearly even; wider scores make the weights of a token's experts differ.
    layer.router.weight.data *= 30
    return layer


def compare(layer: MixtureOfExperts, dtype: torch.dtype, tolerance: float) -> None:
    """Values, and gradients of the input and of every parameter, against the definition."""
    layer = layer.to(dtype)
    torch.manual_seed(1)
    noise = torch.randn(3, 7, WIDTH, dtype=dtype)
    results = []
    for form in (lambda x: layer(x)[0], lambda x: mixture_naive(layer, x)):
        x = torch.randn(3, 7, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(4)).requires_grad_()
        out = form(x)
        grads = torch.autograd.grad((out * noise).sum(), [x, *layer.parameters()])
        results.append([out, *grads])
    for mine, theirs in zip(*results, strict=True):
        assert bool(theirs.any())
        torch.testing.assert_close(mine, theirs, atol=tolerance * float(theirs.detach().abs().max()), rtol=0)


@pytest.mark.parametrize("form", ["rational", "swiglu"])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("shared", "top_k"), [(0, 1), (1, 2), (2, 2), (2, 3), (1, 4), (0, 5)])
def test_mixture_is_its_definition(form: str, score: str, shared: int, top_k: int) -> None:
    if top_k == 1:
        # One expert's weight is always 1, so its router learns through the balance loss alone.
        layer = make(False, form=form, score=score, shared=shared, top_k=1).double()
        x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
        torch.testing.assert_close(layer(x)[0], mixture_naive(layer, x), atol=1e-11, rtol=0)
        assert not bool(torch.autograd.grad(layer(x)[0].sum(), layer.router.weight)[0].abs().max() > 1e-12)
        return
    compare(make(False, form=form, score=score, shared=shared, top_k=top_k), torch.float64, 1e-11)


@pytest.mark.parametrize("form", ["rational", "swiglu"])
@pytest.mark.parametrize(("shared", "top_k"), [(0, 2), (1, 3), (2, 5)])
def test_quantised_mixture_is_its_definition(form: str, shared: int, top_k: int) -> None:
    compare(make(True, form=form, shared=shared, top_k=top_k), torch.float32, 1e-5)


def router(**changes: Any) -> Router:
    made = Router(WIDTH, Experts(**{"routed": ROUTED, "top_k": 2, "hidden": 4, **changes}))
    made.initialise(1, "router")
    return made.double()


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_ties_go_to_the_lowest_numbers(score: str) -> None:
    made = router(score=score, top_k=3)
    made.weight.data.copy_(made.weight.data[:1].clone())
    choice, weights, _ = made(torch.randn(2, 4, WIDTH, dtype=torch.float64))
    assert choice.tolist() == [[0, 1, 2]] * 8
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 3))
    # Sorts of many experts are where an unstable order would show.
    many = router(score=score, routed=512, top_k=3)
    many.weight.data.zero_()
    assert many(torch.randn(2, 4, WIDTH, dtype=torch.float64))[0].tolist() == [[0, 1, 2]] * 8
    # A tie of two for the last place, behind one clear winner.
    made.weight.data.zero_()
    made.weight.data[3] = 1
    choice, _, _ = made(torch.ones(1, 1, WIDTH, dtype=torch.float64))
    assert choice.tolist() == [[3, 0, 1]]


def slow_sums(made: Router, x: Tensor) -> tuple[float, float, list[float], float]:
    """The sums by their formulas, one number at a time (DeepSeek-V3, eq. 17–20; ST-MoE, eq. 5)."""
    k, experts = made.settings.top_k, made.settings.routed
    balance = z = entropy = 0.0
    load = [0.0] * experts
    for sequence in x:
        fractions, means = [0.0] * experts, [0.0] * experts
        for token in sequence:
            logits = [sum(w * t for w, t in zip(row.tolist(), token.tolist(), strict=True)) for row in made.weight]
            raw = [1 / (1 + math.exp(-v)) if made.settings.score == "sigmoid" else math.exp(v) for v in logits]
            shares = [value / sum(raw) for value in raw]
            for expert in sorted(range(experts), key=lambda e: -shares[e])[:k]:
                load[expert] += 1
                fractions[expert] += experts / (k * len(sequence))
            means = [m + s / len(sequence) for m, s in zip(means, shares, strict=True)]
            z += math.log(sum(math.exp(v) for v in logits)) ** 2
            entropy -= sum(s * math.log(s) for s in shares)
        balance += sum(f * p for f, p in zip(fractions, means, strict=True))
    return balance, z, load, entropy


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_sums_are_their_formulas_and_add_up(score: str, top_k: int) -> None:
    made = router(score=score, top_k=top_k)
    made.weight.data *= 30
    torch.manual_seed(0)
    x = rms_norm(torch.randn(4, 6, WIDTH, dtype=torch.float64))
    choice, weights, sums = made(x)
    balance, z, load, entropy = slow_sums(made, x)
    found = [sums.balance.item(), sums.z.item(), sums.entropy.item()]
    assert found == pytest.approx([balance, z, entropy], rel=1e-10)
    assert sums.load.tolist() == load == torch.bincount(choice.flatten(), minlength=ROUTED).tolist()
    assert sum(load) == 24 * top_k
    torch.testing.assert_close(weights.sum(-1), torch.ones(24, dtype=torch.float64))
    assert all(len(set(row)) == top_k for row in choice.tolist())
    # Split invariance: the sums of the rows add up to the batch's.
    rows = [made(row[None])[2] for row in x]
    for whole, parts in zip(sums, zip(*rows, strict=True), strict=True):
        torch.testing.assert_close(torch.stack(parts).sum(0), whole, atol=1e-11, rtol=0)


def model(**changes: Any) -> MixKABRN:
    settings = ModelSettings(
        vocabulary=19,
        width=WIDTH,
        layers=2,
        retention=RetentionSettings(heads=2, key_width=4, value_width=6, decay=(1.5, 7.0), chunk=8),
        experts=Experts(routed=4, top_k=2, hidden=12, groups=4),
        **changes,
    )
    made = MixKABRN(settings, Placement((4,), 0), alone())
    made.initialise(3)
    return made


def batch(rows: int = 3, time: int = 21) -> Batch:
    """Random tokens; each row has a document that starts at column 6."""
    torch.manual_seed(0)
    tokens = torch.randint(19, (rows, time))
    columns = torch.arange(time).expand(rows, -1)
    documents = (columns >= 6).long()
    targets = tokens.roll(-1, 1)
    targets[:, 5] = targets[:, -1] = -100
    return Batch(tokens, targets, documents, columns - 6 * documents)


def backward(made: MixKABRN, part: Batch) -> tuple[Sums, dict[str, Tensor]]:
    sums = made(part)
    made.zero_grad()
    (sums.language + 0.1 * sums.balance + 0.01 * sums.z).backward()
    return sums, {name: p.grad.clone() for name, p in made.named_parameters()}


def test_model_sums_and_gradients_add_up_over_rows() -> None:
    made, whole = model(quantise=False).double(), batch()
    sums, grads = backward(made, whole)
    parts = [backward(made, Batch(*(part[row : row + 1] for part in whole))) for row in range(3)]
    for total, rows in zip(sums, zip(*(part[0] for part in parts), strict=True), strict=True):
        # The loss itself is summed in fp32.
        torch.testing.assert_close(torch.stack(rows).sum(0), total, rtol=1e-5, atol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(sum(part[1][name] for part in parts), grad, rtol=0, atol=1e-4, msg=name)
    assert sums.load.sum(1).tolist() == [2 * 63, 2 * 63]


@pytest.mark.parametrize("quantise", [True, False])
@pytest.mark.parametrize("pieces", [[3, 18], [10, 11], [6, 1, 14], [8, *[1] * 13], [1] * 21])
def test_reading_in_pieces_ends_in_the_same_logits(pieces: list[int], quantise: bool) -> None:
    # fp64, where a rounding error that flips an int8 code is out of reach.
    made, whole = model(quantise=quantise).double(), batch()
    logits, ends = made.read(whole.tokens, whole.documents, whole.positions, None)
    # What forward says of the last column alone, for each possible target.
    for target in (0, 7, 18):
        only = torch.full_like(whole.targets, -100)
        only[:, -1] = target
        language = made(whole._replace(targets=only)).language
        torch.testing.assert_close(-logits.log_softmax(-1)[:, target].sum(), language, rtol=1e-5, atol=0)
    states, start = None, 0
    for stop in itertools.accumulate(pieces):
        inputs = (part[:, start:stop] for part in (whole.tokens, whole.documents, whole.positions))
        found, states = made.read(*inputs, states)
        start = stop
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)
    for mine, theirs in zip(states, ends, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("activations", ["recompute", "offload"])
@pytest.mark.parametrize("quantise", [True, False])
def test_recomputing_changes_nothing(activations: str, quantise: bool) -> None:
    expected, grads = backward(model(quantise=quantise), batch())
    found, again = backward(model(quantise=quantise, activations=activations), batch())
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)
    assert again.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(again[name], grad, rtol=0, atol=1e-6 * float(grad.abs().max()), msg=name)
        assert bool(grad.any()), name


@pytest.mark.parametrize("activations", ["keep", "recompute", "offload"])
def test_every_ternary_matrix_is_listed_once(activations: str) -> None:
    made = model(activations=activations)
    listed = list(made.bit_weights())
    names = {id(p): name for name, p in made.named_parameters()}
    found = [names[id(weight)] for _, weight in listed]
    assert len(found) == len(set(found)) == 2 * (5 + 2 + 2)
    for (layer, _), name in zip(listed, found, strict=True):
        assert name.startswith(f"blocks.{layer}.")
    # All matrices of a block but the router's; no coefficients of functions, no embedding, no head.
    high = ("router", "numerator", "denominator", "embedding", "head")
    assert set(found) == {name for name in names.values() if not any(part in name for part in high)}
