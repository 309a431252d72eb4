"""Ternary codes and scales that an export holds beside its weights, where these were rounded from what was trained.

Rounding latents moves some across a threshold, and their scale a little: those codes would be another model's.

    NAME.codes    uint8, two bits a code, in blocks of 64 codes: byte i of a block's 16 holds codes i, 16 + i, 32 + i
                  and 48 + i of the flattened parameter, each plus 1, from its low bits up (`ops.packing.pack`)
    NAME.scales   fp32 [E,S]: a scale of each matrix, or of each group of its outputs

Shapes:
    E: matrices (experts).
    O: output features.
    S: scales of a matrix.
"""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from kabrn_dist.checkpoint.reader import read_entries
from kabrn_dist.kernels.ternary import PACK_BLOCK
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.ops.packing import pack, unpack
from kabrn_dist.ops.weight_quant import TernaryMatrices, TernaryModule, TernarySource, ternarize
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safetensors_header import TensorEntry

CODES_SUFFIX, SCALES_SUFFIX = ".codes", ".scales"
_LOW_BITS = 0b01010101


class StoredCodes(TernarySource):
    """The codes of one parameter, until its values change; from then on they are rounded from those.

    Args:
        parameter: The latents [E,O,I] or [O,I].
        packed: uint8, two bits a code (`pack`).
        scales: fp32 [E,S].
        scale_group_size: Outputs that share a scale; None for all of a matrix.
    """

    def __init__(self, parameter: nn.Parameter, packed: Tensor, scales: Tensor, scale_group_size: int | None) -> None:
        self._version, self._group = parameter._version, scale_group_size
        rows = parameter.shape[-2]
        if scale_group_size is not None:
            scales = scales.repeat_interleave(min(scale_group_size, rows), 1)[:, :rows]
        self._packed, self._gamma = packed, scales[:, :, None].contiguous()

    def read(self, parameter: nn.Parameter) -> TernaryMatrices:
        """Return the matrices; gradients reach `parameter` straight through the rounding."""
        latents = parameter if parameter.ndim == 3 else parameter[None]
        if parameter._version != self._version:
            return ternarize(latents, 1, self._group)
        if self._packed.device != parameter.device:
            self._packed, self._gamma = self._packed.to(parameter.device), self._gamma.to(parameter.device)
        return TernaryMatrices(latents, self._packed, self._gamma)


def code_shapes(shape: tuple[int, ...], scale_group_size: int | None) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors with the codes and scales of a parameter, by their suffixes."""
    matrices, rows = prod(shape[:-2]), shape[-2]
    scales = 1 if scale_group_size is None else -(-rows // scale_group_size)
    return {CODES_SUFFIX: (-(-prod(shape) // PACK_BLOCK) * PACK_BLOCK // 4,), SCALES_SUFFIX: (matrices, scales)}


def is_code_tensor(name: str) -> bool:
    """Return whether a tensor of an export holds codes or scales of a parameter."""
    return name.endswith((CODES_SUFFIX, SCALES_SUFFIX))


def check_stored_codes(entries: dict[str, tuple[Path, TensorEntry]], model: MixKABRN) -> None:
    """Check names, shapes and dtypes of an export's codes and scales, before anything is read.

    Args:
        entries: File and header entry of each tensor of the export.
        model: With the parameters of its configuration; their values are not needed.

    Raises:
        UserError: for a tensor of codes that is not of this model.
    """
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, info in model.parameter_table().items():
        if info.ternary and any(name + suffix in entries for suffix in (CODES_SUFFIX, SCALES_SUFFIX)):
            shapes = code_shapes(tuple(model.get_parameter(name).shape), model.config.scale_group_size)
            expected |= {name + CODES_SUFFIX: ("U8", shapes[CODES_SUFFIX])}
            expected |= {name + SCALES_SUFFIX: ("F32", shapes[SCALES_SUFFIX])}
    for name in {*filter(is_code_tensor, entries), *expected}:
        if name not in entries:
            raise UserError(
                f"{next(iter(entries.values()))[0]}: has no {name!r} beside its partner; export the run again"
            )
        file, entry = entries[name]
        if (entry.dtype, entry.shape) != expected.get(name):
            raise UserError(f"{file}: tensor {name!r} is {entry.dtype} {entry.shape}, not of this model; export again")


def attach_stored_codes(model: MixKABRN, entries: dict[str, tuple[Path, TensorEntry]]) -> None:
    """Make a model compute with the codes and scales that its export holds, if it holds any.

    Args:
        model: On its device, with the export's weights; its routed experts may be a part of the export's.
        entries: As for `check_stored_codes`, which has passed.

    Raises:
        UserError: for codes or scales with values that mean nothing.
    """
    table, local = model.parameter_table(), model.placement.local
    for prefix, module in model.named_modules():
        for leaf in module.stds if isinstance(module, TernaryModule) else ():
            name = f"{prefix}.{leaf}"
            if name + CODES_SUFFIX in entries:
                parameter = module.get_parameter(leaf)
                codes, scales = (_read(*entries[name + suffix]) for suffix in (CODES_SUFFIX, SCALES_SUFFIX))
                if has_wrong_codes(codes, scales):
                    file = entries[name + CODES_SUFFIX][0]
                    raise UserError(f"{file}: the codes or scales of {name!r} are none; use another export")
                if table[name].routed and len(scales) > len(local):
                    whole = unpack(codes, (len(scales), *parameter.shape[1:]), torch.int8)
                    codes, scales = pack(whole[local.start : local.stop]), scales[local.start : local.stop]
                place = parameter.device
                group = model.config.scale_group_size
                module.sources[leaf] = StoredCodes(parameter, codes.to(place), scales.to(place), group)


def has_wrong_codes(packed: Tensor, scales: Tensor) -> bool:
    """Return whether some packed codes are not of −1, 0, 1, or some scales not positive and finite."""
    return bool((packed & packed >> 1 & _LOW_BITS).any()) or not bool((scales.isfinite() & (scales > 0)).all())


def _read(file: Path, entry: TensorEntry) -> Tensor:
    values = torch.empty(entry.shape, dtype=torch.uint8 if entry.dtype == "U8" else torch.float32)
    read_entries(file, [(entry, 0, prod(entry.shape), values.view(-1))])
    return values
