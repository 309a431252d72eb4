"""The benchmark's dense Transformer in Hugging Face's library, where this package is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.quality_export import export_transformer
from benchmarks.quality_models import Transformer
from tests.support.environments import make_environment, run_in_environment

READ = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
found, folder = {}, Path(sys.argv[1])
tokens = load_file(folder / "tokens.safetensors")["tokens"]
for path in sorted(each for each in folder.iterdir() if each.is_dir()):
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = "to be\\nor not"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and len(ids) == len(text), (ids, tokenizer.decode(ids))
    with torch.no_grad():
        found[path.name] = model(tokens).logits
        padded = torch.cat([torch.zeros(len(tokens), 3, dtype=torch.int64), tokens], 1)
        mask = (torch.arange(padded.shape[1]) >= 3).long().expand_as(padded)
        found[path.name + ".padded"] = model(padded, attention_mask=mask).logits[:, 3:].contiguous()
    found[path.name + ".generated"] = model.generate(tokens, max_new_tokens=4, do_sample=False)
    model.save_pretrained(folder / "again")
save_file(found, folder / "found.safetensors")
"""
SHAPES = {"gated": (True, 0), "plain": (False, 0), "taps": (True, 3)}
ALPHABET = "\n abenort"


@pytest.mark.slow
@pytest.mark.parametrize("version", ["5.23.0"])
def test_transformers_computes_the_benchmarks_logits(version: str, tmp_path: Path) -> None:
    environment = make_environment(f"transformers-{version}", [f"transformers=={version}", "accelerate"])
    torch.manual_seed(0)
    tokens = torch.randint(0, len(ALPHABET), (2, 12))
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    models = {}
    for name, (gated, taps) in SHAPES.items():
        models[name] = Transformer(len(ALPHABET), 32, 2, 4, 40, gated, taps)
        for parameter in models[name].parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        export_transformer(models[name], ALPHABET, tmp_path / name)
    result = run_in_environment(environment, ["-c", READ, tmp_path], tmp_path)
    assert result.returncode == 0, result.stderr
    found = load_file(tmp_path / "found.safetensors")
    for name, model in models.items():
        with torch.no_grad():
            expected = model(tokens)
            torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(found[f"{name}.padded"], expected, atol=1e-5, rtol=0)
            for length in range(12, 16):
                generated = found[f"{name}.generated"]
                assert torch.equal(model(generated[:, :length])[:, -1].argmax(-1), generated[:, length])
