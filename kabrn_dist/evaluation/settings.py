"""What is asked of a model, in what way: all that the results of a task depend on beside the model itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Probability that drawn tokens have together, as evaluations of code use it (Chen et al., arXiv 2107.03374).
SAMPLING_TOP_P = 0.95


@dataclass(frozen=True)
class TaskSettings:
    """One task of an evaluation.

    Attributes:
        name: Of the task.
        data: Where its files are.
        split: Of the files.
        shots: Few-shot examples in a prompt.
        limit: Number of examples; 0 for all.
        seed: Chooses the few-shot examples and those of `limit`, and draws tokens.
        num_samples: Continuations of each prompt.
        temperature: Of their tokens; 0 takes the likeliest.
        prompt_tokens: Prompts with more tokens lose few-shot examples; 0: none does.
    """

    name: str
    data: Path
    split: str
    shots: int
    limit: int = 0
    seed: int = 0
    num_samples: int = 1
    temperature: float = 0.0
    prompt_tokens: int = 0

    def fixed(self) -> dict[str, Any]:
        """Return the settings that all results in one file share.

        The number of examples is not among them, as more can be added, and neither is the place of the data.
        """
        values = dataclasses.asdict(self)
        del values["data"], values["limit"], values["name"]
        return values

    def to_json(self) -> dict[str, Any]:
        """Return all settings as JSON has them."""
        return {**dataclasses.asdict(self), "data": str(self.data)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TaskSettings:
        """Return the settings that `to_json` returned."""
        return cls(**{**values, "data": Path(values["data"])})
