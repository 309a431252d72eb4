"""Text from a trained model: recurrent decoding; a retention layer keeps a state of fixed size, whatever the length.

Shapes: C vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from kabrn_dist.checkpoint.store import CheckpointStore
from kabrn_dist.config.file import load_config
from kabrn_dist.data.remote import open_shard_set
from kabrn_dist.data.tokenizer import StreamDecoder, Tokenizer
from kabrn_dist.inference.load import build_whole, load_exported, load_weights
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.utils.errors import UserError


def load_run(folder: Path, device: torch.device | str = "cpu") -> tuple[MixKABRN, Tokenizer, int]:
    """Model, tokenizer and step of a run's newest intact checkpoint, in one process, at any training layout.

    Raises:
        UserError: where the folder holds no run, no intact checkpoint, or not the tokenizer it was trained with.
    """
    config = load_config(folder / "config.yaml")
    store = CheckpointStore(folder / "checkpoints")
    path = store.find_latest()
    if path is None:
        raise UserError(f"{folder}/checkpoints: no intact checkpoint; train with --config first")
    model = build_whole(config, device)
    manifest = load_weights(model, path)
    tokenizer = open_shard_set(config.data.path, config.data.cache_dir, config.data.cache_size_gb).tokenizer()
    if tokenizer.sha256 != manifest.state.get("tokenizer_sha256"):
        raise UserError(
            f"{config.data.path}/tokenizer.json is not the one that {path} was trained with; "
            "restore the shards or point data.path in config.yaml to it"
        )
    return model, tokenizer, manifest.step


def load_export(folder: Path, device: torch.device | str = "cpu") -> tuple[MixKABRN, Tokenizer]:
    """Model and tokenizer of a folder that `launch/export.py` wrote.

    Raises:
        UserError: where a file is missing or damaged, or does not fit the others.
    """
    config = load_config(folder / "config.yaml")
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{folder}/tokenizer.json has {tokenizer.vocab_size} tokens, model.vocab_size in config.yaml is "
            f"{config.model.vocab_size}: not of one export; copy the folder again"
        )
    return load_exported(config, folder, device), tokenizer


def generate(
    model: MixKABRN,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> Iterator[str]:
    """Stream the continuation of `prompt`, piece by piece, up to `tokens` tokens or the end of the document.

    Args:
        temperature: 0 takes the likeliest token always.
        top_k: draw among so many likeliest tokens; 0 among all.
        seed: of the draw.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = [tokenizer.document_token, *tokenizer.encode(prompt)]
    length = len(ids)
    read = torch.tensor([ids], device=device)
    positions = torch.arange(length, device=device)[None]
    logits, states = model.decode(read, torch.zeros_like(read), positions, None)
    decoder = StreamDecoder(tokenizer)
    one = torch.zeros(1, 1, dtype=torch.int64, device=device)
    for position in range(length, length + tokens):
        chosen = draw_token(logits[0, : tokenizer.vocab_size].cpu(), temperature, top_k, generator)
        if chosen == tokenizer.document_token:
            break
        yield decoder.push(chosen)
        logits, states = model.decode(one + chosen, one, one + position, states)
    yield decoder.finish()


def draw_token(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """Draw one token.

    Args:
        logits: [C] fp32, on the host.
        temperature: 0 takes the likeliest token.
        top_k: draw among this many likeliest tokens; 0 among all.
        generator: decides the draw.
    """
    if temperature == 0:
        return int(logits.argmax())
    values, ids = logits.topk(min(top_k or len(logits), len(logits)))
    return int(ids[torch.multinomial((values / temperature).softmax(-1), 1, generator=generator)])
