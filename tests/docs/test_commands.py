"""Commands in the documents work: every `bash` block runs, but for those that a comment exempts.

A page's blocks run in order, in a folder with a corpus, `small.yaml`, `wide.yaml`, and short copies of
`configs/cpu.yaml` and `configs/finetune.yaml`; on pages that do not prepare data themselves, with a trained run in
`runs/small`. `<!-- needs: WHAT -->` on the line above a block exempts it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from kabrn_dist.cli.main import COMMANDS, main
from tests.support.command_server import command_server

ROOT = Path(__file__).parents[2]
NEEDS = {"cluster", "minutes", "files", "terminal", "installation"}
_BLOCK = re.compile(r"(?:^<!-- needs: (\w+) -->\n)?^```bash\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """One block of commands.

    Attributes:
        needs: why it cannot run here, "" if it can.
        commands: for bash.
    """

    needs: str
    commands: str


def read_blocks(path: Path) -> list[Block]:
    return [Block(needs, commands) for needs, commands in _BLOCK.findall(path.read_text(encoding="utf-8"))]


PAGES = {
    path.name if path.parent == ROOT else f"docs/{path.name}": path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
}
RUNNABLE = sorted(name for name, path in PAGES.items() if any(not block.needs for block in read_blocks(path)))


def test_exemptions_have_a_known_reason() -> None:
    reasons = {block.needs for path in PAGES.values() for block in read_blocks(path)}
    assert reasons - {""} <= NEEDS
    assert "README.md" in RUNNABLE and "docs/training.md" in RUNNABLE


def make_workplace(folder: Path, script: str) -> None:
    """Write a corpus of 40 documents, two small configurations, the second with more experts, and `mixkabrn`."""
    (folder / "corpus").mkdir(parents=True)
    for number in range(40):
        words = " ".join(f"{number * i % 97} once there was a number {i}," for i in range(60))
        (folder / "corpus" / f"{number}.txt").write_text(words, encoding="utf-8")
    small = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text(encoding="utf-8"))
    small["run"]["folder"] = "runs/small"
    small["data"].update(path="data/corpus", sequence_length=64)
    del small["model"]["vocab_size"]
    small["model"].update(layers=2, hidden_size=32)
    small["model"]["retention"].update(num_heads=2, key_dim=16, value_dim=16)
    small["model"]["experts"].update(num_experts=4, top_k=2, expert_hidden_size=32)
    small["parallel"] = {}
    small["optimizer"]["warmup_steps"] = 1
    small["training"].update(steps=4, global_batch_size=4, micro_batch_size=4, log_interval=1)
    # Pictures are drawn with each validation.
    small["validation"].update(eval_interval=4, eval_sequences=4)
    (folder / "small.yaml").write_text(yaml.safe_dump(small), encoding="utf-8")
    small["run"]["folder"] = "runs/wide"
    small["model"]["experts"].update(num_experts=8, top_k=4)
    (folder / "wide.yaml").write_text(yaml.safe_dump(small), encoding="utf-8")
    cpu = yaml.safe_load((ROOT / "configs" / "cpu.yaml").read_text(encoding="utf-8"))
    cpu["model"].update(layers=2)
    cpu["model"]["experts"].update(num_experts=4)
    cpu["training"].update(steps=4, global_batch_size=4, micro_batch_size=4)
    cpu["data"]["sequence_length"] = 64
    cpu["optimizer"]["warmup_steps"] = 1
    cpu["validation"]["eval_sequences"] = 4
    tune = yaml.safe_load((ROOT / "configs" / "finetune.yaml").read_text(encoding="utf-8"))
    tune["data"]["sequence_length"] = 64
    tune["finetune"]["rank"] = 2
    tune["training"].update(steps=4, global_batch_size=4, micro_batch_size=4)
    tune["optimizer"]["warmup_steps"] = 1
    tune["validation"].update(eval_interval=4, eval_sequences=4)
    (folder / "configs").mkdir()
    for name, config in (("cpu", cpu), ("finetune", tune)):
        (folder / "configs" / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = folder / "bin" / "mixkabrn"
    command.parent.mkdir()
    command.write_text(script, encoding="utf-8")
    command.chmod(0o755)


def run_commands(folder: Path, commands: str) -> None:
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder,
        env=environment,
        timeout=600,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{commands}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


@pytest.fixture(scope="module")
def mixkabrn() -> Iterator[str]:
    """The text of the script `mixkabrn`."""
    with command_server() as script:
        yield script


@pytest.fixture(scope="module")
def trained(mixkabrn: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "work"
    make_workplace(folder, mixkabrn)
    prepare = "mixkabrn prepare --source text --input corpus --vocabulary 512 --out data/corpus"
    run_commands(folder, f"{prepare}\nmixkabrn train small.yaml")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNNABLE)
def test_commands_work(name: str, mixkabrn: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder, blocks = tmp_path / "work", read_blocks(PAGES[name])
    if any("mixkabrn prepare" in block.commands for block in blocks if not block.needs):
        make_workplace(folder, mixkabrn)
    else:
        shutil.copytree(request.getfixturevalue("trained"), folder)
    for block in blocks:
        if not block.needs:
            run_commands(folder, block.commands)


# Examples of --help that need more than a small run: a network, minutes, several machines, files of one's own, or a
# terminal, where they stay.
TOO_LARGE = ("prepare", "train", "grow", "plan", "chat", "serve", "eval", "import", "publish")
# Commands that need a package which a new machine does not have.
PACKAGE_NEEDED = {"page": "ziglang"}


def examples_of(name: str, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    shown = capsys.readouterr().out.partition("examples:\n")[2].replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in shown.splitlines() if line.strip().startswith("mixkabrn ")]


@pytest.mark.slow
def test_examples_of_the_help_texts_work(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a small run, for those of `tiny.yaml`; `test_layouts.py` checks the ones that are too large."""
    shutil.copytree(trained, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    Path("runs/small").rename("runs/tiny")
    Path("data/corpus").rename("data/python-stdlib")
    config = Path("runs/tiny/config.yaml")
    config.write_text(config.read_text().replace("data/corpus", "data/python-stdlib"))
    # What the examples of adapters name: one of flipped codes, which all of them take, and its base under another name.
    tuned = "--set finetune.method=ternary_lora --set data.path=data/python-stdlib"
    run_commands(Path(), f"mixkabrn train configs/finetune.yaml {tuned}\nmixkabrn pack runs/tiny --out base.mkb")
    shutil.copytree("runs/finetune", "runs/tuned")
    shutil.copytree("runs/tiny", "runs/base")
    names = [module.__name__.rsplit(".", 1)[-1].rstrip("_") for module in COMMANDS]
    # Others generate from what it writes.
    names.sort(key=lambda name: name != "export")
    missing = {name for name, package in PACKAGE_NEEDED.items() if importlib.util.find_spec(package) is None}
    examples = [each for name in names if name not in {*TOO_LARGE, *missing} for each in examples_of(name, capsys)]
    assert len(examples) > 8
    for example in examples:
        # The small run has two layers, four experts and four steps.
        typed = ["4" if part == "1200" else part for part in example]
        typed += ["--tokens", "8"] if typed[0] == "generate" else []
        assert main(typed) == 0, (typed, capsys.readouterr().err)
