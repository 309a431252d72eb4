"""The precision of a run for its devices: `training.precision: auto` becomes one that all ranks are good at."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from kabrn_dist.checkpoint.layout import list_checkpoints
from kabrn_dist.config import Config
from kabrn_dist.config.file import load_config
from kabrn_dist.data.dataset import Batch
from kabrn_dist.distributed.collectives import broadcast_json, gather_json
from kabrn_dist.distributed.expert_placement import ExpertPlacement
from kabrn_dist.distributed.mesh import single_process_mesh
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.utils.errors import UserError

Precision = Literal["fp32", "fp16", "bf16"]
# How much less time layers must take in bf16: a choice should not hang on noise.
CLEARLY_LESS = 0.9
# Of each precision: rounds at least, and as many as fit these seconds.
TIMED_TOKENS, TIMED_LAYERS, TIMED_ROUNDS, TIMED_SECONDS = 2048, 4, 2, 1.5
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
    Processors take bf16 if they have units for it and its layers take less time in it: much of the work of
    a small one is no product, and is faster in fp32.

    Args:
        device: where to compute.
        config: says which model, and how many tokens it takes at a time.
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
    wide, half = time_layers(config).values()
    precision: Precision = "bf16" if half < CLEARLY_LESS * wide else "fp32"
    return PrecisionChoice(
        precision,
        f"a pass through the first layers takes {half * 1e3:.0f} ms in bf16 and {wide * 1e3:.0f} ms in fp32 here",
    )


def time_layers(config: Config) -> dict[torch.dtype, float]:
    """Return the seconds of a forward and backward pass on the processor, in fp32 and in bf16.

    The model is this one with its first layers only; its routers and functions stay fp32, as in training.
    """
    length = min(config.data.sequence_length, TIMED_TOKENS)
    rows = min(config.training.micro_batch_size, max(1, TIMED_TOKENS // length))
    tokens = torch.arange(rows * length).view(rows, length) % config.model.vocab_size
    zeros = torch.zeros_like(tokens)
    batch = Batch(tokens, tokens, zeros, torch.arange(length).expand_as(tokens), zeros[:, 0])
    models = {dtype: _make_layers(config, dtype) for dtype in (torch.float32, torch.bfloat16)}
    times = dict.fromkeys(models, float("inf"))
    start, rounds = time.perf_counter(), 0
    # In turns: a busy moment of the machine hits both.
    while rounds < TIMED_ROUNDS or time.perf_counter() - start < TIMED_SECONDS:
        rounds += 1
        for dtype, model in models.items():
            begin = time.perf_counter()
            model(batch).language.backward()
            times[dtype] = min(times[dtype], time.perf_counter() - begin)
            model.zero_grad(set_to_none=True)
    return times


def _make_layers(config: Config, dtype: torch.dtype) -> MixKABRN:
    short = config.model.model_copy(update={"layers": config.model.layers[:TIMED_LAYERS]})
    model = MixKABRN(short, ExpertPlacement.single(short.experts.num_experts), single_process_mesh("cpu"))
    model.initialize(config.run.seed)
    for parameter in model.select_parameters(lambda p: not p.learned_function and p.role != "router"):
        parameter.data = parameter.data.to(dtype)
    return model


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
