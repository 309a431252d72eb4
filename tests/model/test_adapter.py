"""Adapters in a model: what is trained, what the forward pass computes, and who draws which numbers."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from kabrn_dist.config import ExpertsConfig, ModelConfig, RetentionConfig
from kabrn_dist.data.dataset import Batch
from kabrn_dist.distributed.expert_placement import ExpertPlacement
from kabrn_dist.distributed.mesh import single_process_mesh
from kabrn_dist.inference.frozen_codes import freeze_codes
from kabrn_dist.inference.stored_codes import StoredCodes
from kabrn_dist.model.adapter import (
    AdapterSpec,
    add_adapter,
    find_targets,
    freeze_base,
    merged_matrices,
    set_initial_states,
    set_low_ranks,
    trained_low_ranks,
    trained_states,
)
from kabrn_dist.model.fixed_codes import FixedCodes
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.ops.weight_quant import TernaryModule
from kabrn_dist.utils.errors import UserError

TYPES = ["rational", "chebyshev", "hat", "bspline", "swiglu", "relu2"]
EVERYTHING = ("mixer", "shared", "routed", "router", "head")
TERNARY = ("mixer", "shared", "routed")


def make_model(
    kind: str = "rational", layers: str = "RAR", placement: ExpertPlacement | None = None, **changes: Any
) -> MixKABRN:
    """One dense layer, then mixtures of four experts, of odd sizes."""
    experts = ExpertsConfig(
        type=kind,  # type: ignore[arg-type]
        num_experts=4,
        top_k=2,
        num_shared_experts=1,
        expert_hidden_size=10,
        function_groups=2,
        grid_size=3,
        num_dense_layers=1,
        dense_hidden_size=14,
    )
    retention = RetentionConfig(num_heads=2, key_dim=4, value_dim=6, decay=(1.5, 7.0), chunk_size=5)
    config = ModelConfig(vocab_size=11, hidden_size=12, layers=layers, retention=retention, experts=experts, **changes)
    model = MixKABRN(config, placement or ExpertPlacement.single(4), single_process_mesh())
    model.initialize(1)
    return model


def make_batch(starts: tuple[int, ...] = (0, 6, 13), length: int = 17, rows: int = 2) -> Batch:
    """Rows of documents that begin at `starts`."""
    generator = torch.Generator().manual_seed(2)
    tokens, targets = torch.randint(0, 11, (2, rows, length), generator=generator)
    begins = torch.zeros(length, dtype=torch.long)
    begins[list(starts)] = 1
    documents = begins.cumsum(0) - 1
    first = torch.tensor(starts)[documents]
    positions = torch.arange(length) - first
    sources = torch.zeros(rows, dtype=torch.long)
    return Batch(tokens, targets, documents.repeat(rows, 1), positions.repeat(rows, 1), sources)


def adapted(method: str, model: MixKABRN, targets: tuple[str, ...] = TERNARY, rank: int = 3) -> MixKABRN:
    """The model with an adapter whose parameters are not zero, as after training."""
    freeze_base(model)
    add_adapter(model, AdapterSpec(method, rank, 6.0, targets), 5)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("method", ["lora", "ternary_lora", "state"])
def test_a_new_adapter_changes_nothing_and_everything_else_is_frozen(kind: str, method: str) -> None:
    batch, model = make_batch(), make_model(kind)
    with torch.no_grad():
        before = model(batch).rows
    freeze_base(model)
    spec = AdapterSpec(method, 3, 6.0, EVERYTHING if method == "lora" else TERNARY)  # type: ignore[arg-type]
    add_adapter(model, spec, 5)
    stats = model(batch)
    assert torch.equal(stats.rows, before)
    stats.language.backward()
    table = model.parameter_table()
    assert list(table) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        trained = table[name].role == "adapter"
        assert parameter.requires_grad == trained and (parameter.grad is not None) == trained, name
        assert table[name].routed == (".routed." in name) and not table[name].sharded
        # At the start the factor that is not zero gets no gradient.
        if name.endswith(("_lora_b", "state_value")):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    names = find_targets(model, spec)
    assert {name.rpartition("_lora_")[0] for name in table if "_lora_" in name} == set(names)
    assert bool(names) == (method != "state")


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("group", [None, 4])
def test_merged_codes_compute_what_training_computes(kind: str, group: int | None) -> None:
    if kind in ("hat", "bspline") and group:
        pytest.skip("functions on edges have one scale a matrix")
    batch, model = make_batch(), adapted("ternary_lora", make_model(kind, scale_group_size=group))
    plain = make_model(kind, scale_group_size=group)
    freeze_base(plain)
    flipped = 0
    for name in find_targets(model, AdapterSpec("ternary_lora", 3, 6.0, TERNARY)):
        owner, leaf = plain.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        assert isinstance(owner, TernaryModule)
        merged = merged_matrices(model, name)
        flipped += int((owner.matrices(leaf).codes(torch.int8) != merged.codes(torch.int8)).sum())
        owner.sources[leaf] = FixedCodes(merged)
    assert flipped > 50
    with torch.no_grad():
        trained, shipped = model(batch), plain(batch)
    assert torch.equal(trained.rows, shipped.rows)
    logits = [each.decode(batch.tokens, batch.documents, batch.positions, None)[0] for each in (model, plain)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("kind", TYPES)
def test_low_rank_factors_are_a_matrix_that_is_added_to_plain_ones(kind: str) -> None:
    """Values, and gradients through every layer, in fp64."""
    batch = make_batch()
    model, merged = (make_model(kind, quantize=False).double() for _ in range(2))
    adapted("lora", model, EVERYTHING)
    model.double()
    low_ranks, scales = trained_low_ranks(model), {}
    assert set(low_ranks) == set(find_targets(model, AdapterSpec("lora", 3, 6.0, EVERYTHING)))
    for name, weight in merged.named_parameters():
        if name in low_ranks:
            a, b = (model.get_parameter(f"{name}_lora_{side}").detach() for side in "ab")
            scales[name] = 6.0 / 3 * weight.detach().abs().mean((-2, -1), keepdim=True)
            weight.data += scales[name] * (b @ a)
    stats, wanted = model(batch), merged(batch)
    torch.testing.assert_close(stats.rows, wanted.rows, rtol=1e-6, atol=1e-6)
    (stats.language + stats.balance).backward()
    (wanted.language + wanted.balance).backward()
    for name, weight in merged.named_parameters():
        if name in low_ranks:
            assert weight.grad is not None
            a, b = (model.get_parameter(f"{name}_lora_{side}") for side in "ab")
            scale = scales[name]
            for factor, gradient in ((a, scale * b.mT @ weight.grad), (b, scale * weight.grad @ a.mT)):
                assert factor.grad is not None
                torch.testing.assert_close(factor.grad, gradient.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", TYPES)
def test_fixed_factors_compute_what_trained_ones_do(kind: str) -> None:
    batch, model, plain = make_batch(), adapted("lora", make_model(kind), EVERYTHING), make_model(kind)
    with torch.no_grad():
        before, trained = plain(batch).rows, model(batch).rows
        assert not torch.equal(before, trained)
        set_low_ranks(plain, trained_low_ranks(model))
        assert torch.equal(plain(batch).rows, trained)
        freeze_codes(plain)
        assert torch.equal(plain(batch).rows, trained)
        set_low_ranks(plain, {})
        assert torch.equal(plain(batch).rows, before)
        # Fixed ones beside trained ones are added.
        minus = {name: part._replace(b=-part.b) for name, part in trained_low_ranks(model).items()}
        set_low_ranks(model, minus)
        torch.testing.assert_close(model(batch).rows, before, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kept", ["recompute", "offload"])
@pytest.mark.parametrize("method", ["lora", "ternary_lora", "state"])
def test_activation_checkpointing_changes_no_gradient(kept: str, method: str, recwarn: pytest.WarningsRecorder) -> None:
    batch, gradients = make_batch(), []
    for way in ("keep", kept):
        model = adapted(method, make_model(layers="RAR", activation_checkpointing=way))
        model(batch).language.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    assert not [each for each in recwarn if "requires_grad" in str(each.message)]
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_codes_of_a_frozen_base_stay_whatever_its_dtype_becomes() -> None:
    model = make_model()
    names = find_targets(model, AdapterSpec("lora", 3, 6.0, TERNARY))
    codes = {name: merged_matrices(model, name) for name in names}
    freeze_base(model)
    for cast in (torch.bfloat16, torch.float64):
        model.to(cast)
        for name, wanted in codes.items():
            found = merged_matrices(model, name)
            assert found.gamma is not None and wanted.gamma is not None and torch.equal(found.gamma, wanted.gamma)
            assert torch.equal(found.codes(torch.int8), wanted.codes(torch.int8)) and found.latents.dtype == cast


@pytest.mark.parametrize("method", ["lora", "ternary_lora", "state"])
@pytest.mark.parametrize("kind", ["rational", "bspline", "swiglu"])
def test_half_precision_models_have_factors_in_fp32(method: str, kind: str) -> None:
    batch, rows = make_batch(), []
    for dtype in (torch.float32, torch.bfloat16):
        model = adapted(method, make_model(kind))
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad and ".router" not in name and "coefficients" not in name:
                parameter.data = parameter.data.to(dtype)
        stats = model(batch)
        stats.language.backward()
        rows.append(stats.rows)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
                assert parameter.grad.isfinite().all()
    torch.testing.assert_close(rows[0], rows[1], rtol=0.05, atol=0.05)


def test_merged_codes_start_as_those_an_export_holds() -> None:
    """Latents that were rounded to bf16 round to other codes; the difference is no change of the adapter's."""
    model = make_model(scale_group_size=4)
    names = find_targets(model, AdapterSpec("ternary_lora", 3, 6.0, TERNARY))
    stored = {name: merged_matrices(model, name) for name in names}
    moved = 0
    for name, found in stored.items():
        owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        assert isinstance(owner, TernaryModule) and found.packed is not None and found.gamma is not None
        parameter = owner.get_parameter(leaf)
        parameter.data = parameter.data.bfloat16().float() * 1.001
        moved += int((owner.matrices(leaf).codes(torch.int8) != found.codes(torch.int8)).sum())
        owner.sources[leaf] = StoredCodes(parameter, found.packed, found.gamma[:, ::4, 0].contiguous(), 4)
    assert moved
    freeze_base(model)
    add_adapter(model, AdapterSpec("ternary_lora", 3, 6.0, TERNARY), 5)
    for name, wanted in stored.items():
        found = merged_matrices(model, name)
        assert found.gamma is not None and wanted.gamma is not None and torch.equal(found.gamma, wanted.gamma)
        assert torch.equal(found.codes(torch.int8), wanted.codes(torch.int8)), name


