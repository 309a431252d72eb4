"""What the mixture is held against. Each is a layer [1,N,D] → [1,N,D]; what is timed is one forward and backward pass.

All get the same tokens, the same SwiGLU experts and the same router, softmax over the chosen k. The router's rows are
orthonormal and the tokens Gaussian, so that loads differ by chance alone; `Inputs.imbalance` says by how much.

- ours: `MixtureOfExperts` with no shared expert, softmax scores, all its router's sums, its norm of the tokens and its
  norm before an expert's last product, which no rival has. `own_dense` is one network of our form, norms included.
- dense: one SwiGLU with the hidden width of the k experts a token visits; of two ways to take its first products, one
  matrix or two, two is the faster here. The same multiplications, so what a mixture takes beyond it is its overhead.
- bare products: only the nine products of each expert and pass, into memory already there. What no sorting of tokens
  by expert can beat without better kernels.
- deepspeed: `deepspeed.moe.layer.MoE` as it comes, without noise for the second expert. Dropless (`drop_tokens` off) it
  pads every expert to the fullest one's load; its capacity form, at its default factor 1, drops what does not fit.
- fairscale: `MOELayer` with its only gate, top-2, at its only capacity, the fair share; it draws the second expert at
  random. Its masks [N,E,N·k/E] are fp32.
- transformers: `MixtralSparseMoeBlock` with each of its back ends. `batched_mm` copies an expert's matrices for every
  token that visits it: at 1,024 tokens 3 GB, and 70 times the time of the others.
"""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import replace
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.moe_inputs import Function, Inputs, Layer, Shape, Swiglu, of_module
from kabrn_dist.config import ExpertsConfig, ModelConfig, RetentionConfig, RouterConfig
from kabrn_dist.distributed.all_to_all import ExpertLink, Traffic
from kabrn_dist.distributed.expert_placement import ExpertPlacement
from kabrn_dist.model.moe import DenseFeedForward, MixtureOfExperts, RouterInputs
from kabrn_dist.ops.grouped_mm import grouped_mm

# Bytes that batched_mm may copy of the experts' matrices, and fairscale may spend on one mask.
TOO_MUCH = 5e8


class Own(NamedTuple):
    """What our layer is made of: the form of experts, ternary and int8 or plain."""

    form: Literal["rational", "swiglu"] = "swiglu"
    quantized: bool = False

    def settings(self, shape: Shape) -> ModelConfig:
        """Return the configuration of a model with such a mixture."""
        return ModelConfig(
            vocab_size=1,
            hidden_size=shape.width,
            layers="R",
            retention=RetentionConfig(num_heads=1, key_dim=2, value_dim=1),
            experts=ExpertsConfig(
                type=self.form,
                num_experts=shape.experts,
                num_shared_experts=0,
                top_k=shape.top_k,
                expert_hidden_size=shape.hidden,
                dense_hidden_size=shape.top_k * shape.hidden,
            ),
            router=RouterConfig(score_func="softmax"),
            quantize=self.quantized,
        )


PLAIN = Own()
HERE = ExpertLink(ExpertPlacement((), 0), None, None, int8=False, backward_int8=False, traffic=Traffic())


def ours(inputs: Inputs, own: Own = PLAIN, wire: ExpertLink = HERE) -> Layer:
    """Its experts are drawn anew but for the router."""
    shape = inputs.shape
    if wire is HERE:
        wire = replace(HERE, placement=ExpertPlacement.single(shape.experts))
    layer = MixtureOfExperts(own.settings(shape), 1.0, wire)
    layer.routed.initialize(0, "experts")
    layer.router.weight.data.copy_(inputs.router)
    layer.to(inputs.dtype)
    guide = RouterInputs(torch.zeros(shape.experts), torch.full((shape.experts,), 1 / shape.experts), 0, None)

    def forward(x: Tensor) -> Tensor:
        out, _ = layer(x, guide)
        return out

    return of_module(layer, forward)


def own_dense(inputs: Inputs, own: Own = PLAIN) -> Layer:
    """Return our own network of the same FLOPs, with one expert."""
    layer = DenseFeedForward(own.settings(inputs.shape), 1.0)
    layer.shared.initialize(0, "dense")
    return of_module(layer.to(inputs.dtype))


def dense(inputs: Inputs) -> Layer:
    """Return a dense SwiGLU network of the same FLOPs."""
    k = inputs.shape.top_k
    return of_module(Swiglu(inputs.gate[:k].flatten(0, 1), inputs.up[:k].flatten(0, 1), _side_by_side(inputs.down[:k])))


def _side_by_side(down: Tensor) -> Tensor:
    """[k,D,H] → [D,k·H]."""
    return down.transpose(0, 1).flatten(1)


