"""Text from a trained model by recurrent decoding: a retention layer keeps a state of fixed size at any length.

Shapes: C vocabulary size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kabrn_dist.data.tokenizer import StreamDecoder, Tokenizer
from kabrn_dist.inference.sampling import check_sampling
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.utils.errors import UserError


class GenerativeModel(MixKABRN):
    """A complete model in one process that generates text."""

    def generate(
        self,
        prompt: str,
        tokenizer: Tokenizer,
        tokens: int = 200,
        temperature: float = 0.8,
        top_k: int = 50,
        seed: int = 0,
    ) -> Iterator[str]:
        """Yield the continuation of a prompt piece by piece, until the document ends or `tokens` are generated.

        Example:
            model, tokenizer = load_model("runs/small")
            for piece in model.generate("Once", tokenizer=tokenizer, tokens=50):
                print(piece, end="", flush=True)

        Args:
            prompt: Text at the beginning of a document; empty to start a new document.
            tokenizer: The tokenizer that the model was trained with.
            tokens: Maximum number of tokens to generate.
            temperature: Divides the logits; 0 always takes the likeliest token.
            top_k: Number of likeliest tokens to sample from; 0 samples from all.
            seed: Seed of the sampling.

        Yields:
            Decoded text, at times empty: a token may hold a part of a character.

        Raises:
            UserError: for a value that has no meaning, at once.
        """
        check_sampling(prompt, tokens, temperature, top_k, seed)
        return generate(self, tokenizer, prompt, tokens, temperature, top_k, seed)


def generate(
    model: MixKABRN,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> Iterator[str]:
    """Yield the continuation of a prompt piece by piece; see `GenerativeModel.generate`."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = [tokenizer.document_token, *tokenizer.encode(prompt)]
    prompt_length = len(ids)
    prompt_ids = torch.tensor([ids], device=device)
    positions = torch.arange(prompt_length, device=device)[None]
    logits, states = model.decode(prompt_ids, torch.zeros_like(prompt_ids), positions, None)
    decoder = StreamDecoder(tokenizer)
    one = torch.zeros(1, 1, dtype=torch.int64, device=device)
    for position in range(prompt_length, prompt_length + tokens):
        token = draw_token(logits[0, : tokenizer.vocab_size].cpu(), temperature, top_k, generator)
        if token == tokenizer.document_token:
            break
        yield decoder.push(token)
        logits, states = model.decode(one + token, one, one + position, states)
    yield decoder.finish()


def draw_token(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """Draw one token.

    Args:
        logits: [C] fp32, on the host.
        temperature: 0 takes the likeliest token.
        top_k: draw among this many likeliest tokens; 0 among all.
        generator: decides the draw.

    Raises:
        UserError: the logits are not finite.
    """
    if not bool(logits.isfinite().all()):
        raise UserError("the model's outputs are not finite: its training has diverged; use an earlier checkpoint")
    if temperature == 0:
        return int(logits.argmax())
    values, ids = logits.topk(min(top_k or len(logits), len(logits)))
    return int(ids[torch.multinomial((values / temperature).softmax(-1), 1, generator=generator)])
