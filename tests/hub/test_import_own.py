"""What `mixkabrn export --format hf` writes becomes a run again: with all that it had, to the last bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from kabrn_dist.checkpoint.manifest import read_manifest
from kabrn_dist.checkpoint.state import read_state
from kabrn_dist.cli.main import main
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.hub.export import plan_hub_export, prepare_hub_export, write_hub_export
from kabrn_dist.hub.import_own import build_own, plan_own_import, run_own_import
from kabrn_dist.hub.import_run import write_start
from kabrn_dist.hub.training_record import TrainingRecord
from kabrn_dist.inference.load import load_export
from kabrn_dist.inference.run import Run
from kabrn_dist.ops.codes_latents import make_latents
from kabrn_dist.ops.weight_quant import ternarize
from kabrn_dist.utils.errors import UserError
from tests.support.hub_models import ModelSource, expect_logits, write_hub_model
from tests.support.models import MODEL_KINDS, make_model, make_model_config
from tests.support.runs import run_sessions
from tests.support.shard_sets import Texts, make_set
from tests.support.text_models import train_bpe

BYTES = Tokenizer.of_bytes()
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
STEP = 3


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both exports of a model, and what it computes."""
    folder = tmp_path_factory.mktemp("hybrid") / "hub"
    model = write_hub_model(folder, BYTES, *MODEL_KINDS["hybrid"], template=TEMPLATE)
    save_file(expect_logits(model, BYTES), folder / "expected.safetensors")
    return folder


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return set(found) == set(expected) and all(torch.equal(found[name], each) for name, each in expected.items())


@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_every_kind_of_model_computes_the_same_from_both_kinds_of_weights(kind: str, tmp_path: Path) -> None:
    model = write_hub_model(tmp_path / "hub", BYTES, *MODEL_KINDS[kind])
    expected = expect_logits(model, BYTES)
    config = make_model_config("model.vocab_size=300", *MODEL_KINDS[kind]).model
    for flavor in sorted(path.name for path in (tmp_path / "hub").iterdir()):
        plan = plan_own_import(tmp_path / "hub" / flavor, tmp_path / flavor)
        assert plan.config.model.moe_layers == config.moe_layers
        assert plan.config.model.dense_hidden_size == config.dense_hidden_size
        found = build_own(plan)
        assert same(expect_logits(found, BYTES), expected)  # type: ignore[arg-type]
        assert torch.equal(found.routers.bias, model.routers.bias) and found.routers.step == STEP
        if flavor == "latent":
            parameters = dict(found.named_parameters())
            assert all(torch.equal(parameters[name], each) for name, each in model.named_parameters())


@pytest.mark.parametrize("flavor", ["latent", "ternary"])
def test_the_run_computes_and_exports_the_same(flavor: str, hybrid: Path, tmp_path: Path) -> None:
    assert main(["import", str(hybrid / flavor), str(tmp_path / "run")]) == 0
    run = Run.open(tmp_path / "run")
    tokenizer = run.tokenizer()
    assert run.step == STEP and tokenizer.sha256 == BYTES.sha256 and tokenizer.chat_template == TEMPLATE
    expected = load_file(hybrid / "expected.safetensors")
    assert same(expect_logits(run.model(), tokenizer), expected)
    write_hub_export(plan_hub_export(tmp_path / "run", flavor), tmp_path / "again")  # type: ignore[arg-type]
    again, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", hybrid / flavor))
    assert same(again, before)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "again" / name).read_text() == (hybrid / flavor / name).read_text(), name


