"""Small models of every kind as exports for Hugging Face, with what is expected of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from kabrn_dist.config import Config
from kabrn_dist.data.dataset import Batch
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.hub.export import prepare_hub_export, write_hub_export
from kabrn_dist.hub.tensors import hub_name
from kabrn_dist.hub.training_record import TrainingRecord
from kabrn_dist.inference.checkpoint_weights import distinct_scales
from kabrn_dist.inference.generate import GenerativeModel
from kabrn_dist.ops.packing import pack
from kabrn_dist.runtime.weights import ModelWeights
from tests.support.models import make_model, make_model_config

TOKENS = 70


class ModelSource:
    """The weights of a model in this process; see `ExportSource`."""

    def __init__(self, model: GenerativeModel, config: Config) -> None:
        named = dict(model.named_parameters())
        self._values = named | model.routers.named()
        self._weights, self._group = ModelWeights(model), config.model.scale_group_size
        self.shapes = {name: tuple(values.shape) for name, values in self._values.items()}
        self.dtypes = dict.fromkeys(named, torch.float32)
        self.lam = self._weights.lam

    def read(self, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return self._values[name].detach().reshape(-1)[start:stop].to(dtype)

    def packed_codes(self, name: str) -> Iterator[Tensor]:
        yield pack(self._weights.matrices(name).codes(torch.int8).reshape(-1))

    def scales(self, name: str) -> Tensor:
        return distinct_scales(self._weights.matrices(name).gamma, self._group)


def write_hub_model(folder: Path, tokenizer: Tokenizer, *overrides: str, template: str = "") -> GenerativeModel:
    """Write folder/latent and, of a ternary model, folder/ternary; return the model."""
    config = make_model_config(f"model.vocab_size={max(300, tokenizer.vocab_size)}", *overrides)
    model = make_model(config)
    folder.mkdir()
    for flavor in ("latent", "ternary") if config.model.quantize else ("latent",):
        export = prepare_hub_export(
            config,
            3,
            ModelSource(model, config),
            tokenizer,
            flavor,  # type: ignore[arg-type]
            (template, "template") if template else None,
            TrainingRecord({}, None, [], []),
        )
        write_hub_export(export, folder / flavor)
    return model


@torch.no_grad()
def expect_logits(model: GenerativeModel, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Return random texts, their logits after every token, and those of `decode`."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 256, (2, TOKENS), generator=generator)
    tokens[:, 0] = tokenizer.document_token
    place = torch.zeros_like(tokens), torch.arange(TOKENS).expand(2, -1)
    hidden, _ = model.read(tokens, *place, None, in_order=True)
    last, _ = model.decode(tokens, *place, None)
    return {"tokens": tokens, "logits": model.head(hidden).float(), "last": last}


@torch.no_grad()
def expect_greedy(model: GenerativeModel, tokenizer: Tokenizer, prompt: str, count: int) -> Tensor:
    """Return the likeliest continuation [1,count], in which the document does not end."""
    ids = torch.tensor([[tokenizer.document_token, *tokenizer.encode(prompt)]])
    logits, states = model.decode(ids, torch.zeros_like(ids), torch.arange(ids.shape[1])[None], None)
    found, one = [], torch.zeros(1, 1, dtype=torch.int64)
    for position in range(ids.shape[1], ids.shape[1] + count):
        logits[:, tokenizer.document_token] = -torch.inf
        found.append(int(logits[0, : tokenizer.vocab_size].argmax()))
        logits, states = model.decode(one + found[-1], one, one + position, states)
    return torch.tensor([found])


def expect_gradients(model: GenerativeModel, tokens: Tensor) -> dict[str, Tensor]:
    """Return the mean loss of texts in training, and its gradients by the names of the export."""
    model.train()
    targets = torch.cat([tokens[:, 1:], torch.full((len(tokens), 1), -100)], 1)
    place = torch.zeros_like(tokens), torch.arange(tokens.shape[1]).expand(len(tokens), -1).contiguous()
    loss = (
        model(Batch(tokens, targets, *place, torch.zeros(len(tokens), dtype=torch.int64))).language
        / (targets >= 0).sum()
    )
    loss.backward()
    model.eval()
    table = model.parameter_table()
    grads = {
        f"grad.{hub_name(name, table[name].role == 'matrix')}": parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {"loss": loss.detach()} | grads


def write_checks(folder: Path, checks: dict[str, Any], expected: dict[str, dict[str, Tensor]]) -> None:
    """Write what tests/hub/clean_check.py reads."""
    (folder / "checks.json").write_text(json.dumps(checks))
    for name, tensors in expected.items():
        save_file({key: each.contiguous() for key, each in tensors.items()}, folder / f"{name}.safetensors")
