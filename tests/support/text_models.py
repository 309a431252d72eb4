"""Small model files for tests of text: random ones, and ones that write what a test wants."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BpeTokenizer
from tokenizers.pre_tokenizers import PreTokenizer

from kabrn_dist.data.tokenizer import DOCUMENT_TOKEN, Tokenizer
from kabrn_dist.inference.generate import GenerativeModel
from kabrn_dist.runtime.model_file import write_model_file
from tests.support.models import make_model, make_model_config

_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _bytes(use_regex: bool) -> PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _split(pattern: str) -> PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), _bytes(False)])


# Everything that divides texts into words and that the runtime has.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt2": _bytes(True),
    "none": _bytes(False),
    "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), _bytes(True)]),
    "digits alone": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), _bytes(False)]),
    "cl100k": _split(_CL100K),
    "qwen2": _split(_CL100K.replace("{1,3}", "")),
    "gpt2 by split": _split(_GPT2),
}


def train_bpe(kind: str, texts: list[str], size: int, ignore_merges: bool = False) -> BpeTokenizer:
    """Return a byte-level BPE tokenizer with one of PRE_TOKENIZERS."""
    bpe = BpeTokenizer(models.BPE(ignore_merges=ignore_merges))
    bpe.pre_tokenizer, bpe.decoder = PRE_TOKENIZERS[kind], decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[DOCUMENT_TOKEN], initial_alphabet=alphabet, show_progress=False
    )
    if "regex" not in str(bpe.pre_tokenizer) or kind in ("none", "digits alone"):
        # The trainer takes time with the square of a word's length, and here lines are words.
        texts = [line.replace("<|", "<")[:60] for text in texts for line in text.splitlines(keepends=True)]
    bpe.train_from_iterator(texts, trainer)
    return bpe


def write_text_model(path: Path, tokenizer: Tokenizer, *overrides: str, template: str = "") -> GenerativeModel:
    """Write and return a small random model of a tokenizer."""
    size = max(300, tokenizer.vocab_size)
    config = make_model_config(f"model.vocab_size={size}", *overrides)
    model = make_model(config)
    write_model_file(model, config, tokenizer, 12, path, template=template, embedding_dtype="fp32")
    return model


def write_scripted_model(path: Path, tokenizer: Tokenizer, script: Sequence[int], template: str = "") -> None:
    """Write a model that continues each token of a script by the next one, whatever came before.

    Args:
        path: The file.
        tokenizer: The model's tokenizer.
        script: Tokens, each of which is followed by the same one wherever it occurs.
        template: Chat template.
    """
    size = max(300, tokenizer.vocab_size)
    config = make_model_config(f"model.vocab_size={size}", "model.hidden_size=64")
    model = make_model(config)
    follows = dict(pairwise(script))
    assert all(follows[a] == b for a, b in pairwise(script))
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(size, 64, generator=generator), dim=1)
    with torch.no_grad():
        # What layers add is small beside it, so the next token depends on the last one alone.
        model.embedding.weight.copy_(1e4 * rows)
        head = torch.zeros(size, 64)
        for before, after in follows.items():
            head[after] += rows[before]
        model.head.weight.copy_(head)
    write_model_file(model, config, tokenizer, 1, path, template=template, embedding_dtype="fp32")