@pytest.mark.parametrize("kind", TYPES)
def test_gradients_of_merged_factors_are_straight_through(kind: str) -> None:
    """They are those of latents that hold the sum, times the other factor."""
    batch, model, summed = make_batch(), adapted("ternary_lora", make_model(kind)), make_model(kind)
    names = find_targets(model, AdapterSpec("ternary_lora", 3, 6.0, TERNARY))
    scales = {}
    for name in names:
        a, b, weight = (p.detach() for p in (*factors_of(model, name), summed.get_parameter(name)))
        scales[name] = 6.0 / 3 * weight.abs().mean((-2, -1), keepdim=True)
        weight += scales[name] * (b @ a)
    (model(batch).language).backward()
    (summed(batch).language).backward()
    for name in names:
        a, b = factors_of(model, name)
        gradient = summed.get_parameter(name).grad
        assert gradient is not None and a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, (scales[name] * b.mT @ gradient).detach(), rtol=2e-3, atol=2e-4)
        torch.testing.assert_close(b.grad, (scales[name] * gradient @ a.mT).detach(), rtol=2e-3, atol=2e-4)


def factors_of(model: MixKABRN, name: str) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    return model.get_parameter(f"{name}_lora_a"), model.get_parameter(f"{name}_lora_b")


@pytest.mark.parametrize("pieces", [[17], [1] * 17, [4, 1, 8, 4]])
@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("in_order", [True, False])
def test_states_in_decoding_are_those_of_packed_training(
    pieces: list[int], quantize: bool, fixed: bool, in_order: bool
) -> None:
    """The recurrent form and the chunkwise one, in one piece or many, at starts of documents and within them."""
    batch = make_batch()
    model = adapted("state", make_model(layers="RR", quantize=quantize, short_conv_size=3))
    if fixed:
        states = {i: torch.einsum("hrk,hrv->hkv", *part) for i, part in trained_states(model).items()}
        assert sorted(states) == [0, 1]
        model = make_model(layers="RR", quantize=quantize, short_conv_size=3)
        set_initial_states(model, states)
    with torch.no_grad():
        wanted, _ = model.read(batch.tokens, batch.documents, batch.positions, None)
        without = make_model(layers="RR", quantize=quantize, short_conv_size=3)
        plain, _ = without.read(batch.tokens, batch.documents, batch.positions, None)
        assert (plain - wanted).abs().amax((0, 2)).min() > 1e-3, "no token ignores the state that it begins with"
        read, start, states_so_far = [], 0, None
        for length in pieces:
            here = slice(start, start + length)
            given = batch.tokens[:, here], batch.documents[:, here], batch.positions[:, here]
            hidden, states_so_far = model.read(*given, states_so_far, in_order)
            read.append(hidden)
            start += length
    # Another order of sums may round a value to the next code.
    torch.testing.assert_close(torch.cat(read, 1), wanted, rtol=0, atol=0.2 if quantize else 1e-5)
    if fixed:
        set_initial_states(model, {})
        assert torch.equal(model.read(batch.tokens, batch.documents, batch.positions, None)[0], plain)


