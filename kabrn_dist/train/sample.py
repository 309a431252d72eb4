"""A short text that the model writes during training, in every parallel layout."""

from __future__ import annotations

import torch

from kabrn_dist.backend.engine import Engine
from kabrn_dist.data.dataset import Batch, sequence_slice
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.inference.generate import draw_token

TEMPERATURE, TOP_K, SEED = 0.8, 50, 0
NO_SAMPLE = "(none: the model's outputs are not finite)"


def generate_sample(engine: Engine, tokenizer: Tokenizer, tokens: int) -> str:
    """Return the start of a document that the model writes. Collective.

    Each token is one forward pass over all tokens so far, the same on all ranks: it needs no decoding state, so it
    works wherever experts, weights and sequences lie, and it leaves the state of training and all random generators
    untouched. The seed is fixed, so texts of different steps differ by the model alone.

    Args:
        engine: the model in training.
        tokenizer: the tokenizer of its data.
        tokens: largest number of tokens; the end of the document ends the text earlier.
    """
    generator = torch.Generator().manual_seed(SEED)
    ids = [tokenizer.document_token]
    while len(ids) <= tokens:
        token = _next_token(engine, ids, tokenizer.vocab_size, generator)
        if token < 0:
            return NO_SAMPLE
        if token == tokenizer.document_token:
            break
        ids.append(token)
    return tokenizer.decode(ids[1:])


def _next_token(engine: Engine, ids: list[int], vocab_size: int, generator: torch.Generator) -> int:
    """Draw a token from the logits, on the rank that has them; −1 if they are not finite. Collective."""
    mesh = engine.mesh
    batch = _pad(ids, mesh.sequence_parallel)
    width = batch.tokens.shape[1] // mesh.sequence_parallel
    logits = engine.logits(sequence_slice(batch, mesh.sequence_rank, mesh.sequence_parallel).to(mesh.device))
    owner, column = divmod(len(ids) - 1, width)
    token = torch.zeros((), dtype=torch.int64)
    if mesh.rank == owner:
        own = logits[0, column, :vocab_size].cpu()
        token += draw_token(own, TEMPERATURE, TOP_K, generator) if bool(own.isfinite().all()) else -1
    return int(mesh.all_reduce_sum(token.to(mesh.device)))


def _pad(ids: list[int], multiple: int) -> Batch:
    """One row of tokens, padded to a multiple of the sequence slices. The model is causal: padding changes nothing."""
    length = -(-len(ids) // multiple) * multiple
    tokens = torch.tensor([ids + [ids[0]] * (length - len(ids))])
    no_targets, source = torch.full_like(tokens, -100), torch.zeros(1, dtype=torch.int64)
    return Batch(tokens, no_targets, torch.zeros_like(tokens), torch.arange(length)[None], source)
