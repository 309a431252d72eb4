"""The section `finetune`: what a trained model is adapted by, and what is kept of it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt

from kabrn_dist.config.data import Location
from kabrn_dist.utils.yaml_section import ConfigSection


class FinetuneConfig(ConfigSection):
    """Fine-tuning of a trained model, the base. The section `model` may be left out: it is that of the base."""

    base: Path = Field(description="Folder of a run, of which the newest intact checkpoint is used, or of an export.")
    method: Literal["full", "lora", "ternary_lora", "state"] = Field(
        "lora",
        description="What is trained: `full`, all weights; `lora`, low-rank factors beside the frozen ternary codes "
        "(arXiv 2106.09685); `ternary_lora`, low-rank factors that are added to the latents before they are rounded, "
        "so that the result is a list of flipped codes; `state`, the states that retention begins documents with.",
    )
    rank: PositiveInt = Field(8, description="Rank of the factors, and of the initial states.")
    alpha: float = Field(
        16.0, gt=0, le=1e6, description="Scaling of the factors: alpha / rank, times the scale of the matrix."
    )
    targets: tuple[str, ...] = Field(
        ("mixer", "shared", "routed"),
        description="Matrices that get factors: `mixer`, `shared` (experts of all tokens and dense layers), `routed`; "
        "for lora also `router` and `head`; parts such as `query` or `down`; or patterns of whole names such as "
        "`blocks.3.*`. Without effect on full and state.",
    )
    replay: float = Field(
        0.0, ge=0, lt=1, description="Fraction of the training sequences that come from the base's own data."
    )
    base_data: Location | None = Field(
        None,
        description="Shards that the base was trained on, for replay and to measure what is forgotten. Default: those "
        "that the base's configuration names, where they can be read.",
    )

    init_adapter: Path | None = Field(
        None,
        description="Folder of a run on the same base whose adapter this run goes on with, such as on other data; with "
        "the same method, rank, alpha and targets. Default: a new adapter. A run of `full` names that run as its base.",
    )

    @property
    def trains_adapter(self) -> bool:
        """Whether an adapter is trained beside the base, which stays as it is."""
        return self.method != "full"
