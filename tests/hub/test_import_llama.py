"""A Transformer that the real library wrote becomes a run: imported, trained on, resumed, and read for text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kabrn_dist.checkpoint.store import load_tensor, read_manifest
from kabrn_dist.cli.main import main
from kabrn_dist.config.file import dump_config, load_config
from kabrn_dist.data.adapt_tokenizer import load_any_tokenizer
from kabrn_dist.hub.import_model import build_imported, describe_import, plan_import
from kabrn_dist.inference.run import Run, load_model
from kabrn_dist.ops.activation_quant import rms_norm
from kabrn_dist.utils.errors import UserError
from tests.support.environments import make_environment, run_in_environment
from tests.support.foreign_tokenizers import make_llama3
from tests.support.runs import read_losses, run_sessions

HEAD = "head.weight/master"
WRITE = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
out = Path(sys.argv[1])
config = LlamaConfig(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=500000.0, initializer_range=0.2, tie_word_embeddings=True)
model = LlamaForCausalLM(config).eval()
for name, parameter in model.named_parameters():
    if "norm" in name:
        parameter.data.uniform_(0.5, 1.5)
# Large models are written in several files.
model.save_pretrained(out, max_shard_size="40KB")
x, layer = torch.randn(7, 32), model.model.layers[1]
with torch.no_grad():
    normed = layer.post_attention_layernorm(x)
    found = {"x": x, "logits": model.lm_head(model.model.norm(x)), "gate": layer.mlp.gate_proj(normed),
        "up": layer.mlp.up_proj(normed), "value": layer.self_attn.v_proj(layer.input_layernorm(x))}
save_file({name: values.contiguous() for name, values in found.items()}, out / "parts.safetensors")
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    environment = make_environment("transformers-5.23.0", ["transformers==5.23.0", "accelerate"])
    result = run_in_environment(environment, ["-c", WRITE, folder / "model"], folder)
    assert result.returncode == 0, result.stderr
    make_llama3().save(str(folder / "model/tokenizer.json"))
    assert (folder / "model/model.safetensors.index.json").exists()
    return folder / "model"


@pytest.mark.slow
def test_what_is_called_exact_gives_the_librarys_values(llama: Path) -> None:
    tokenizer = load_any_tokenizer(llama / "tokenizer.json")
    plan = plan_import(llama, Path("runs/none"), tokenizer, layers="RA")
    model, parts = build_imported(plan), load_file(llama / "parts.safetensors")
    normed = rms_norm(parts["x"] * plan.imported.stream_scale)
    block = model.blocks[1]
    ours = {
        "logits": model.head(normed)[:, :320],
        "gate": normed @ block.mixture.shared.gate[0].T,
        "up": normed @ block.mixture.shared.up[0].T,
        # Each of two heads twice.
        "value": (normed @ block.mixer.inputs.value.weight.T).view(7, 4, 8)[:, ::2].flatten(1),
    }
    for name, values in ours.items():
        torch.testing.assert_close(values.detach(), parts[name], atol=1e-5, rtol=1e-5)
    text = describe_import(plan)
    assert "left out: rotary base 500000: ours is 10000" in text and "a copy of the embedding, no longer tied" in text
    assert text.count("newly drawn") == 1 and "a start: theirs is softmax attention" in text


@pytest.mark.slow
def test_an_imported_run_is_trained_on_resumed_and_read(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, after = tmp_path / "imported", tmp_path / "after"
    options = ["import", str(llama), str(out), "--layers", "RA", "--set", "data.sequence_length=64"]
    assert main([*options, "--dry-run"]) == 0 and not out.exists()
    assert "nothing was written" in capsys.readouterr().out
    assert main(options) == 0
    assert f"wrote {out}/checkpoints/step-00000000" in capsys.readouterr().out
    assert main(options) == 2 and "exists already; name a new folder" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text("\n\n".join(f"the cat {n} sat on the mat" for n in range(900)))
    prepare = ["prepare", "--source", "text", "--unit", "paragraph", "--input", str(tmp_path / "a.txt")]
    assert main([*prepare, "--out", str(tmp_path / "data"), "--tokenizer", str(out / "tokenizer.json")]) == 0
    changes = [f"run.folder={after}", f"run.init_from={out}", f"data.path={tmp_path}/data", "training.steps=5"]
    small = [
        "training.global_batch_size=2",
        "checkpoint.keep_last=9",
        "model.quantize=true",
        "validation.eval_interval=0",
    ]
    goes_on = tmp_path / "config.yaml"
    goes_on.write_text(dump_config(load_config(out / "config.yaml", [*changes, *small])))
    run_sessions(1, [[str(goes_on), "never", 3], [str(goes_on), "must", None]], tmp_path)
    assert Run.open(after).step == 5 and len(read_losses(after)) == 5
    first = load_tensor(after / "checkpoints/step-00000000", read_manifest(after / "checkpoints/step-00000000"), HEAD)
    assert torch.equal(first, load_model(out)[0].head.weight)
    model, tokenizer = load_model(after)
    assert "".join(model.generate("the cat", tokenizer, tokens=5))


@pytest.mark.slow
def test_a_tokenizer_alone_and_another_one(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tokenizer.json"
    token = "<|begin_of_text|>"
    assert main(["import", str(llama), str(file), "--tokenizer-only", "--document-token", token]) == 0
    assert "is now <|document|>" in capsys.readouterr().out
    assert load_any_tokenizer(file).tokenizer.document_token == make_llama3().token_to_id(token)
    options = ["import", str(llama), str(tmp_path / "run"), "--tokenizer", "bytes", "--dry-run"]
    assert main(options) == 0
    out = capsys.readouterr().out
    assert out.count("drawn: the tokenizer is not the model's own") == 2


@pytest.mark.slow
def test_layers_and_settings_that_do_not_fit_are_refused(llama: Path, tmp_path: Path) -> None:
    tokenizer = load_any_tokenizer(llama / "tokenizer.json")
    for layers in ("R", "RX", "RRR"):
        with pytest.raises(UserError, match=f"--layers {layers}: .* has 2 layers; give 2 letters of R and A"):
            plan_import(llama, tmp_path / "run", tokenizer, layers=layers)
    ternary = plan_import(llama, tmp_path / "run", tokenizer, ternary=True).config
    assert ternary.model.quantization_lambda(0) == 0 and ternary.model.quantization_lambda(ternary.training.steps) == 1
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    (tmp_path / "model.safetensors").write_bytes((llama / "parts.safetensors").read_bytes())
    with pytest.raises(UserError, match="hidden_act is 'gelu', and ours is 'silu'"):
        plan_import(tmp_path, tmp_path / "run", tokenizer)
