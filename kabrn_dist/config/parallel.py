"""What can be set of the layout: who holds which slice, expert and piece, and what travels between ranks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from kabrn_dist.utils.yaml_section import ConfigSection


class ParallelConfig(ConfigSection):
    sequence_parallel: PositiveInt = Field(
        1, description="Sequence parallelism: ranks that hold a slice each of a sequence."
    )
    state_exchange: Literal["auto", "scan", "ring", "allgather"] = Field(
        "auto", description="How retention's states travel between slices; changes speed only."
    )
    expert_parallel: PositiveInt = Field(
        1, description="Expert parallelism: ranks that share one set of routed experts."
    )
    experts_per_rank: tuple[PositiveInt, ...] | Literal["auto"] | None = Field(
        None,
        description="Experts on each rank of an expert group, uneven allowed, the same in all groups; `auto` gives "
        "each rank its share by rank_weights; default: equal shares.",
    )
    rank_weights: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        None,
        description="With experts_per_rank auto: speed of each rank of an expert group, in any unit; default: "
        "measured at the start, and limited by each rank's memory.",
    )
    dispatch_dtype: Literal["int8", "plain"] = Field(
        "int8",
        description="What travels to the experts: the quantised input itself, one byte a value (exact), or values of "
        "the training precision. Without model.quantize always plain.",
    )
    dispatch_grad_dtype: Literal["plain", "int8"] = Field(
        "plain",
        description="What travels back as the gradient of that input: the training precision, or int8 with stochastic "
        "rounding (saves bytes, adds noise).",
    )
    ranks_per_node: PositiveInt | None = Field(
        None,
        description="Ranks of one machine: experts' exchange goes inside machines first, then between them. Default: "
        "as the launcher says.",
    )
    shard_ternary: bool = Field(
        False,
        description="Share out each ternary matrix: a rank keeps a piece of its fp32 latents, and ranks send each "
        "other two bits a weight once a step instead of 16 or 32. With ZeRO 1, which shares out the rest.",
    )
    ternary_wire_format: Literal["two_bits", "base_three"] = Field(
        "two_bits", description="How shared-out codes travel: four a byte, or five, which takes longer to unpack."
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="ZeRO stage: what the ranks share out instead of copying.")
    bucket_size: PositiveInt = Field(50_000_000, description="Elements of a ZeRO reduce, gather or prefetch bucket.")

    @model_validator(mode="after")
    def _check_rank_weights(self) -> ParallelConfig:
        weights = self.rank_weights
        if weights is None:
            return self
        if self.experts_per_rank != "auto":
            raise ValueError(
                f"rank_weights {list(weights)} are for experts_per_rank: auto; set it so, or leave out rank_weights"
            )
        if len(weights) != self.expert_parallel:
            raise ValueError(
                f"rank_weights {list(weights)} has {len(weights)} entries for the {self.expert_parallel} ranks of "
                "parallel.expert_parallel; give one for each"
            )
        return self