def bare_products(inputs: Inputs) -> Function:
    """Rows of each expert together, as if they had arrived so."""
    shape, dtype = inputs.shape, inputs.dtype
    copies = shape.tokens * shape.top_k
    wide, narrow = (torch.ones(copies, width, dtype=dtype) for width in (shape.hidden, shape.width))
    wide_out, narrow_out = torch.empty_like(wide), torch.empty_like(narrow)
    for_up, for_down = torch.empty_like(inputs.up), torch.empty_like(inputs.down)
    products: list[tuple[Tensor, Tensor, Tensor]] = []
    start = 0
    for expert, n in enumerate(inputs.counts):
        rows = slice(start, start + n)
        start += n
        to_wide, to_narrow = inputs.up[expert], inputs.down[expert]
        # gate and up; down; their gradients of rows; their gradients of matrices.
        products += 2 * [(narrow[rows], to_wide.T, wide_out[rows])]
        products += [(wide[rows], to_narrow.T, narrow_out[rows])]
        products += 2 * [(wide[rows], to_wide, narrow_out[rows])]
        products += [(narrow[rows], to_narrow, wide_out[rows])]
        products += 2 * [(wide[rows].T, narrow[rows], for_up[expert])]
        products += [(narrow[rows].T, wide[rows], for_down[expert])]

    # Three matrices, forward, for the rows and for the matrices.
    flops = 3 * 3 * 2 * copies * shape.hidden * shape.width
    assert flops == sum(2 * left.shape[0] * left.shape[1] * right.shape[1] for left, right, _ in products)

    def all_products() -> None:
        for left, right, out in products:
            torch.mm(left, right, out=out)

    return all_products


def join_deepspeed() -> None:
    """What deepspeed and fairscale ask for before they make a layer: process groups, here of one process."""
    import deepspeed.comm
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # As training does: DeepSpeed would compile a kernel for inference, and wait for ever on a lock that a killed
    # compilation left behind.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.comm.init_distributed("gloo", auto_mpi_discovery=False)


def deepspeed(inputs: Inputs, dropless: bool, ranks: int = 1, rank: int = 0) -> Layer:
    """With `ranks` above 1 the experts are spread over so many; this one holds its share. Collective."""
    from deepspeed.moe.layer import MoE

    shape = inputs.shape
    local = shape.experts // ranks
    mine = inputs.experts()[rank * local : (rank + 1) * local]
    # Its notes on groups go to stdout, and so into the table.
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        join_deepspeed()
        layer = MoE(
            shape.width,
            mine[0],
            shape.experts,
            ep_size=ranks,
            k=shape.top_k,
            drop_tokens=not dropless,
            top2_2nd_expert_sampling=False,
        )
        layer.set_deepspeed_parallelism()
    layer.deepspeed_moe.experts.deepspeed_experts = nn.ModuleList(mine)
    layer.deepspeed_moe.gate.wg.weight = nn.Parameter(inputs.router.clone())
    return of_module(layer, lambda x: layer(x)[0])


def fairscale(inputs: Inputs) -> Layer | str:
    """The layer, or why it cannot run."""
    shape = inputs.shape
    if inputs.dtype != torch.float32:
        return "missing: fp32 only (it mixes in fp32 masks)"
    if shape.top_k != 2:
        return "missing: its gate is top-2"
    if shape.tokens**2 * 2 * 4 > TOO_MUCH:
        return "missing: too much memory for its masks"
    from fairscale.nn.moe import MOELayer, Top2Gate

    join_deepspeed()
    gate = Top2Gate(shape.width, shape.experts)
    gate.wg.weight = nn.Parameter(inputs.router.clone())
    layer = MOELayer(gate, nn.ModuleList(inputs.experts()))
    # It wants its first dimension to be a multiple of the experts.
    return of_module(layer, lambda x: layer(x.view(shape.experts, -1, shape.width)).view_as(x))


def transformers(inputs: Inputs, back_end: str) -> Layer | str:
    """Return the layer, or why it cannot run.

    Args:
        inputs: of all mixtures.
        back_end: eager, grouped_mm or batched_mm.
    """
    shape = inputs.shape
    copied = shape.tokens * shape.top_k * 3 * shape.hidden * shape.width * inputs.x.element_size()
    if back_end == "batched_mm" and copied > TOO_MUCH:
        return f"missing: would copy {copied / 1e9:.1f} GB of matrices"
    try:
        mixtral = import_module("transformers.models.mixtral.modeling_mixtral")
    except ImportError as error:
        return f"missing: {error.name} (pip install --no-deps transformers regex)"
    settings = mixtral.MixtralConfig(
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        experts_implementation=back_end,
    )
    layer: Any = mixtral.MixtralSparseMoeBlock(settings)
    layer.gate.weight = nn.Parameter(inputs.router.clone())
    layer.experts.gate_up_proj = nn.Parameter(torch.cat([inputs.gate, inputs.up], 1))
    layer.experts.down_proj = nn.Parameter(inputs.down.clone())
    return of_module(layer)


def grouped_products(inputs: Inputs, device: str) -> dict[str, Function]:
    """Rows sorted by expert times their `up`, ours, torch's (which torchtitan uses), and all rows by one matrix."""
    weight = inputs.up.to(device)
    counts = inputs.counts
    rows = torch.ones(sum(counts), inputs.shape.width, dtype=inputs.dtype, device=device)
    ends = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
    columns = weight.transpose(1, 2)
    return {
        "ours": lambda: grouped_mm(rows, weight, counts),
        "torch._grouped_mm": lambda: torch._grouped_mm(rows, columns, offs=ends),
        "one large matrix": lambda: rows @ columns[0],
    }
