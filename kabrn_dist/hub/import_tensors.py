"""Tensors of another model, as those of ours: which is which, how exactly it is carried over, and what is folded.

RMSNorm before a product: theirs has a gain and their ε, ours has neither. The gain goes into the columns of the
matrices that read the norm. RMSNorm(s·x; ε) = RMSNorm(x; ε/s²), so with everything on the residual stream times
s = √(our ε / their ε) our norms are theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor

from kabrn_dist.hub.import_source import ForeignModel

How = Literal["exact", "approximate", "new"]
# Of `rms_norm`.
OUR_EPS = 1e-6


@dataclass(frozen=True)
class TensorOrigin:
    """Where a tensor of our model comes from.

    Attributes:
        name: Its name.
        sources: Names of their tensors that it is made of; none for a new one.
        how: "exact": with the same input it gives the same output as theirs; "approximate": it does not, or stands in
            another place; "new": theirs has nothing of the kind.
        remark: What differs, or what is folded in.
        make: Returns its values; None leaves what was drawn.
    """

    name: str
    sources: tuple[str, ...]
    how: How
    remark: str
    make: Callable[[], Tensor] | None


@dataclass
class ImportedModel:
    """How another model becomes one of ours.

    Attributes:
        kind: "retnet" or "llama".
        source: The other model.
        model: Section `model` of our configuration.
        eps: ε of their norms.
        origins: Of every tensor of our model.
        dropped: Parts of theirs that have no place here, in words.
    """

    kind: str
    source: ForeignModel
    model: dict[str, Any]
    eps: float
    origins: list[TensorOrigin] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    @property
    def stream_scale(self) -> float:
        """Factor on the residual stream with which our norms have their ε."""
        return sqrt(OUR_EPS / self.eps) if self.eps > 0 else 1.0

    def add(
        self, name: str, sources: tuple[str, ...], how: How, remark: str, make: Callable[[], Tensor] | None = None
    ) -> None:
        """Add the origin of a tensor."""
        self.origins.append(TensorOrigin(name, sources, how, remark, make))

    def list_unused(self) -> list[str]:
        """Return their tensors that nothing is made of, those of all layers together, in words.

        The angles of rotary positions are no weights.
        """
        used = {source for origin in self.origins for source in origin.sources}
        counts: dict[str, int] = {}
        for name in self.source.tensors:
            if name not in used and not name.endswith("inv_freq"):
                kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
                counts[kind] = counts.get(kind, 0) + 1
        return [f"tensor {kind}" + (f", in {count} layers" if count > 1 else "") for kind, count in counts.items()]


def map_ends(imported: ImportedModel, embedding: str, norm: str, head: str) -> None:
    """Add the origins of embedding and head.

    Args:
        imported: Gets them.
        embedding: Name of their embedding.
        norm: Name of the gain of their last norm.
        head: Name of their head, which may be tied to the embedding and missing.
    """
    source, scale = imported.source, imported.stream_scale
    shape = source.size("vocab_size"), source.size("hidden_size")
    tied = head not in source.tensors or bool(source.get("tie_word_embeddings", default=False))
    matrix = embedding if tied else head
    factor = "" if scale == 1 else f", × {scale:.3g}, which gives our norms their ε of {imported.eps:g}"
    imported.add(
        "embedding.weight", (embedding,), "exact", f"as it is{factor}", lambda: source.read(embedding, shape) * scale
    )
    gain = read_gain(source, norm)
    remark = "a copy of the embedding, no longer tied; " if tied else ""
    sources = (matrix, *((norm,) if norm in source.tensors else ()))
    imported.add(
        "head.weight",
        sources,
        "exact",
        f"{remark}the gain of the last norm is in it",
        lambda: source.read(matrix, shape) * gain(),
    )


def map_feed_forward(imported: ImportedModel, layer: int, prefix: str, norm: str, hidden: int) -> None:
    """Add the origins of a SwiGLU feed-forward.

    Args:
        imported: Gets them.
        layer: Number of the layer.
        prefix: Of the names of its matrices.
        norm: Name of the gain of the norm before it.
        hidden: Its hidden units.
    """
    source, size = imported.source, imported.source.size("hidden_size")
    gain = read_gain(source, norm)
    for name in ("gate", "up"):
        theirs = f"{prefix}{name}_proj.weight"
        imported.add(
            f"blocks.{layer}.mixture.shared.{name}",
            (theirs, *((norm,) if norm in source.tensors else ())),
            "exact",
            "the gain of the norm before it is in it",
            _folded(source, theirs, (hidden, size), gain, stacked=True),
        )
    theirs = f"{prefix}down_proj.weight"
    scale = imported.stream_scale
    imported.add(
        f"blocks.{layer}.mixture.shared.down",
        (theirs,),
        "approximate",
        "ours has an RMSNorm before it; times the mean that this divides by",
        lambda: (source.read(theirs, (size, hidden)) * scale)[None],
    )


def map_projection(
    imported: ImportedModel,
    name: str,
    theirs: str,
    norm: str,
    size: tuple[int, int],
    heads: tuple[int, int],
    how: How,
    remark: str,
    factor: float = 1.0,
) -> None:
    """Add the origin of a projection of a mixer.

    Args:
        imported: Gets it.
        name: Of ours.
        theirs: Name of theirs.
        norm: Name of the gain of the norm before it.
        size: Rows and columns of theirs.
        heads: Our heads and theirs; theirs are repeated if they are fewer.
        how: As `TensorOrigin.how`.
        remark: As `TensorOrigin.remark`.
        factor: Times it.
    """
    source = imported.source
    gain = read_gain(source, norm)
    copies = heads[0] // heads[1]
    folded = _folded(source, theirs, size, gain)

    def make() -> Tensor:
        matrix = folded() * factor
        return matrix.unflatten(0, (heads[1], -1)).repeat_interleave(copies, 0).flatten(0, 1)

    if copies > 1:
        remark = f"{remark}; each of {heads[1]} heads {copies} times"
    imported.add(name, (theirs, *((norm,) if norm in source.tensors else ())), how, remark, make)


def read_gain(source: ForeignModel, name: str) -> Callable[[], Tensor]:
    """Return a reader of the gain of a norm; of ones if the norm has none."""
    if name not in source.tensors:
        return lambda: torch.ones(1)
    return lambda: source.read(name, (source.size("hidden_size"),))


def _folded(
    source: ForeignModel, name: str, shape: tuple[int, int], gain: Callable[[], Tensor], stacked: bool = False
) -> Callable[[], Tensor]:
    def make() -> Tensor:
        matrix = source.read(name, shape) * gain()
        return matrix[None] if stacked else matrix

    return make