@pytest.mark.parametrize("method", ["lora", "ternary_lora"])
def test_experts_of_any_placement_are_drawn_alike(method: str) -> None:
    spec = AdapterSpec(method, 3, 6.0, TERNARY)  # type: ignore[arg-type]
    models = []
    for placement in (None, ExpertPlacement((2, 2), 1), ExpertPlacement((1, 3), 1)):
        models.append(make_model(placement=placement))
        freeze_base(models[-1])
        add_adapter(models[-1], spec, 5)
    for model in models[1:]:
        experts = model.placement.local
        for name, parameter in model.named_parameters():
            whole = models[0].get_parameter(name)
            assert torch.equal(parameter, whole[experts.start : experts.stop] if ".routed." in name else whole), name
    other = make_model()
    freeze_base(other)
    add_adapter(other, spec, 6)
    name = "blocks.1.mixture.routed.up_lora_a"
    assert not torch.equal(other.get_parameter(name), models[0].get_parameter(name))
    drawn = models[0].get_parameter(name)
    assert not torch.equal(drawn[0], drawn[1]) and abs(float(drawn.detach().std()) - 12**-0.5) < 0.05


def test_targets_are_groups_parts_and_patterns() -> None:
    model = make_model("swiglu")

    def find(*targets: str, method: Literal["lora", "ternary_lora", "state"] = "lora") -> list[str]:
        return list(find_targets(model, AdapterSpec(method, 3, 6.0, targets)))

    mixers = ["inputs.query", "inputs.key", "inputs.value", "inputs.gate", "output.out"]
    assert find("mixer") == [f"blocks.{i}.mixer.{part}.weight" for i in range(3) for part in mixers]
    assert find("router", "head") == [f"blocks.{i}.mixture.router.weight" for i in (1, 2)] + ["head.weight"]
    shared = [f"blocks.{i}.mixture.shared.{leaf}" for i in range(3) for leaf in ("gate", "up", "down")]
    assert find("shared") == shared
    assert find("query", "query") == [f"blocks.{i}.mixer.inputs.query.weight" for i in range(3)]
    assert find("blocks.2.*.down") == ["blocks.2.mixture.routed.down", "blocks.2.mixture.shared.down"]
    assert all("router" not in name for name in find("blocks.1.*")) and len(find("blocks.1.*")) == 11
    assert find("blocks.1.*router*") == ["blocks.1.mixture.router.weight"] and "head.weight" not in find("*")
    assert find("blocks.0.mixer.output.out.weight") == find("blocks.0.mixer.output.out")
    assert find("anything", method="state") == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": ("qeury",)}, "'qeury' matches no matrix of the base; did you mean 'query'"),
        ({"targets": ("mixer", "blocks.7.*")}, "'blocks.7.*' matches no matrix"),
        ({"targets": ("zzz",)}, "use mixer, shared, routed, router, head, query, key"),
        ({"targets": ()}, "finetune.targets: names no matrix"),
        ({"rank": 11}, "finetune.rank: 11 is larger than 'blocks.0.mixer.inputs.query.weight', a matrix of 8 × 12"),
        ({"method": "state", "rank": 5}, "finetune.rank: 5 is larger than a state of 4 × 6; set it to 4 or less"),
        ({"method": "ternary_lora", "targets": ("mixer", "router")}, "'router' is not ternary"),
        ({"method": "ternary_lora", "targets": ("head",)}, "set finetune.method to lora"),
    ],
)
def test_what_cannot_be_trained_is_refused(changes: dict[str, Any], words: str) -> None:
    spec = AdapterSpec("lora", 3, 6.0, TERNARY)._replace(**changes)
    model = make_model()
    freeze_base(model)
    with pytest.raises(UserError) as error:
        add_adapter(model, spec, 1)
    assert words in str(error.value)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_models_without_retention_or_ternary_matrices_refuse_their_methods() -> None:
    with pytest.raises(UserError, match="has no layer of it"):
        find_targets(make_model(layers="AA"), AdapterSpec("state", 3, 6.0, ()))
    with pytest.raises(UserError, match="matrices are plain"):
        find_targets(make_model(quantize=False), AdapterSpec("ternary_lora", 3, 6.0, TERNARY))


def test_adapters_of_other_models_are_refused() -> None:
    model = adapted("lora", make_model())
    low_ranks = trained_low_ranks(model)
    name, factors = next(iter(low_ranks.items()))
    for wrong in ({"blocks.9.x": factors}, {"embedding.weight": factors}, {name: factors._replace(a=factors.a[:, :1])}):
        with pytest.raises(UserError, match="use the adapter of this model"):
            set_low_ranks(model, wrong)
    for layer, state in ((1, torch.zeros(2, 4, 6)), (0, torch.zeros(2, 4, 5)), (7, torch.zeros(2, 4, 6))):
        with pytest.raises(UserError, match=r"layers \[0, 2\]"):
            set_initial_states(model, {layer: state})
