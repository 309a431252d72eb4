"""`mixkabrn adapter`, from a fine-tuned run to model files and back, and its messages."""

from __future__ import annotations

from pathlib import Path

import pytest

from kabrn_dist.adapters.folder import read_adapter, write_adapter
from kabrn_dist.cli.adapter import parse_weighted_path
from kabrn_dist.cli.main import main
from kabrn_dist.inference.adapters import hash_model_codes
from kabrn_dist.inference.load import load_export
from kabrn_dist.inference.run import Run
from kabrn_dist.runtime.model_file import read_model_file
from kabrn_dist.runtime.patch_file import hash_file_codes
from kabrn_dist.utils.errors import UserError
from tests.support.finetunes import train_base, write_finetune
from tests.support.native_adapters import draw_states
from tests.support.native_models import write_random_model
from tests.support.runs import run_sessions

METHODS = ("lora", "ternary_lora", "state")


@pytest.fixture(scope="module")
def place(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and a fine-tuned run of each method."""
    folder = tmp_path_factory.mktemp("adapters")
    base = train_base(folder)
    paths = [write_finetune(folder / f"{method}.yaml", shards, base, method) for method in METHODS]
    run_sessions(1, [[str(path), "never", None] for path in paths], folder)
    for method in METHODS:
        assert main(["adapter", "export", str(folder / method), "--out", str(folder / "adapters" / method)]) == 0
    return folder


def use(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.slow
def test_an_adapter_goes_from_its_run_to_model_files_and_back(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, run, adapter = place / "base", Run.open(place / "ternary_lora"), place / "adapters" / "ternary_lora"
    info = read_adapter(adapter).info
    assert (info.name, info.steps, info.base_sha256) == (
        "ternary_lora",
        run.step,
        hash_model_codes(Run.open(base).model()),
    )
    assert info.result_sha256 == hash_model_codes(run.model())
    assert use("pack", base, "--out", tmp_path / "base.mkb") == 0
    assert use("adapter", "apply", tmp_path / "base.mkb", adapter, "--out", tmp_path / "tuned.mkb") == 0
    assert hash_file_codes(read_model_file(tmp_path / "tuned.mkb")) == info.result_sha256
    assert use("adapter", "remove", tmp_path / "tuned.mkb", adapter, "--out", tmp_path / "again.mkb") == 0
    assert (tmp_path / "again.mkb").read_bytes() == (tmp_path / "base.mkb").read_bytes()
    assert use("adapter", "merge", base, adapter, "--out", tmp_path / "merged") == 0
    assert hash_model_codes(load_export(tmp_path / "merged")[0]) == info.result_sha256
    for method in METHODS:
        packed = tmp_path / f"{method}.mka"
        file = place / "adapters" / method / "adapter_model.safetensors"
        assert use("adapter", "pack", file, "--model", tmp_path / "base.mkb", "--out", packed) == 0
        assert packed.read_bytes()[:8] == b"\x89MKA\r\n\x1a\n"
    capsys.readouterr()
    # Each refusal is one line.
    for arguments, message in (
        (["apply", tmp_path / "tuned.mkb", adapter, "--out", tmp_path / "x"], "the file has it already"),
        (["apply", tmp_path / "base.mkb", adapter, "--out", tmp_path / "tuned.mkb"], "replace it with --force"),
        (["remove", tmp_path / "base.mkb", adapter, "--out", tmp_path / "x"], "does not have it"),
        (["merge", base, place / "adapters" / "lora", "--out", tmp_path / "x"], "ternary_lora, which can be merged"),
        (["merge", base, place / "adapters" / "state", "--out", tmp_path / "x"], "beside the model"),
        (["export", base, "--out", tmp_path / "x"], "there is no adapter"),
        (["export", place / "lora", "--out", adapter], "exists already"),
        (["info", base], "no such file; name the folder of an adapter"),
    ):
        assert use("adapter", *arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_generation_with_an_adapter_is_that_of_its_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def generate(*arguments: object) -> str:
        capsys.readouterr()
        assert use("generate", *arguments, "--prompt", "def ", "--tokens", 30, "--temperature", 0) == 0
        return capsys.readouterr().out

    plain = generate(place / "base")
    for method in METHODS:
        adapter = place / "adapters" / method
        assert generate(place / "base", "--adapter", adapter) == generate(place / method)
    assert generate(place / "base", "--adapter", f"{place / 'adapters' / 'lora'}=0") == plain
    assert use("export", place / "base", place / "export") == 0
    adapter = place / "adapters" / "ternary_lora"
    assert generate(place / "export", "--adapter", adapter) == generate(place / "ternary_lora")
    assert use("generate", place / "base", "--adapter", f"{adapter}=0.5") == 2
    assert "with weight 1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_is_never_put_beside_itself(method: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = place / method
    assert use("generate", run, "--adapter", run / "adapter", "--tokens", 2) == 2
    assert f"mixkabrn generate {place / 'base'} --adapter {run / 'adapter'}" in capsys.readouterr().err


@pytest.mark.slow
def test_what_an_adapter_holds_is_shown(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method, held in (("lora", "values of factors"), ("ternary_lora", "flipped codes of"), ("state", "layers 0, 1")):
        capsys.readouterr()
        assert use("adapter", "info", place / "adapters" / method) == 0
        shown = capsys.readouterr().out
        assert f"adapter '{method}', method {method}" in shown and held in shown and "6 steps, rank 4" in shown


def test_paths_with_weights() -> None:
    given = {"a": ("a", 1.0), "a=0.5": ("a", 0.5), "a=b": ("a=b", 1.0), "a=b=-2": ("a=b", -2.0)}
    assert {text: parse_weighted_path(text) for text in given} == {t: (Path(p), w) for t, (p, w) in given.items()}


def test_no_file_that_is_needed_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "base.mkb"
    write_random_model("rational", model)
    write_adapter(draw_states(read_model_file(model)), tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    content = file.read_bytes(), model.read_bytes()
    for adapter in (file.parent, file):
        for out in (file, model):
            assert use("adapter", "pack", adapter, "--model", model, "--out", out, "--force") == 2
        for command in ("apply", "remove"):
            assert use("adapter", command, model, adapter, "--out", file, "--force") == 2
    assert capsys.readouterr().err.count("would be lost") == 8
    assert (file.read_bytes(), model.read_bytes()) == content


@pytest.mark.parametrize("name", ["a" * 5000, "a" * 300], ids=["path", "name"])
def test_names_that_no_file_can_have(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert use("adapter", "info", tmp_path / name) == 2
    error = capsys.readouterr().err
    assert "is too long" in error and len(error) < 1000
    with pytest.raises(UserError, match="no such file"):
        read_adapter(tmp_path / name)
