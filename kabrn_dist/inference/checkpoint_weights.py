"""The weights of a checkpoint as the trainer computes with them, one parameter at a time, without a model in memory."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from kabrn_dist.checkpoint.fragment import Fragment
from kabrn_dist.checkpoint.manifest import Manifest
from kabrn_dist.checkpoint.reader import CheckpointReader, plan_reads
from kabrn_dist.config import Config
from kabrn_dist.inference.load import check_finite, list_shapes
from kabrn_dist.inference.working_copy import working_dtypes
from kabrn_dist.kernels.ternary import PACK_BLOCK
from kabrn_dist.ops.packing import pack
from kabrn_dist.ops.weight_quant import TernaryMatrices, ternarize
from kabrn_dist.utils.errors import UserError


class CheckpointWeights:
    """Reader of a checkpoint's parameters and routers' states, rounded to the trainer's working copies.

    Args:
        path: Folder of the checkpoint, which has been verified.
        manifest: Its manifest.
        config: Configuration of the run, with the model and the precision that were trained.

    Attributes:
        shapes: Name → shape of every parameter and state.
        dtypes: Name → dtype in which training computes with it, of parameters.
        lam: How far matrices are quantized at the checkpoint's step.

    Raises:
        UserError: for the checkpoint of an adapter, which holds no model.
    """

    def __init__(self, path: Path, manifest: Manifest, config: Config) -> None:
        _refuse_adapter(path.parent.parent, config)
        self._path, self._manifest, self._model = path, manifest, config.model
        self._reader = CheckpointReader(path)
        self.shapes = list_shapes(config)
        self.dtypes = working_dtypes(config, manifest.world_size)
        self.lam = config.model.quantization_lambda(manifest.step)

    def read(self, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return elements [start, stop) of the flattened fp32 master, or state, in a dtype.

        Raises:
            UserError: if a file cannot be read, or a number is not finite.
        """
        values = torch.empty(stop - start, dtype=dtype)
        piece = Fragment(name_in_checkpoint(name), self.shapes[name], start, values, owned=False)
        self._reader.read(plan_reads(self._path, self._manifest, [piece]))
        check_finite(self._path, name, values)
        return values

    def values(self, name: str) -> Tensor:
        """Return a parameter as the trainer computes with it, or a state, in fp32."""
        values = self.read(name, 0, prod(self.shapes[name]), self.dtypes.get(name, torch.float32))
        return values.float().view(self.shapes[name])

    def matrices(self, name: str) -> TernaryMatrices:
        """Return the codes and scales of a ternary parameter, all of its matrices at once."""
        shape = self.shapes[name]
        latents = self.read(name, 0, prod(shape), self.dtypes[name]).view(-1, *shape[-2:])
        return ternarize(latents, 1, self._model.scale_group_size)

    def each_matrix(self, name: str) -> Iterator[TernaryMatrices]:
        """Yield the codes and scales of one matrix of a ternary parameter after another."""
        *_, rows, columns = self.shapes[name]
        for start in range(0, prod(self.shapes[name]), rows * columns):
            latents = self.read(name, start, start + rows * columns, self.dtypes[name]).view(1, rows, columns)
            yield ternarize(latents, 1, self._model.scale_group_size)

    def packed_codes(self, name: str) -> Iterator[Tensor]:
        """Yield pieces of the uint8 that `pack` makes of all codes of a ternary parameter."""
        rest = torch.empty(0, dtype=torch.int8)
        for matrix in self.each_matrix(name):
            codes = torch.cat([rest, matrix.codes(torch.int8).view(-1)])
            whole = len(codes) // PACK_BLOCK * PACK_BLOCK
            rest = codes[whole:].clone()
            if whole:
                yield pack(codes[:whole])
        if len(rest):
            yield pack(rest)

    def scales(self, name: str) -> Tensor:
        """Return the scales [E,S] fp32 of a ternary parameter, each once."""
        group = self._model.scale_group_size
        return torch.cat([distinct_scales(matrix.gamma, group) for matrix in self.each_matrix(name)])


def _refuse_adapter(run: Path, config: Config) -> None:
    finetune = config.finetune
    if finetune is None or not finetune.trains_adapter:
        return
    raise UserError(
        f"{run}: trained an adapter ({finetune.method}) of {finetune.base}, and holds no model of its own; write the "
        f"adapter: mixkabrn adapter export {run} --out FOLDER, and use {finetune.base} with --adapter FOLDER"
    )


def distinct_scales(gamma: Tensor | None, scale_group_size: int | None) -> Tensor:
    """Return the scales [E,S] of γ [E,1,1], or [E,O,1] where groups of outputs have one each."""
    assert gamma is not None
    step = gamma.shape[1] if scale_group_size is None else min(scale_group_size, gamma.shape[1])
    # A copy even of a single scale, whose stride may be another than 1: readers view its bytes.
    return gamma[:, ::step, 0].clone(memory_format=torch.contiguous_format)


def is_router_state(name: str) -> bool:
    """Return whether a name of `list_shapes` is that of a state of the routers, not of a parameter."""
    return "/" in name


def name_in_checkpoint(name: str) -> str:
    """Return a tensor's name in the checkpoint."""
    return name if is_router_state(name) else f"{name}/master"