@pytest.mark.slow
def test_the_commands_take_the_run_and_another_starts_from_it(
    hybrid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, shards = str(tmp_path / "run"), tmp_path / "set"
    make_set(shards, Texts("a", train=90))
    options = ["--data", str(shards), "--set", "data.sequence_length=16", "--set", "training.global_batch_size=2"]
    assert main(["import", str(hybrid / "latent"), run, *options]) == 0
    assert "tensors exactly (latent weights of step 3, quantized to 1 of 1)" in capsys.readouterr().out
    assert main(["generate", run, "--prompt", "Once", "--tokens", "3"]) == 0
    assert main(["export", run, str(tmp_path / "export")]) == 0
    assert main(["pack", run, "--out", str(tmp_path / "model.mkb")]) == 0
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    config["optimizer"]["warmup_steps"] = 1
    config["validation"] |= {"sample_tokens": 0, "eval_sequences": 2}
    following = config["run"] | {"folder": str(tmp_path / "next"), "init_from": run}
    jobs = {"on": (config["run"], STEP + 2), "next": (following, 2)}
    for name, (section, steps) in jobs.items():
        changed = config | {"run": section, "training": config["training"] | {"steps": steps}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(changed))
    run_sessions(1, [[str(tmp_path / f"{name}.yaml"), "auto", None] for name in ("next", "on")], tmp_path)
    assert Run.open(tmp_path / "next").step == 2
    path = Run.open(run).checkpoint
    state = read_state(path, read_manifest(path))
    assert (state.step, state.updates, state.cursor.consumed) == (5, 2, 10)


def test_a_partly_quantized_half_precision_model_keeps_both(tmp_path: Path) -> None:
    schedule = ["model.quantize_start_step=2", "model.quantize_warmup_steps=6", "training.precision=bf16"]
    config = make_model_config("model.layers=R", "run.folder=" + str(tmp_path / "run"), *schedule)
    write_start(config, make_model(config), BYTES, step=4)
    write_hub_export(plan_hub_export(tmp_path / "run"), tmp_path / "hub")
    run_own_import(plan_own_import(tmp_path / "hub", tmp_path / "back"))
    before, after = Run.open(tmp_path / "run"), Run.open(tmp_path / "back")
    assert after.config.training.precision == "bf16"
    assert after.config.model.quantization_lambda(4) == before.config.model.quantization_lambda(4) == 3 / 7
    assert same(expect_logits(after.model(), BYTES), expect_logits(before.model(), BYTES))


@pytest.mark.parametrize(("step", "start", "warmup"), [(0, 5, 9), (700, 0, 999), (123_456, 100_000, 77_777)])
def test_schedules_give_the_step_its_quantization(step: int, start: int, warmup: int, hybrid: Path) -> None:
    from kabrn_dist.hub.import_own_config import read_model_section
    from kabrn_dist.hub.import_source import ForeignModel

    source = ForeignModel.of_folder(hybrid / "latent")
    schedule = {"quantize_start_step": start, "quantize_warmup_steps": warmup}
    lam = make_model_config().model.model_copy(update=schedule).quantization_lambda(step)
    changed = ForeignModel(source.folder, source.config | {"step": step, "quantization": lam}, source.tensors)
    model = read_model_section(changed)
    assert model.quantization_lambda(step) == lam and model.quantization_lambda(step + 10**6) == 1


def test_a_bpe_comes_back_byte_for_byte(tmp_path: Path) -> None:
    library = train_bpe("gpt2", ["A model of né. " * 9, Path(__file__).read_text()], 300)
    library.post_processor = None  # type: ignore[assignment]
    from tokenizers import decoders

    library.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(library.to_str(pretty=True).encode())
    write_hub_model(tmp_path / "hub", tokenizer, "model.layers=R")
    found = plan_own_import(tmp_path / "hub" / "latent", tmp_path / "out").tokenizer
    assert found.content == tokenizer.content
    # Any other one keeps what was added, and its ids.
    tree = json.loads(tokenizer.content)
    other = Tokenizer(json.dumps(tree, indent=3).encode())
    write_hub_model(tmp_path / "other", other, "model.layers=R")
    found = plan_own_import(tmp_path / "other" / "latent", tmp_path / "out").tokenizer
    text = "A model of né <|document|> \r\n 漢"
    assert found.encode(text) == other.encode(text) and found.document_token == other.document_token


@pytest.mark.parametrize("group", [None, 1, 3, 7, 100])
def test_latents_have_the_codes_and_scales_they_are_made_of(group: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1e-4, 0.02, 3.0):
        latents = torch.randn(3, 17, 23, generator=generator) * size
        latents[0, :7] = 0
        latents[1] = size
        matrices = ternarize(latents, 1, group)
        assert matrices.gamma is not None
        step = 17 if group is None else min(group, 17)
        scales = matrices.gamma[:, ::step, 0] if group else matrices.gamma[:, :, 0]
        found = make_latents(matrices.codes(torch.int8), scales, group)
        assert found is not None
        again = ternarize(found, 1, group)
        assert again.gamma is not None and torch.equal(again.gamma, matrices.gamma)
        assert torch.equal(again.codes(torch.int8), matrices.codes(torch.int8))
    tiny = torch.full_like(scales, 1e-9)
    assert make_latents(matrices.codes(torch.int8), tiny, group) is None


def change(folder: Path, out: Path, **changes: Any) -> Path:
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    (out / "config.json").write_text(json.dumps(config))
    return out


def refuse(folder: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        build_own(plan_own_import(folder, Path("runs/none"), overrides=overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_strangers_configuration_is_refused_before_memory_is_taken(hybrid: Path, tmp_path: Path) -> None:
    cases: dict[str, tuple[Any, str]] = {
        "hidden_size": (10**18, "hidden_size is 1000000000000000000, and all weights together are"),
        "num_experts": (100_000_000, "num_experts is 100000000, and all weights"),
        "num_heads": (..., "has no key 'num_heads'; get the folder again"),
        "layers": ("RA", "layers has 2 letters, and the weights have 3 layers"),
        "key_dim": (7, "multiple of 2"),
        "expert_type": ("gated", "expert"),
        "vocab_size": (299, "config.json asks for [299, 40]"),
        "moe_layers": ([0, 2], "moe_layers is [0, 2], not every n-th of 3 layers"),
        "quantization": (0.123, "quantization is 0.123 at step 3, which no schedule gives"),
        "weights": ("packed", "weights is 'packed', not latent or ternary"),
        "step": (-1, "step is -1, no step"),
        "bos_token_id": (5, "documents begin with id 256, bos_token_id in config.json is 5"),
        "decay": ("fast", "decay"),
    }
    for key, (value, words) in cases.items():
        message = refuse(change(hybrid / "latent", tmp_path / key, **{key: value}))
        assert words in message and str(tmp_path / key) in message, message
    many = change(
        hybrid / "latent", tmp_path / "many", num_experts=50_000, expert_hidden_size=50_000, hidden_size=50_000
    )
    assert "asks for" in refuse(many)
    partly = change(hybrid / "ternary", tmp_path / "partly", quantization=0.5)
    assert "not wholly quantized; import the model with latent weights" in refuse(partly)
    assert "hidden_size is 80" in refuse(hybrid / "latent", "model.hidden_size=80")
    assert "step 3 is quantized to 0 of 1" in refuse(hybrid / "latent", "model.quantize_start_step=9")


def test_damaged_weights_are_refused(hybrid: Path, tmp_path: Path) -> None:
    def write(name: str, flavor: str, edit: Callable[[dict[str, Tensor]], object]) -> Path:
        folder = tmp_path / name
        shutil.copytree(hybrid / flavor, folder)
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    head, codes = "lm_head.weight", "model.blocks.0.mixer.query.codes"
    scales = "model.blocks.0.mixer.query.scales"
    assert f"has no tensor '{head}'" in refuse(write("less", "latent", lambda t: t.pop(head)))
    assert "has a tensor 'extra'" in refuse(write("more", "latent", lambda t: t.update(extra=torch.ones(3))))
    assert "not finite" in refuse(write("inf", "latent", lambda t: t[head].fill_(torch.inf)))
    assert "is U8, no values" in refuse(write("bytes", "latent", lambda t: t.update({head: t[head].byte()})))
    assert "codes or scales" in refuse(write("codes", "ternary", lambda t: t[codes].fill_(255)))
    assert "codes or scales" in refuse(write("scales", "ternary", lambda t: t[scales].fill_(-1)))
    assert "import the model with latent weights" in refuse(write("tiny", "ternary", lambda t: t[scales].fill_(1e-9)))
    content = bytearray((hybrid / "latent" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    edited = tmp_path / "edited"
    shutil.copytree(hybrid / "latent", edited)
    (edited / "model.safetensors").write_bytes(content)
    assert "damaged or edited" in refuse(edited)


def test_options_for_other_models_are_refused(hybrid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = str(hybrid / "latent"), str(tmp_path / "out")
    for option in (["--ternary"], ["--layers", "RRR"], ["--tokenizer", "bytes"], ["--document-token", "x"]):
        assert main(["import", source, out, *option]) == 2
        assert f"{option[0]}: {source} is a model of this package" in capsys.readouterr().err
    assert main(["import", source, out, "--dry-run"]) == 0 and not (tmp_path / "out").exists()
    assert main(["import", source, out, "--tokenizer-only"]) == 0
    assert (tmp_path / "out").read_bytes() == BYTES.content
    with pytest.raises(UserError, match=f"mixkabrn import {source} runs/latent"):
        load_export(hybrid / "latent")


def test_several_files_and_a_template_of_its_own_are_read(hybrid: Path, tmp_path: Path) -> None:
    config = make_model_config("model.layers=R")
    model = make_model(config)
    source, record = ModelSource(model, config), TrainingRecord({}, None, [], [])
    export = prepare_hub_export(config, STEP, source, BYTES, "latent", None, record, file_bytes=20_000)
    write_hub_export(export, tmp_path / "hub")
    (tmp_path / "hub" / "chat_template.jinja").write_text("{{- bos_token }}" + TEMPLATE)
    plan = plan_own_import(tmp_path / "hub", tmp_path / "out")
    assert len(export.files) > 2 and plan.tokenizer.chat_template == TEMPLATE
    assert same(dict(build_own(plan).named_parameters()), dict(model.named_parameters()))
