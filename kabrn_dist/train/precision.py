"""The precision of a run for its devices: `training.precision: auto` becomes one that all ranks are good at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from kabrn_dist.checkpoint.layout import list_checkpoints
from kabrn_dist.config import Config
from kabrn_dist.config.file import load_config
from kabrn_dist.distributed.collectives import broadcast_json, gather_json
from kabrn_dist.train.throughput import time_matmul
from kabrn_dist.utils.errors import UserError

Precision = Literal["fp32", "fp16", "bf16"]
# On a processor, much of a step is no product, and in bf16 pays for conversions: products must be this much faster.
CLEARLY_FASTER = 2.0
TIMING_SECONDS = 0.05
# Tensor cores that multiply fp16; older cards are as fast in fp32.
FP16_CAPABILITY = (7, 0)


class PrecisionChoice(NamedTuple):
    """A precision, and why it was chosen.

    Attributes:
        precision: what a device is good at.
        reason: the end of a sentence that begins with "because".
    """

    precision: Precision
    reason: str


def resolve_precision(config: Config, device: torch.device) -> Config:
    """Return the configuration with a precision in place of `auto`, and print which and why. Collective.

    A run that has checkpoints keeps the precision of the session before, so that a resume continues with the same bits.

    Args:
        config: the whole configuration.
        device: of this process.
    """
    if config.training.precision != "auto":
        return config
    # Every rank measures at the same time, as they will compute at the same time.
    choices = [PrecisionChoice(*each) for each in gather_json(list(choose_precision(device, config)), None)]
    choice = PrecisionChoice(*broadcast_json(list(choose_earlier(config) or agree(choices)) if choices else None, None))
    if choices:
        print(f"training.precision auto: {choice.precision}, because {choice.reason}", flush=True)
    training = config.training.model_copy(update={"precision": choice.precision})
    return config.model_copy(update={"training": training})


def choose_earlier(config: Config) -> PrecisionChoice | None:
    """Return the precision of the run's earlier session; None if it has no checkpoint, or none can be read."""
    if not list_checkpoints(config.run.folder / "checkpoints"):
        return None
    try:
        earlier = load_config(config.run.folder / "config.yaml").training.precision
    except UserError:
        return None
    return None if earlier == "auto" else PrecisionChoice(earlier, "this run began with it")


def choose_precision(device: torch.device, config: Config) -> PrecisionChoice:
    """Return what a device is good at.

    Cards take bf16 if they multiply it (Ampere and later), else fp16 if they have tensor cores for it, else fp32.
    Processors take bf16 if they have units for it, and multiply it faster by far in the shapes of this model.

    Args:
        device: where to compute.
        config: gives the shape of a product.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return PrecisionChoice("bf16", f"{name} multiplies it")
        if torch.cuda.get_device_capability(device) >= FP16_CAPABILITY:
            return PrecisionChoice("fp16", f"{name} multiplies it, and not bf16")
        return PrecisionChoice("fp32", f"{name} is not faster in half precision")
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return PrecisionChoice("fp32", "this processor has no units for bf16")
    width = config.model.hidden_size
    shape = config.training.micro_batch_size * config.data.sequence_length, width, width
    times = time_matmul(device, torch.bfloat16, shape, TIMING_SECONDS) / time_matmul(
        device, torch.float32, shape, TIMING_SECONDS
    )
    precision: Precision = "bf16" if times >= CLEARLY_FASTER else "fp32"
    return PrecisionChoice(precision, f"this processor multiplies {width} columns in bf16 {times:.1f} times as fast")


def agree(choices: Sequence[PrecisionChoice]) -> PrecisionChoice:
    """Return one precision for all ranks: their own if it is the same, else one that every one of them trains in.

    Cards that multiply bf16 also multiply fp16; processors need not multiply either.
    """
    found = {choice.precision for choice in choices}
    if len(found) == 1:
        return choices[0]
    precision: Precision = "fp32" if "fp32" in found else "fp16"
    ranks = {each: [str(i) for i, choice in enumerate(choices) if choice.precision == each] for each in sorted(found)}
    said = ", ".join(f"{each} on rank{'s' * (len(on) > 1)} {', '.join(on)}" for each, on in ranks.items())
    return PrecisionChoice(precision, f"the ranks are good at different ones: {said}")
