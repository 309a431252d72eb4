"""The section `data`: shard sets, their weights and the cache for remote ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from kabrn_dist.utils.user_values import read_location
from kabrn_dist.utils.yaml_section import ConfigSection

Location = Annotated[str, AfterValidator(read_location)]


class ExtraSetConfig(ConfigSection):
    """Another shard set that training samples from."""

    path: Location = Field(description="Folder or URL with shards and index.json.")
    weight: float = Field(1.0, gt=0, description="Factor on the weights of the set's sources.")


class DataConfig(ConfigSection):
    """Shard sets to train on, and how they are mixed."""

    path: Location = Field(
        description="Folder with shards and index.json, made by `mixkabrn prepare`, or its URL: s3://, gs://, "
        "http(s):// or hf://."
    )
    sequence_length: int = Field(ge=2, description="Tokens in one training sequence.")
    extra_sets: tuple[ExtraSetConfig, ...] = Field(
        (), description="Further shard sets made with the same tokenizer, sampled by weight."
    )
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict,
        description="Sampling weight by source name, in any unit; overrides the weights in index.json.",
    )
    epochs: dict[str, Annotated[float, Field(gt=0, le=1e6)]] = Field(
        default_factory=dict,
        description="Number of epochs by source name after which the source is exhausted; overrides index.json.",
    )
    cache_dir: Path = Field(Path("data/cache"), description="Folder on this machine that caches the shards of URLs.")
    cache_size_gb: float = Field(20.0, gt=0, description="Size limit of the cache in GB.")
