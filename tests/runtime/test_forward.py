"""The runtime computes what PyTorch does: every kind of model, in any pieces, with any kernels and threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kabrn_dist.inference.generate import GenerativeModel
from kabrn_dist.runtime.native import NativeContext, NativeModel
from kabrn_dist.utils.errors import UserError
from tests.support.native_models import KINDS, read_by_torch, write_random_model

TOKENS = [int(token) for token in np.random.default_rng(3).integers(0, 257, 12)]
SEEDS = range(3)


def decode_each(context: NativeContext, tokens: list[int]) -> np.ndarray:
    logits = [context.decode([token]) for token in tokens]
    return np.stack([each for each in logits if each is not None])


def open_random(kind: str, folder: Path, seed: int = 0, **options: str) -> tuple[GenerativeModel, NativeModel]:
    path = folder / f"{kind}-{seed}.mkb"
    model = write_random_model(kind, path, seed, options={"embedding_dtype": "fp32", **options})
    return model, NativeModel(path)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_torch(kind: str, tmp_path: Path) -> None:
    """Equal but where a value lies between two int8 codes: it may become either, also in torch's own two forms."""
    errors = []
    for seed in SEEDS:
        model, native = open_random(kind, tmp_path, seed)
        with native, native.context(max_tokens=len(TOKENS)) as context:
            errors.append(np.abs(decode_each(context, TOKENS) - read_by_torch(model, TOKENS).numpy()).max(1))
    assert np.mean(np.stack(errors) <= 1e-4) >= 0.7


@pytest.mark.parametrize("options", [{"ternary": "base3"}, {"embedding_dtype": "fp16"}, {"embedding_dtype": "int8"}])
def test_other_ways_to_store_a_model_are_read(options: dict[str, str], tmp_path: Path) -> None:
    model, native = open_random("rational", tmp_path, **options)
    if "embedding_dtype" in options:
        for weight in (model.embedding.weight, model.head.weight):
            weight.data = stored_as(weight.data, options["embedding_dtype"])
    with native, native.context() as context:
        errors = np.abs(decode_each(context, TOKENS[:8]) - read_by_torch(model, TOKENS[:8]).numpy()).max(1)
    assert np.median(errors) <= 1e-4


def stored_as(weight: torch.Tensor, dtype: str) -> torch.Tensor:
    if dtype == "fp16":
        return weight.half().float()
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round() * scale


@pytest.mark.parametrize("kind", ["rational", "bspline", "swiglu", "attention", "convolution", "dense", "plain"])
def test_pieces_and_threads_change_no_bit(kind: str, tmp_path: Path) -> None:
    tokens = TOKENS * 7
    _, native = open_random(kind, tmp_path)
    with native, native.context(max_tokens=len(tokens)) as context:
        whole = context.decode(tokens)
        context.reset()
        assert np.array_equal(decode_each(context, tokens)[-1], whole)
        for threads, first in ((2, 65), (3, 1)):
            with native.context(threads=threads, max_tokens=len(tokens)) as other:
                other.decode(tokens[:first], logits=False)
                assert np.array_equal(other.decode(tokens[first:]), whole)


def test_kernels_change_no_bit(tmp_path: Path, native_program: Path) -> None:
    for kind in ("rational", "hat", "swiglu", "plain"):
        open_random(kind, tmp_path, embedding_dtype="int8")[1].close()
    code = (
        "import sys; from kabrn_dist.runtime.native import NativeModel, native_kernels\n"
        f"for path in sys.argv[1:]:\n    with NativeModel(path) as m, m.context(max_tokens=99) as c: "
        f"print(native_kernels(), c.decode({TOKENS}).tobytes().hex())\n"
    )
    files = [str(path) for path in sorted(tmp_path.glob("*.mkb"))]
    results = {}
    for name in supported_kernels(native_program):
        done = subprocess.run(
            [sys.executable, "-c", code, *files],
            env={**os.environ, "MIXKABRN_KERNELS": name},
            capture_output=True,
            text=True,
            check=True,
        )
        lines = [line.split() for line in done.stdout.splitlines()]
        assert [line[0] for line in lines] == [name] * len(files)
        results[name] = [line[1] for line in lines]
    assert len(results) > 1 or sys.platform == "wasi"
    assert all(result == results["scalar"] for result in results.values())


def supported_kernels(program: Path) -> list[str]:
    done = subprocess.run(
        [program, "bench", "none"],
        env={**os.environ, "MIXKABRN_KERNELS": "abacus"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr.strip().rpartition(": ")[2].split(", ")


@pytest.mark.parametrize("kind", ["rational", "attention", "convolution"])
def test_a_saved_state_continues_with_the_same_bits(kind: str, tmp_path: Path) -> None:
    _, native = open_random(kind, tmp_path)
    with native, native.context(max_tokens=50) as context, native.context(threads=2, max_tokens=60) as other:
        context.decode(TOKENS)
        context.save_state(tmp_path / "chat.state")
        state = context.state()
        after = decode_each(context, TOKENS[:5])
        other.load_state(tmp_path / "chat.state")
        assert other.position == len(TOKENS) and other.state() == state
        assert np.array_equal(decode_each(other, TOKENS[:5]), after)
        other.set_state(state)
        assert np.array_equal(decode_each(other, TOKENS[:5]), after)
        other.reset()
        assert other.position == 0 and np.array_equal(other.decode(TOKENS[:1]), first_logits(native))
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []


def first_logits(native: NativeModel) -> np.ndarray:
    with native.context(max_tokens=1) as context:
        logits = context.decode(TOKENS[:1])
        assert logits is not None
        return logits


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    natives = [open_random("rational", tmp_path, seed)[1] for seed in (0, 1)]
    with natives[0] as one, natives[1] as two, one.context() as context, two.context() as other:
        context.decode(TOKENS[:2])
        with pytest.raises(UserError, match="another model"):
            other.set_state(context.state())
        context.save_state(tmp_path / "chat.state")
        with pytest.raises(UserError, match="another model"):
            other.load_state(tmp_path / "chat.state")
        assert other.position == 0


def test_what_cannot_be_read_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    _, native = open_random("attention", tmp_path)
    with native, native.context(max_tokens=4) as context:
        with pytest.raises(UserError, match="token 263 is not among the model's 263"):
            context.decode([1, 263])
        context.decode([1, 2, 3])
        with pytest.raises(UserError, match="max_tokens"):
            context.decode([1, 2])
        assert context.position == 3
        context.decode([1])
        with pytest.raises(UserError, match="max_tokens"):
            native.context(max_tokens=0)
