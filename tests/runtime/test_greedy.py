"""Greedy texts of the runtime in C are those of `mixkabrn generate`, token by token, for a model that was trained."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.inference.generate import GenerativeModel
from kabrn_dist.inference.run import Run
from kabrn_dist.runtime.model_file import read_model_file, write_model_file
from kabrn_dist.runtime.native import NativeModel
from tests.support.models import MODEL_KINDS, make_model, make_model_config
from tests.support.runs import make_shards, run_training, write_small_config

# Kinds whose inference sums nothing but whole numbers, or in one order on both sides.
EXACT_KINDS = ("rational", "chebyshev", "swiglu", "relu2", "shared experts", "routed alone", "router groups")


def greedy_text(model: NativeModel, prompt: str, tokens: int) -> bytes:
    with model.context() as context:
        context.set_sampling(temperature=0)
        logits, text = context.decode([model.info.document_token, *model.tokenize(prompt)]), b""
        for _ in range(tokens):
            assert logits is not None
            token = context.sample(logits)
            if token == model.info.document_token:
                break
            text += model.token_bytes(token)
            logits = context.decode([token])
    return text


def count_same_texts(model: GenerativeModel, tokenizer: Tokenizer, file: Path, prompts: list[str], tokens: int) -> int:
    with NativeModel(file) as native:
        return sum(
            "".join(model.generate(prompt, tokenizer, tokens, temperature=0))
            == greedy_text(native, prompt, tokens).decode(errors="replace")
            for prompt in prompts
        )


def count_same_rows(
    model: GenerativeModel, tokenizer: Tokenizer, file: Path, groups: list[list[str]], tokens: int
) -> int:
    """Count the prompts whose texts are the same; those of a group have equally many tokens."""
    with NativeModel(file) as native:
        return sum(
            greedy_text(native, prompt, tokens) == expected
            for prompts in groups
            for prompt, expected in zip(prompts, greedy_texts_of_rows(model, tokenizer, prompts, tokens), strict=True)
        )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[str]]:
    folder = tmp_path_factory.mktemp("greedy")
    shards = make_shards(folder, "--vocabulary", "400")
    config = write_small_config(
        folder / "run.yaml",
        shards,
        folder / "run",
        model__vocab_size=400,
        model__short_conv_size=4,
        model__experts__num_experts=8,
        model__experts__top_k=3,
        training__steps=60,
    )
    result = run_training(1, "--config", str(config))
    assert result.exit_code == 0, result.output
    text = "".join(path.read_text() for path in sorted((folder / "texts").iterdir()))
    draw = random.Random(0)
    starts = [draw.randrange(len(text) - 200) for _ in range(100)]
    return Run.open(folder / "run"), [text[start : start + draw.randrange(1, 160)] for start in starts]


def greedy_texts_of_rows(model: GenerativeModel, tokenizer: Tokenizer, prompts: list[str], tokens: int) -> list[bytes]:
    """Write the likeliest texts of prompts that have equally many tokens, all at once."""
    ids = torch.tensor([[tokenizer.document_token, *tokenizer.encode(prompt)] for prompt in prompts])
    positions, states, drawn = torch.arange(ids.shape[1]).expand_as(ids), None, []
    for _ in range(tokens):
        logits, states = model.decode(ids, torch.zeros_like(ids), positions, states)
        ids, positions = logits[:, : tokenizer.vocab_size].argmax(-1, keepdim=True), positions[:, -1:] + 1
        drawn.append(ids)
    rows = torch.cat(drawn, 1).tolist()
    ends = [row.index(tokenizer.document_token) if tokenizer.document_token in row else tokens for row in rows]
    return [tokenizer.decode_bytes(row[:end]) for row, end in zip(rows, ends, strict=True)]


def cut_prompts(tokenizer: Tokenizer, texts: list[str], length: int, count: int) -> list[str]:
    """Return the beginnings of texts that have `length` tokens, cut to these."""
    beginnings = [tokenizer.decode(tokenizer.encode(text)[:length]) for text in texts]
    found = [text for text in beginnings if len(tokenizer.encode(text)) == length and "\ufffd" not in text]
    return found[:count]


@pytest.mark.slow
def test_a_hundred_greedy_texts_are_those_of_generate(trained: tuple[Run, list[str]], tmp_path: Path) -> None:
    """Two of them by `generate` itself, the others by the decoding that it uses, in rows of equally many tokens."""
    run, texts = trained
    model, tokenizer = run.model(), run.tokenizer()
    write_model_file(model, run.config, tokenizer, run.step, tmp_path / "m.mkb", "fp32")
    groups = [cut_prompts(tokenizer, texts, length, 40) for length in (1, 9, 24)]
    assert sum(map(len, groups)) >= 100
    assert count_same_rows(model, tokenizer, tmp_path / "m.mkb", groups, 256) == sum(map(len, groups))
    assert count_same_texts(model, tokenizer, tmp_path / "m.mkb", texts[:2], 256) == 2


@pytest.mark.slow
def test_with_an_embedding_in_int8_they_are_those_of_its_values(trained: tuple[Run, list[str]], tmp_path: Path) -> None:
    run, texts = trained
    model, tokenizer = run.model(), run.tokenizer()
    write_model_file(model, run.config, tokenizer, run.step, tmp_path / "m.mkb")
    file = read_model_file(tmp_path / "m.mkb")
    model.embedding.weight.data = torch.from_numpy(file.read("embedding").values[0])
    model.head.weight.data = torch.from_numpy(file.read("head").values[0])
    prompts = cut_prompts(tokenizer, texts, 9, 40)
    assert len(prompts) >= 20
    assert count_same_rows(model, tokenizer, tmp_path / "m.mkb", [prompts], 128) == len(prompts)


@pytest.mark.parametrize("kind", EXACT_KINDS)
def test_hundreds_of_tokens_leave_no_trace_of_rounding(kind: str, tmp_path: Path) -> None:
    """A single int8 input that rounds the other way changes logits by 1e-3, and those of all later tokens."""
    config = make_model_config(*MODEL_KINDS[kind], "model.short_conv_size=3")
    model, tokenizer = make_model(config), Tokenizer.of_bytes()
    write_model_file(model, config, tokenizer, 1, tmp_path / "m.mkb", "fp32")
    tokens = torch.randint(0, 257, (1, 300), generator=torch.Generator().manual_seed(1))
    states, worst = None, 0.0
    with NativeModel(tmp_path / "m.mkb") as native, native.context() as context:
        for first in (*range(0, 200, 50), *range(200, 300)):
            part = slice(first, first + (50 if first < 200 else 1))
            ids = tokens[:, part]
            positions = torch.arange(300)[None, part]
            logits, states = model.decode(ids, torch.zeros_like(ids), positions, states)
            found = context.decode(ids[0].tolist())
            assert found is not None
            worst = max(worst, float(np.abs(found - logits[0].numpy()).max()))
    assert worst <= 2e-6
