"""A RetNet of flash-linear-attention becomes a run: what is called exact is, and what differs is two norms a layer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from kabrn_dist.checkpoint.manifest import read_manifest
from kabrn_dist.checkpoint.state import read_state
from kabrn_dist.data.adapt_tokenizer import AdaptedTokenizer, adapt_tokenizer
from kabrn_dist.data.corpus import open_corpus
from kabrn_dist.data.dataset import DataState, TokenDataset
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.hub.import_calibrate import calibrate, encode_rows
from kabrn_dist.hub.import_model import ModelImport, build_imported, describe_import, plan_import, run_import
from kabrn_dist.inference.run import load_model
from kabrn_dist.model import mixer
from kabrn_dist.model.experts import mlp
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.ops.activation_quant import Quantized
from kabrn_dist.utils.errors import UserError
from tests.support.foreign_tokenizers import make_gpt2
from tests.support.runs import ROOT
from tests.support.shard_sets import Texts, make_set

# Written by the library itself: see make.py there.
RETNET = ROOT / "tests/fixtures/retnet_fla"
BYTES = AdaptedTokenizer(Tokenizer.of_bytes(), ())


def plan(source: Path = RETNET, out: Path = Path("runs/none"), **options: object) -> ModelImport:
    return plan_import(source, out, BYTES, **options)  # type: ignore[arg-type]


def read_logits(model: MixKABRN, tokens: Tensor) -> Tensor:
    """Logits [B,T,C] after each token of rows that are one document each."""
    found, states = [], None
    for position in range(tokens.shape[1]):
        column = tokens[:, position : position + 1]
        place = torch.full_like(column, position)
        logits, states = model.decode(column, torch.zeros_like(column), place, states)
        found.append(logits)
    return torch.stack(found, 1)


def gated_without_norm(gate: Quantized, up: Quantized, lam: float) -> Quantized:
    values = F.silu(gate.codes / gate.scale) * (up.codes / up.scale)
    return Quantized(values, torch.ones_like(gate.scale))


def test_without_our_two_norms_the_logits_are_the_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load_file(RETNET / "reference.safetensors")
    model = build_imported(plan())
    monkeypatch.setattr(mixer, "gated", gated_without_norm)
    monkeypatch.setattr(mlp, "gated", gated_without_norm)
    found = read_logits(model, reference["tokens"])
    torch.testing.assert_close(found, reference["logits"], atol=1e-4, rtol=1e-4)
    assert float(reference["logits"].std()) > 0.5


def test_scales_bring_the_model_closer_to_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = load_file(RETNET / "model.safetensors")
    # Hidden values far from a size of 1, which our norms would give them.
    small = {name: values * (0.2 if ".up_proj" in name or ".g_proj" in name else 1) for name, values in tensors.items()}
    save_file(small, write_changed(tmp_path / "small") / "model.safetensors")
    model = build_imported(plan(tmp_path / "small"))
    tokens = load_file(RETNET / "reference.safetensors")["tokens"]
    with monkeypatch.context() as patch:
        patch.setattr(mixer, "gated", gated_without_norm)
        patch.setattr(mlp, "gated", gated_without_norm)
        theirs = read_logits(model, tokens)

    def error() -> float:
        return float((read_logits(model, tokens) - theirs).square().mean().sqrt() / theirs.std())

    before = error()
    calibrate(model, encode_rows("Any text. " * 200, BYTES.tokenizer, 257), "retnet")
    assert error() < 0.4 and error() < before / 2, (before, error())


def test_the_table_says_what_is_exact_and_what_is_not() -> None:
    text = describe_import(plan())
    lines = {line.split()[0]: line for line in text.splitlines()[2:]}
    exact = ("embedding.weight", "head.weight", "mixer.inputs.query.weight", "mixer.inputs.gate.weight")
    assert all(" exactly " in lines[name] for name in (*exact, "mixture.shared.gate", "mixture.shared.up"))
    approximate = ("mixer.output.out.weight", "mixture.shared.down")
    assert all(" approximately " in lines[name] and "RMSNorm" in lines[name] for name in approximate)
    assert "each of 2 heads 2 times" in lines["mixer.inputs.key.weight"] and "left out" not in text
    assert " 0-1 " in lines["mixture.shared.up"] and "newly drawn" not in text


def test_the_run_generates_and_has_the_weights(tmp_path: Path) -> None:
    checkpoint, bits = run_import(plan(out=tmp_path / "run"), "Any text. " * 200)
    assert checkpoint == tmp_path / "run/checkpoints/step-00000000" and 4 < bits < 30
    model, tokenizer = load_model(tmp_path / "run")
    theirs = load_file(RETNET / "model.safetensors")
    scale = (1e-6 / 1e-5) ** 0.5
    assert torch.equal(model.embedding.weight, theirs["model.embeddings.weight"] * scale)
    assert torch.equal(model.head.weight, theirs["lm_head.weight"] * theirs["model.norm.weight"])
    assert "".join(model.generate("Once", tokenizer, tokens=5))


def write_changed(folder: Path, **changes: object) -> Path:
    shutil.copytree(RETNET, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def refuse(source: Path, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        build_imported(plan(source, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_other_kinds_of_layers_are_refused(tmp_path: Path) -> None:
    changes = {"feature_map": "relu", "use_output_gate": False, "hidden_act": "powlu", "attn": {"layers": [1]}}
    for key, value in changes.items():
        message = refuse(write_changed(tmp_path / key, **{key: value}))
        assert f"config.json: {key} is {value!r}" in message and "import a model with" in message
    assert "num_heads is 0" in refuse(write_changed(tmp_path / "0", num_heads=0))
    assert "is 1,000,000,000, and the files hold only" in refuse(
        write_changed(tmp_path / "deep", num_hidden_layers=10**9)
    )
    assert "none of retnet, llama" in refuse(write_changed(tmp_path / "gpt", model_type="gpt2"))
    assert "config.json asks for [64, 32]" in refuse(write_changed(tmp_path / "wide", intermediate_size=64))
    assert "--set model.hidden_size=64" in refuse(RETNET, overrides=["model.hidden_size=64"])
    assert "all layers of a RetNet are retention" in refuse(RETNET, layers="RA")


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    assert "no such folder" in refuse(tmp_path / "absent")
    folder = write_changed(tmp_path / "bin")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin: can run code when it is read, and is not" in refuse(folder)
    (folder / "pytorch_model.bin").unlink()
    assert "has neither model.safetensors nor" in refuse(folder)
    tensors = load_file(RETNET / "model.safetensors")
    dropped = tensors.pop("model.layers.1.attn.g_proj.weight")
    save_file(tensors, folder / "model.safetensors")
    assert "has no tensor 'model.layers.1.attn.g_proj.weight'" in refuse(folder)
    with pytest.raises(UserError, match="has no tensor 'model"):
        plan(folder)
    tensors |= {"model.layers.1.attn.g_proj.weight": dropped * torch.inf, "extra.weight": torch.ones(3)}
    save_file(tensors, folder / "model.safetensors")
    assert "not finite" in refuse(folder)
    assert "left out: tensor extra.weight" in describe_import(plan(folder))


def test_a_run_with_data_begins_at_its_first_sequence(tmp_path: Path) -> None:
    make_set(tmp_path / "set", Texts("a", train=90))
    text = "Any text. " * 200
    with_data = plan(out=tmp_path / "run", data=str(tmp_path / "set"), overrides=["data.sequence_length=16"])
    checkpoint, _ = run_import(with_data, text, has_data=True)
    state = read_state(checkpoint, read_manifest(checkpoint))
    data = TokenDataset(open_corpus(with_data.config.data), "train", 16, with_data.config.run.seed)
    DataState(**state.cursor.model_dump()).check(data)
    assert state.step == 0 and state.cursor.consumed == 0
    other = Tokenizer(adapt_tokenizer(make_gpt2().to_str().encode(), "t.json").tokenizer.content)
    wrong = plan_import(
        RETNET, tmp_path / "b", AdaptedTokenizer(other, ()), own_vocabulary=False, data=str(tmp_path / "set")
    )
    with pytest.raises(UserError, match="its tokenizer is not the imported one; prepare the data with"):
        run_import(wrong, text, has_data=True)
    assert not (tmp_path / "b").exists()
