"""Result of looking through a store's folder for a checkpoint that can be used."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

# A message names so many damaged checkpoints.
SHOWN_FAULTS = 8


class Survey(NamedTuple):
    """What a store's folder holds, as far down as the newest checkpoint that can be used.

    Attributes:
        path: the newest intact checkpoint; None if there is none.
        faults: what is wrong with each newer one, by name.
    """

    path: Path | None
    faults: dict[str, str]

    def explain(self) -> str:
        """Return what is wrong with each checkpoint as one text; of many, the first ones."""
        shown = [f"{name}: {fault}" for name, fault in list(self.faults.items())[:SHOWN_FAULTS]]
        more = len(self.faults) - len(shown)
        return " | ".join([*shown, f"and {more} more"] if more else shown)
