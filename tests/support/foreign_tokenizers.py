"""Tokenizers as other models have them, made by the library that makes theirs."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = ["the cat sat on the mat, the rat sat on the cat " * 20, "def f(x):\n    return x\n" * 9, "naïve café 漢字かな"]
# The words of GPT-4, and with small changes of Llama 3 and Qwen.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _train(bpe: Tokenizer, special: list[str]) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXTS, trainer)
    return bpe


def make_gpt2(add_prefix_space: bool = False) -> Tokenizer:
    """GPT-2's: one splitter, and <|endoftext|> among the ordinary tokens too."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    return _train(bpe, ["<|endoftext|>"])


def make_llama3() -> Tokenizer:
    """Llama 3's: a pattern of words, merges that are ignored for known words, and a token put before each text."""
    bpe = Tokenizer(models.BPE(ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    _train(bpe, [])
    bpe.add_special_tokens([AddedToken(name) for name in ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")])
    start = bpe.token_to_id("<|begin_of_text|>")
    template = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", start)]
    )
    bpe.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return bpe


def make_qwen() -> Tokenizer:
    """Qwen's: letters are composed first, and some added tokens are not special."""
    bpe = make_llama3()
    bpe.normalizer = normalizers.NFC()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    bpe.add_tokens([AddedToken("<tool_call>", normalized=False)])
    return bpe


def make_llama2() -> Tokenizer:
    """Llama 2's: characters with a mark for blanks, and bytes for what no token has."""
    pieces = ["<unk>", *(f"<0x{value:02X}>" for value in range(256)), "▁", "a", "▁a"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    bpe = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return bpe


def make_unigram() -> Tokenizer:
    """T5's: the most likely pieces."""
    return Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], 0))
