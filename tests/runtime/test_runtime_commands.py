"""Commands that hand a model file to the program in C, and commands on a machine that lacks what they need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kabrn_dist.cli.main import main
from tests.support.runs import ROOT
from tests.support.servers import pack_small_model

WITHOUT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
from kabrn_dist.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_small_model(tmp_path_factory.mktemp("commands") / "small.mkb")


def run(*arguments: object, absent: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT.replace("ABSENT", repr(absent)), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False, timeout=120, errors="replace", text=True)


def test_generate_hands_a_model_file_to_the_program_in_c(model: Path) -> None:
    options = ["--prompt", "Once", "--tokens", "5", "--temperature", "0", "--threads", "2", "--quiet"]
    done = run("generate", model, *options, absent="torch")
    assert done.returncode == 0 and len(done.stdout) > 3, done
    missing = run("generate", model.parent / "none.mkb")
    assert missing.returncode == 2 and "no such file" in missing.stderr


def test_options_in_front_of_the_file_are_explained(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--tokens", "20", str(model)]) == 2
    assert capsys.readouterr().err == "error: --tokens: options come after FILE, as in: mixkabrn chat FILE --tokens …\n"
    assert main(["generate", "--tokens", "20", str(model)]) == 2
    assert "its options come after it: mixkabrn generate" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["torch", "numpy"])
def test_what_is_not_installed_is_named_in_one_line(module: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model: {}\n")
    done = run("pack", tmp_path / "run", "--out", tmp_path / "m.mkb", absent=module)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done
    assert f"error: {module} is not installed" in done.stderr and f"pip install {module}" in done.stderr


def test_the_first_compilation_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kabrn_dist.kernels import build as kernel_build
    from kabrn_dist.runtime import build

    def write(command: list[str], timeout: int = 0) -> str:
        if "-o" in command:
            Path(command[command.index("-o") + 1]).write_bytes(b"")
        return ""

    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path / "cache")
    for module in (build, kernel_build):
        monkeypatch.setattr(module, "run_compiler", write)
    for shown in ("compiling the runtime, once…\n", ""):
        build.compile_runtime("program")
        assert capsys.readouterr().err == shown


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_pack_replaces_no_link_and_no_pipe(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.mkb"
    if kind == "link":
        out.symlink_to(tmp_path / "target")
    else:
        os.mkfifo(out)
    assert main(["pack", str(tmp_path), "--out", str(out), "--force"]) == 2
    assert "is a link, a device or a pipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% if %}", "is no Jinja"),
        ("{{ messages[0].content }}", "leaves out what was said"),
        ("hello", "leaves out what was said"),
        ("{{ raise_exception('never') }}", "cannot write a conversation of two turns (never)"),
        ("{{ messages.nothing.at.all }}", "cannot write a conversation"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "no such folder"),
    ],
)
def test_a_template_is_checked_when_it_is_packed(
    template: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "chat.jinja").write_text(template)
    out = str(tmp_path / "m.mkb")
    assert main(["pack", str(tmp_path / "none"), "--out", out, "--template", str(tmp_path / "chat.jinja")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_template_that_cannot_be_checked_is_told(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{% if %}")
    options = ["--out", tmp_path / "m.mkb", "--template", tmp_path / "chat.jinja"]
    done = run("pack", tmp_path / "none", *options, absent="jinja2")
    assert "chat.jinja was not checked, as jinja2 is not installed" in done.stderr
