"""The section `parallel`: how the model and its optimizer are spread over ranks, and what travels between them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from kabrn_dist.utils.yaml_section import ConfigSection


class ParallelConfig(ConfigSection):
    """Sequence parallelism, expert parallelism, ZeRO and the formats on the wire."""

    sequence_parallel: PositiveInt = Field(
        1, description="Degree of sequence parallelism: ranks that split a sequence into slices."
    )
    state_exchange: Literal["auto", "scan", "ring", "allgather"] = Field(
        "auto", description="Algorithm that passes retention states between slices; affects speed only."
    )
    expert_parallel: PositiveInt = Field(
        1, description="Degree of expert parallelism: ranks that split one set of routed experts."
    )
    experts_per_rank: tuple[PositiveInt, ...] | Literal["auto"] | None = Field(
        None,
        description="Experts on each rank of an expert group, the same in all groups; may be uneven. `auto` chooses "
        "the numbers by rank_weights. Default: equal numbers.",
    )
    rank_weights: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        None,
        description="Relative speed of each rank of an expert group, for experts_per_rank: auto. Default: measured at "
        "the start, and limited by the memory of each rank.",
    )
    dispatch_dtype: Literal["int8", "plain"] = Field(
        "int8",
        description="What is sent to the experts: the quantized activations, one byte a value (exact), or values in "
        "the training precision. Always plain if model.quantize is false.",
    )
    dispatch_grad_dtype: Literal["plain", "int8"] = Field(
        "plain",
        description="What is sent back as the gradient of these activations: values in the training precision, or int8 "
        "with stochastic rounding (fewer bytes, more noise).",
    )
    ranks_per_node: PositiveInt | None = Field(
        None,
        description="Ranks on one machine; the exchange between experts runs within machines first, then between "
        "them. Default: as the launcher reports.",
    )
    shard_ternary: bool = Field(
        False,
        description="Shard each ternary matrix: a rank keeps a part of its fp32 latent weights, and ranks exchange two "
        "bits per weight once a step instead of 16 or 32. Needs zero_stage 1, which shards the other parameters.",
    )
    ternary_wire_format: Literal["two_bits", "base_three"] = Field(
        "two_bits",
        description="Packing of sharded codes on the wire: four per byte, or five, which take longer to unpack.",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1,
        description="ZeRO stage: ranks shard nothing (0), optimizer states (1), gradients too (2), or parameters too "
        "(3).",
    )
    bucket_size: PositiveInt = Field(
        50_000_000, description="Elements in a bucket that ZeRO reduces, gathers or prefetches at once."
    )

    @model_validator(mode="after")
    def _check_rank_weights(self) -> ParallelConfig:
        weights = self.rank_weights
        if weights is None:
            return self
        if self.experts_per_rank != "auto":
            raise ValueError(
                f"rank_weights {list(weights)} are for experts_per_rank: auto; set experts_per_rank to auto, or leave "
                "out rank_weights"
            )
        if len(weights) != self.expert_parallel:
            raise ValueError(
                f"rank_weights {list(weights)} has {len(weights)} entries for the {self.expert_parallel} ranks of "
                "parallel.expert_parallel; give one for each"
            )
        return self
