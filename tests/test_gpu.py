"""Training on a card: every precision and ZeRO stage learns and resumes, and fp32 agrees with the CPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from kabrn_dist.ops.retention import log_decays
from kabrn_dist.ops.retention_chunkwise import retention_torch
from kabrn_dist.ops.retention_fla import find_kernel, retention_fla
from tests.support.runs import read_losses, run_sessions, write_small_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_each_stage_learns_and_resumes(precision: str, shards: Path, tmp_path: Path) -> None:
    jobs: list[list[object]] = []
    for zero in (0, 1, 2, 3):
        for name, stops in (("whole", [None]), ("parts", [6, None])):
            path = write_small_config(
                tmp_path / f"{name}{zero}.yaml",
                shards,
                tmp_path / f"{name}{zero}",
                parallel__zero_stage=zero,
                training__precision=precision,
                training__steps=20,
            )
            jobs += [[str(path), "auto", stop] for stop in stops]
    run_sessions(1, jobs, tmp_path)
    for zero in (0, 1, 2, 3):
        whole = read_losses(tmp_path / f"whole{zero}")
        assert whole[-1] < whole[0] - 0.3, f"ZeRO {zero}"
        parts = read_losses(tmp_path / f"parts{zero}")
        assert parts == pytest.approx(whole, abs=5e-2), f"ZeRO {zero}"
        if precision == "fp16":
            scales = [read_losses(tmp_path / f"{name}{zero}", "optimizer/loss_scale") for name in ("whole", "parts")]
            assert scales[0] == scales[1], f"ZeRO {zero}"


def test_fp32_agrees_with_the_cpu(shards: Path, tmp_path: Path) -> None:
    for name, variables in (("card", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"})):
        path = write_small_config(tmp_path / f"{name}.yaml", shards, tmp_path / name, model__quantize=False)
        run_sessions(1, [[str(path), "never", None]], tmp_path, **variables)
    assert read_losses(tmp_path / "card") == pytest.approx(read_losses(tmp_path / "cpu"), abs=1e-4)


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fla_kernels_agree_with_the_torch_form_on_packed_documents(width: int, dtype: torch.dtype) -> None:
    kernel = find_kernel()
    if kernel is None:
        pytest.skip("flash-linear-attention is not installed or not usable here")
    documents = torch.tensor([[0] * 200 + [1] * 1 + [2] * 299, [0] * 500]).cuda()
    log_decay = torch.tensor(log_decays("exponent", 4)).cuda()
    results = []
    for form in (partial(retention_fla, kernel), retention_torch):
        torch.manual_seed(width)
        leaves = [torch.randn(2, 4, 500, width, device="cuda", dtype=dtype).requires_grad_() for _ in range(3)]
        state = torch.randn(2, 4, width, width, device="cuda").requires_grad_()
        out, after = form(*leaves, log_decay, documents, state)
        (out.float() * torch.linspace(-1, 1, 500, device="cuda")[:, None]).sum().backward()
        results.append([out, after, *(x.grad for x in (*leaves, state))])
    for fast, slow in zip(*results, strict=True):
        assert fast is not None and slow is not None
        scale = slow.float().abs().max()
        assert float((fast.float() - slow.float()).abs().max() / scale) <= 2e-2
