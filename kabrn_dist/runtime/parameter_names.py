"""Names that parameters of the model have in runs and adapters, of the tensors of a model file. Needs no torch."""

from __future__ import annotations

from kabrn_dist.runtime.file_format import EXPERT_MATRICES

MIXER_MATRICES = ("query", "key", "value", "gate", "out")
# Tensors that are ternary in a quantized model: those that its hash of codes holds.
MATRIX_ROLES = frozenset(
    {f"mixer.{part}" for part in MIXER_MATRICES}
    | {f"{kind}.{part}" for kind in ("routed", "shared") for part in EXPERT_MATRICES}
)


def parameter_name(role: str, layer: int) -> str:
    """Return the name of the parameter that a matrix of a model file holds.

    Args:
        role: Of `MATRIX_ROLES`, or "router.weight", "embedding" or "head".
        layer: Number of the layer; not used for tensors of the whole model.

    Example:
        >>> parameter_name("mixer.out", 3), parameter_name("routed.up", 0)
        ('blocks.3.mixer.output.out.weight', 'blocks.0.mixture.routed.up')
    """
    kind, _, part = role.partition(".")
    if kind == "mixer":
        return f"blocks.{layer}.mixer.{'output' if part == 'out' else 'inputs'}.{part}.weight"
    return f"blocks.{layer}.mixture.{kind}.{part}" if part else f"{kind}.weight"
