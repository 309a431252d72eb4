"""What `mixkabrn export --format hf` writes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from kabrn_dist.cli.main import main
from kabrn_dist.data.tokenizer import DOCUMENT_TOKEN, Tokenizer
from kabrn_dist.hub.export import plan_hub_export, write_hub_export
from kabrn_dist.hub.tokenizer_files import begin_with_document, make_library_tokenizer
from kabrn_dist.inference.folder_writer import write_folder
from kabrn_dist.inference.run import Run
from kabrn_dist.ops.packing import unpack
from kabrn_dist.ops.weight_quant import ternarize
from kabrn_dist.utils.errors import UserError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "version_1"
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
FILES = {
    *("config.json", "generation_config.json", "configuration_mixkabrn.py", "modeling_mixkabrn.py", "README.md"),
    *("model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of a ternary model of two processes, with its shards at hand."""
    shutil.copytree(FIXTURES / "ternary", tmp_path / "run")
    shutil.copy(FIXTURES / "shards" / "tokenizer.json", tmp_path / "run")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    config["data"]["path"] = str(FIXTURES / "shards")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "run"


def export(run: Path, out: Path, *options: str) -> int:
    return main(["export", str(run), str(out), "--format", "hf", *options])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["export", *arguments]) == 2
    return capsys.readouterr().err


def read_card(folder: Path) -> tuple[dict[str, Any], str]:
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_folder_has_what_transformers_loads(run: Path, tmp_path: Path) -> None:
    assert export(run, tmp_path / "out") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_mixkabrn.MixKABRNForCausalLM"
    assert (config["model_type"], config["weights"], config["quantization"]) == ("mixkabrn", "latent", 1.0)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == config["bos_token_id"] == Tokenizer.of_bytes().document_token
    code = (tmp_path / "out" / "modeling_mixkabrn.py").read_text()
    assert "kabrn_dist" not in code and "from .configuration_mixkabrn import MixKABRNConfig" in code
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt" and file.metadata()["step"] == str(Run.open(run).step)


def test_latents_are_the_trainers_and_codes_those_of_the_latents(run: Path, tmp_path: Path) -> None:
    for flavor in ("latent", "ternary"):
        assert export(run, tmp_path / flavor, "--weights", flavor) == 0
    latent, ternary = (load_file(tmp_path / flavor / "model.safetensors") for flavor in ("latent", "ternary"))
    model = Run.open(run).model()
    assert torch.equal(latent["model.embedding.weight"], model.embedding.weight)
    assert torch.equal(latent["lm_head.weight"], model.head.weight)
    assert torch.equal(latent["model.blocks.1.mixture.router.bias"], model.routers.bias[1])
    query = model.blocks[0].mixer.inputs.query.weight
    assert torch.equal(latent["model.blocks.0.mixer.query.weight"], query)
    matrices = ternarize(query[None])
    codes = unpack(ternary["model.blocks.0.mixer.query.codes"], tuple(query.shape), torch.int8)
    assert matrices.gamma is not None and torch.equal(codes, matrices.codes(torch.int8)[0])
    assert torch.equal(ternary["model.blocks.0.mixer.query.scales"], matrices.gamma.view(1, 1))
    assert not any(name.endswith("mixer.query.weight") for name in ternary)
    assert sum(each.numel() for each in latent.values()) == sum(
        each.numel() for each in [*model.parameters(), model.routers.bias]
    )


