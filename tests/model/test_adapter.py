"""Adapters in a model: what is trained, what the forward pass computes, and who draws which numbers."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from kabrn_dist.config import ExpertsConfig, ModelConfig, RetentionConfig
from kabrn_dist.data.dataset import Batch
from kabrn_dist.distributed.expert_placement import ExpertPlacement
from kabrn_dist.distributed.mesh import single_process_mesh
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
    config = ModelConfig(
        vocab_size=11, hidden_size=12, layers=layers, retention=retention, experts=experts, **changes
    )
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
