"""The dense Transformers of `benchmarks/quality.py` as folders that Hugging Face's libraries load."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from benchmarks.quality_models import Layer, Transformer

CODE = Path(__file__).with_name("modeling_dense_peer.py")


def export_transformer(model: Transformer, alphabet: str, folder: Path) -> None:
    """Write config.json, weights, code and a tokenizer of characters; `trust_remote_code=True` loads them.

    Args:
        model: trained or not.
        alphabet: the characters of the text, in the order of their numbers.
        folder: is made; must not exist.
    """
    folder.mkdir(parents=True)
    first = model.blocks[0]
    assert isinstance(first, Layer)
    config = {
        "model_type": "dense_peer",
        "architectures": ["DensePeerForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{CODE.stem}.DensePeerConfig",
            "AutoModelForCausalLM": f"{CODE.stem}.DensePeerForCausalLM",
        },
        "vocab_size": model.embedding.num_embeddings,
        "hidden_size": model.embedding.embedding_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": first.heads,
        "intermediate_size": first.down.in_features,
        "gated": first.gated,
        "taps": len(first.taps[0]) if len(first.taps) else 0,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / CODE.name).write_text(CODE.read_text(encoding="utf-8"), encoding="utf-8")
    weights = {name: values.contiguous() for name, values in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    _make_tokenizer(alphabet).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _make_tokenizer(alphabet: str) -> Tokenizer:
    """Each character is a token, with the number that the benchmark gives it."""
    characters = Tokenizer(models.WordLevel({character: number for number, character in enumerate(alphabet)}))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    return characters