def test_a_large_model_has_several_files_and_an_index(run: Path, tmp_path: Path) -> None:
    one = plan_hub_export(run)
    write_hub_export(one, tmp_path / "one")
    write_hub_export(plan_hub_export(run, file_bytes=one.num_bytes // 3), tmp_path / "many")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = {path.name for path in (tmp_path / "many").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files and len(files) >= 3
    joined = {name: each for file in files for name, each in load_file(tmp_path / "many" / file).items()}
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert set(joined) == set(whole) == set(index["weight_map"])
    assert all(torch.equal(joined[name], each) for name, each in whole.items())


def test_the_card_has_measured_figures_data_and_license(run: Path, tmp_path: Path) -> None:
    step = Run.open(run).step
    entry = {"step": step, "validation/loss": 2.34567, "validation/bits_per_byte": 3.21}
    with (run / "log.jsonl").open("a") as log:
        log.write(json.dumps(entry) + "\n" + json.dumps({**entry, "step": step + 1, "validation/loss": 1.0}) + "\n{")
    scores = {"exact_match": {"value": 0.25, "stderr": 0.125}}
    (run / "results.json").write_text(json.dumps({"tasks": {"gsm8k": {"n": 12, "scores": scores}}}))
    assert export(run, tmp_path / "out", "--license", "mit") == 0
    front, text = read_card(tmp_path / "out")
    assert (front["license"], front["library_name"], front["pipeline_tag"]) == (
        "mit",
        "transformers",
        "text-generation",
    )
    validation, task = front["model-index"][0]["results"]
    assert [metric["value"] for metric in validation["metrics"]] == [2.3457, 3.21]
    assert task["dataset"]["name"] == "gsm8k" and task["metrics"][0]["value"] == 0.25
    assert f"Validation at step {step}: 2.3457 nats per token, 3.2100 bits per byte" in text
    assert "| gsm8k | exact_match | 0.2500 | 0.1250 | 12 |" in text and "arXiv:2307.08621" in text


def test_a_card_tells_what_is_unknown(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "run" / "none", ignore_errors=True)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["path"] = str(tmp_path / "gone")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "log.jsonl").unlink()
    assert export(run, tmp_path / "out") == 0
    front, text = read_card(tmp_path / "out")
    assert "license" not in front and "model-index" not in front
    assert "No license was given" in text and "shards were not at hand" in text


def test_a_chat_template_begins_with_the_document_token(run: Path, tmp_path: Path) -> None:
    (run / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "other.jinja").write_text("{{ bos_token }}" + TEMPLATE)
    assert export(run, tmp_path / "own") == 0
    assert export(run, tmp_path / "given", "--chat-template", str(tmp_path / "other.jinja")) == 0
    for name in ("own", "given"):
        config = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert config["chat_template"].count("bos_token") == 1
    assert "chat template" in (tmp_path / "own" / "README.md").read_text()
    with pytest.raises(UserError, match="leaves out what was said"):
        begin_with_document("{{ bos_token }}", DOCUMENT_TOKEN, "file")


def test_bytes_become_a_byte_level_bpe_without_merges() -> None:
    tokenizer = Tokenizer.of_bytes()
    library = make_library_tokenizer(tokenizer)
    text = "né 漢\r\n\x00😀 " + "".join(map(chr, range(0x250)))
    assert library.encode(text).ids == [256, *tokenizer.encode(text)]
    assert library.decode(library.encode(text).ids) == text and library.get_vocab_size() == 257


def test_mistakes_are_refused_with_a_remedy(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    (tmp_path / "there").mkdir()
    assert "exists already; name a new folder" in refusal(capsys, str(run), str(tmp_path / "there"), "--format", "hf")
    assert "leave out --dtype" in refusal(capsys, str(run), out, "--format", "hf", "--dtype", "bf16")
    assert "--weights ternary: is for --format hf alone" in refusal(capsys, str(run), out, "--weights", "ternary")
    assert "--license mit: is for --format hf alone" in refusal(capsys, str(run), out, "--license", "mit")
    (tmp_path / "bad.jinja").write_text("{% for")
    words = refusal(capsys, str(run), out, "--format", "hf", "--chat-template", str(tmp_path / "bad.jinja"))
    assert "bad.jinja: is no Jinja" in words
    assert "no checkpoint of step 999" in refusal(capsys, str(run), out, "--format", "hf", "--step", "999")
    assert not (tmp_path / "out").exists()


def test_a_run_without_its_tokenizer_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "tokenizer.json").write_text('{"kind": "bytes"} ')
    assert "is not the tokenizer" in refusal(capsys, str(run), str(tmp_path / "out"), "--format", "hf")
    (run / "tokenizer.json").unlink()
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["path"] = str(tmp_path / "gone")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert "needs its tokenizer" in refusal(capsys, str(run), str(tmp_path / "out"), "--format", "hf")


def test_a_checkpoint_newer_than_this_version_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in run.glob("checkpoints/*/manifest.json"):
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps({**manifest, "format": 99}))
    words = refusal(capsys, str(run), str(tmp_path / "out"), "--format", "hf")
    assert words.count("\n") == 1 and "manifest" in words, words


def test_plain_models_have_no_codes_to_pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(FIXTURES / "plain", tmp_path / "run")
    shutil.copy(FIXTURES / "shards" / "tokenizer.json", tmp_path / "run")
    words = refusal(capsys, str(tmp_path / "run"), str(tmp_path / "out"), "--format", "hf", "--weights", "ternary")
    assert "there are no ternary codes; export it with --weights latent" in words
    assert export(tmp_path / "run", tmp_path / "out", "--dry-run") == 0 and not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_finished_leaves_nothing(tmp_path: Path) -> None:
    def fail(stream: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device"):
        write_folder(tmp_path / "out", [("a", lambda stream: stream.write(b"a")), ("b", fail)])
    assert list(tmp_path.iterdir()) == []
