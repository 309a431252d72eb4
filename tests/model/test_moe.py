"""The mixture on one process against its definition, dense networks, and the whole model."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from kabrn_dist.config import ExpertsConfig, ModelConfig, RetentionConfig
from kabrn_dist.data.dataset import Batch
from kabrn_dist.distributed.all_to_all import ExpertLink, Traffic
from kabrn_dist.distributed.expert_placement import ExpertPlacement
from kabrn_dist.distributed.mesh import single_process_mesh
from kabrn_dist.model.experts.registry import EXPERT_TYPES
from kabrn_dist.model.mixkabrn import BatchStats, MixKABRN
from kabrn_dist.model.moe import DenseFeedForward, MixtureOfExperts, RouterInputs, moe_naive
from kabrn_dist.model.router import RouterStates
from kabrn_dist.ops.activation_quant import quantize, rms_norm

WIDTH, ROUTED = 16, 5


def settings(quantized: bool = True, router: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=19,
        hidden_size=WIDTH,
        layers=1,
        retention=RetentionConfig(num_heads=2, key_dim=4, value_dim=6),
        experts=ExpertsConfig(
            **{
                "num_experts": ROUTED,
                "num_shared_experts": 1,
                "top_k": 2,
                "expert_hidden_size": 12,
                "function_groups": 4,
                **changes,
            }
        ),
        router=router or {},
        quantize=quantized,
    )


def make(quantized: bool, router: dict[str, Any] | None = None, **changes: Any) -> MixtureOfExperts:
    chosen = settings(quantized, router, **changes)
    wire = ExpertLink(ExpertPlacement.single(chosen.experts.num_experts), None, None, quantized, False, Traffic())
    layer = MixtureOfExperts(chosen, 1.0, wire)
    for name, module in layer.named_children():
        module.initialize(2, name)
    # Routers start nearly even; wider scores make the weights of a token's experts differ.
    layer.router.weight.data *= 30
    return layer


def guide(layer: MixtureOfExperts) -> RouterInputs:
    states = RouterStates.initial(1, layer.config.num_experts, "cpu")
    return RouterInputs(states.bias[0], states.prev_load[0], 0, None)


def compare(layer: MixtureOfExperts, dtype: torch.dtype, tolerance: float) -> None:
    """Values, and gradients of the input and of every parameter, against the definition."""
    layer = layer.to(dtype)
    torch.manual_seed(1)
    noise = torch.randn(3, 7, WIDTH, dtype=dtype)
    results = []
    for form in (lambda x: layer(x, guide(layer))[0], lambda x: moe_naive(layer, x, guide(layer))):
        x = torch.randn(3, 7, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(4)).requires_grad_()
        out = form(x)
        grads = torch.autograd.grad((out * noise).sum(), [x, *layer.parameters()])
        results.append([out, *grads])
    for mine, theirs in zip(*results, strict=True):
        assert bool(theirs.any())
        torch.testing.assert_close(mine, theirs, atol=tolerance * float(theirs.detach().abs().max()), rtol=0)


@pytest.mark.parametrize("form", EXPERT_TYPES)
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("shared", "top_k"), [(0, 1), (1, 2), (2, 3), (0, 5)])
def test_mixture_is_its_definition(form: str, score: str, shared: int, top_k: int) -> None:
    router = {"score_func": score, "norm_topk_prob": top_k > 1}
    compare(make(False, router, type=form, num_shared_experts=shared, top_k=top_k), torch.float64, 1e-11)


@pytest.mark.parametrize("form", EXPERT_TYPES)
@pytest.mark.parametrize(("shared", "top_k"), [(0, 2), (2, 5)])
def test_quantized_mixture_is_its_definition(form: str, shared: int, top_k: int) -> None:
    compare(make(True, type=form, num_shared_experts=shared, top_k=top_k), torch.float32, 1e-5)


@pytest.mark.parametrize("capacity", [0.3, 1.0])
def test_dropped_copies_add_nothing(capacity: float) -> None:
    layer = make(False, capacity_factor=capacity, num_shared_experts=0)
    compare(layer, torch.float64, 1e-11)
    _, sums = layer(torch.randn(3, 7, WIDTH, dtype=torch.float64), guide(layer))
    assert float(sums.dropped) > 0


def test_the_weight_of_one_renormalized_expert_is_fixed() -> None:
    layer = make(False, num_shared_experts=1, top_k=1).double()
    out, _ = layer(torch.randn(2, 9, WIDTH, dtype=torch.float64), guide(layer))
    # It is always 1, so its router learns through the balance losses alone.
    assert float(torch.autograd.grad(out.sum(), layer.router.weight)[0].abs().max()) < 1e-12


@pytest.mark.parametrize("form", EXPERT_TYPES)
@pytest.mark.parametrize("quantized", [True, False])
def test_dense_network_is_a_mixture_of_one(form: str, quantized: bool) -> None:
    dense = DenseFeedForward(settings(quantized, type=form, dense_hidden_size=20), 1.0)
    dense.shared.initialize(2, "expert")
    x = torch.randn(3, 5, WIDTH)
    tokens = quantize(rms_norm(x).flatten(0, 1), quantized)
    torch.testing.assert_close(dense(x).flatten(0, 1), dense.shared(tokens, [15]))


def test_dense_layers_stand_where_the_configuration_says() -> None:
    def kinds(layers: int, **experts: Any) -> str:
        chosen = settings(**experts).model_copy(update={"layers": "R" * layers})
        made = MixKABRN(chosen, ExpertPlacement.single(ROUTED), single_process_mesh())
        assert made.routers.bias.shape == (len(chosen.moe_layers), ROUTED)
        return "".join("m" if isinstance(block.mixture, MixtureOfExperts) else "d" for block in made.blocks)

    assert kinds(5) == "mmmmm"
    assert kinds(5, num_dense_layers=2) == "ddmmm"
    assert kinds(5, moe_layer_interval=2) == "dmdmd"
    assert kinds(6, moe_layer_interval=2, num_dense_layers=1) == "ddmdmd"
    assert kinds(3, num_dense_layers=3) == "ddd"


def test_a_model_without_mixtures_trains() -> None:
    made = model(
        experts=ExpertsConfig(num_experts=4, top_k=2, expert_hidden_size=12, function_groups=4, num_dense_layers=2)
    )
    sums, grads = backward(made, batch())
    assert sums.tokens_per_expert.shape == (0, 4) and float(sums.balance) == float(sums.z) == 0
    assert all(bool(grad.any()) for grad in grads.values())


def model(**changes: Any) -> MixKABRN:
    chosen = ModelConfig(
        vocab_size=19,
        hidden_size=WIDTH,
        layers=2,
        retention=RetentionConfig(num_heads=2, key_dim=4, value_dim=6, decay=(1.5, 7.0), chunk_size=8),
        **{"experts": ExpertsConfig(num_experts=4, top_k=2, expert_hidden_size=12, function_groups=4), **changes},
    )
    made = MixKABRN(chosen, ExpertPlacement.single(4), single_process_mesh())
    made.initialize(3)
    return made


def batch(rows: int = 3, time: int = 21) -> Batch:
    """Random tokens; each row has a document that starts at column 6."""
    torch.manual_seed(0)
    tokens = torch.randint(19, (rows, time))
    columns = torch.arange(time).expand(rows, -1)
    documents = (columns >= 6).long()
    targets = tokens.roll(-1, 1)
    targets[:, 5] = targets[:, -1] = -100
    return Batch(tokens, targets, documents, columns - 6 * documents, torch.zeros(rows, dtype=torch.int64))


def backward(made: MixKABRN, part: Batch) -> tuple[BatchStats, dict[str, Tensor]]:
    sums = made(part)
    made.zero_grad()
    (sums.language + 0.1 * sums.balance + 0.01 * sums.z).backward()
    return sums, {name: p.grad.clone() for name, p in made.named_parameters()}


def test_model_sums_and_gradients_add_up_over_rows() -> None:
    made, whole = model(quantize=False).double(), batch()
    sums, grads = backward(made, whole)
    parts = [backward(made, Batch(*(part[row : row + 1] for part in whole))) for row in range(3)]
    for total, rows in zip(sums[:-1], zip(*(part[0][:-1] for part in parts), strict=True), strict=True):
        # The loss itself is summed in fp32.
        torch.testing.assert_close(torch.stack(rows).sum(0), total, rtol=1e-5, atol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(sum(part[1][name] for part in parts), grad, rtol=0, atol=1e-4, msg=name)
    assert sums.tokens_per_expert.sum(1).tolist() == [2 * 63, 2 * 63]


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("pieces", [[3, 18], [10, 11], [6, 1, 14], [8, *[1] * 13], [1] * 21])
def test_reading_in_pieces_ends_in_the_same_logits(pieces: list[int], quantize: bool) -> None:
    # fp64, where a rounding error that flips an int8 code is out of reach.
    made, whole = model(quantize=quantize).double(), batch()
    logits, ends = made.decode(whole.tokens, whole.documents, whole.positions, None)
    # What forward says of the last column alone, for each possible target.
    for target in (0, 7, 18):
        only = torch.full_like(whole.targets, -100)
        only[:, -1] = target
        language = made(whole._replace(targets=only)).language
        torch.testing.assert_close(-logits.double().log_softmax(-1)[:, target].sum(), language, rtol=1e-5, atol=0)
    states, start = None, 0
    for stop in itertools.accumulate(pieces):
        inputs = (part[:, start:stop] for part in (whole.tokens, whole.documents, whole.positions))
        found, states = made.decode(*inputs, states)
        start = stop
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)
    for mine, theirs in zip(states, ends, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("activations", ["recompute", "offload"])
@pytest.mark.parametrize("quantize", [True, False])
def test_recomputing_changes_nothing(activations: str, quantize: bool) -> None:
    expected, grads = backward(model(quantize=quantize), batch())
    found, again = backward(model(quantize=quantize, activation_checkpointing=activations), batch())
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)
    assert again.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(again[name], grad, rtol=0, atol=1e-6 * float(grad.abs().max()), msg=name)
        assert bool(grad.any()), name


@pytest.mark.parametrize("activations", ["keep", "recompute", "offload"])
def test_every_ternary_matrix_is_listed_once(activations: str) -> None:
    made = model(activation_checkpointing=activations)
    table = made.parameter_table()
    names = [name for name, _ in made.named_parameters()]
    assert list(table) == names and all(info.name == name for name, info in table.items())
    found = [name for name, info in table.items() if info.ternary]
    assert len(found) == len(set(found)) == 2 * (5 + 2 + 2)
    for name, info in table.items():
        assert name == (info.local_name if info.layer is None else f"blocks.{info.layer}.{info.local_name}")
        assert info.routed == (".mixture.routed." in name) and not info.sharded
    # All matrices of a block but the router's; no coefficients of functions, no embedding, no head.
    high = ("router", "numerator", "denominator", "embedding", "head")
    assert set(found) == {name for name in names if not any(part in name for part in high)}
