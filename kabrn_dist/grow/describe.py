"""A growth as a table for the console."""

from __future__ import annotations

from math import prod

from kabrn_dist.grow.mappings import empty_model
from kabrn_dist.grow.run import Growth, default_noise
from kabrn_dist.grow.tensors import TensorMapping
from kabrn_dist.model.parameters import ParameterInfo

Table = dict[str, ParameterInfo]


def describe_growth(growth: Growth, noise: float | None = None, redraw: float = 0.0) -> str:
    """Return a table with one line per kind of tensor over all layers, and how the loss changes.

    Args:
        growth: The planned growth.
        noise: Relative standard deviation of the noise on copies; None for the default of `grow`.
        redraw: Fraction of the copies' hidden units that are drawn again.
    """
    rows = [("tensor", "layers", "from", "to", "origin")]
    table = empty_model(growth.config).parameter_table()
    rows += [_row(growth, table, mappings) for mappings in _by_kind(table, growth.mappings).values()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    ]
    before = sum(r.total for name, r in growth.manifest.tensors.items() if name.endswith("/master"))
    after = sum(prod(mapping.shape) for mapping in growth.mappings)
    head = f"{growth.checkpoint} → {growth.config.run.folder}, {before:,} → {after:,} parameters"
    return "\n".join([head, *lines, *_remarks(growth, default_noise(growth.plan) if noise is None else noise, redraw)])


def _remarks(growth: Growth, noise: float, redraw: float) -> list[str]:
    plan = growth.plan
    disturbances = plan.disturbances(noise, redraw)
    remarks = [f"loss at the start: {'changed by ' + '; '.join(disturbances) if disturbances else 'unchanged'}"]
    if plan.copies > 1 and not noise and not redraw and plan.copies_per_token > 1:
        remarks.append("copies of an expert see the same tokens and stay equal; set --noise or --redraw above 0")
    if growth.config.model.experts.capacity_factor is not None and (plan.copies > 1 or plan.upcycled_layers):
        remarks.append("model.experts.capacity_factor drops tokens in training until the new experts are balanced")
    return remarks


def _by_kind(table: Table, mappings: list[TensorMapping]) -> dict[tuple[str, ...], list[TensorMapping]]:
    kinds: dict[tuple[str, ...], list[TensorMapping]] = {}
    for mapping in mappings:
        kinds.setdefault((table[mapping.name].local_name, str(mapping.shape), mapping.description), []).append(mapping)
    return kinds


def _row(growth: Growth, table: Table, mappings: list[TensorMapping]) -> tuple[str, str, str, str, str]:
    first = mappings[0]
    layers = [layer for mapping in mappings if (layer := table[mapping.name].layer) is not None]
    source = "" if first.source is None else _shape(growth.manifest.tensors[f"{first.source}/master"].shape)
    return table[first.name].local_name, _ranges(layers), source, _shape(first.shape), first.description


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _ranges(layers: list[int]) -> str:
    """The ranges 0-2,5 for the layers 0, 1, 2, 5."""
    starts = [layer for layer in layers if layer - 1 not in layers]
    ends = [layer for layer in layers if layer + 1 not in layers]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
