"""The command line: quick help, one wording of errors, exit codes, and the scripts that pass on to it."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kabrn_dist
from kabrn_dist.cli import main as cli
from kabrn_dist.cli import shim
from kabrn_dist.cli.main import COMMANDS, build_parser, main
from kabrn_dist.utils.errors import UserError

ROOT = Path(__file__).parents[2]
NAMES = [module.__name__.rsplit(".", 1)[-1].rstrip("_") for module in COMMANDS]
HELPS = [
    [],
    *([name] for name in NAMES),
    *(["report", kind] for kind in ("experts", "functions", "symbolic", "weights")),
]
HEAVY = {"torch", "deepspeed", "matplotlib", "numpy", "pydantic", "yaml", "rich"}


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import contextlib, io, sys\n"
        "from kabrn_dist.cli.main import main\n"
        f"for command in {HELPS!r}:\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        main([*command, '--help'])\n"
        "    assert 'usage: mixkabrn' in out.getvalue(), command\n"
        "with contextlib.suppress(SystemExit):\n"
        "    main(['--version'])\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout == f"mixkabrn {kabrn_dist.__version__}\n[]\n", result.stdout + result.stderr


@pytest.mark.parametrize("name", NAMES)
def test_help_shows_examples_that_parse(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    shown = capsys.readouterr().out.partition("examples:\n")[2].replace("\\\n", " ")
    examples = [shlex.split(line) for line in shown.splitlines() if line.strip().startswith("mixkabrn ")]
    assert examples
    for _, *arguments in examples:
        build_parser().parse_args(arguments)


def run_with(outcome: BaseException | int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command that ends as given."""

    def run(options: Any) -> int:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr("kabrn_dist.cli.inspect.run", run)
    return main(["inspect", "data"])


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with(75, monkeypatch) == 75
    assert run_with(UserError("data: is wrong; mend it"), monkeypatch) == 2
    assert capsys.readouterr().err == "error: data: is wrong; mend it\n"
    assert run_with(KeyboardInterrupt(), monkeypatch) == 130
    assert capsys.readouterr().err == "interrupted\n"
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(cli, "REPORT_SECONDS", 0)
    assert run_with(UserError("data: is wrong; mend it"), monkeypatch) == 2
    assert capsys.readouterr().err == "", "another process of the machine prints it"


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = [sys.executable, "-m", "kabrn_dist", "config"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode in (141, -signal.SIGPIPE)


@pytest.mark.parametrize(
    ("script", "typed", "expected"),
    [
        ("train", "--config c.yaml --resume must", "train c.yaml --resume must"),
        ("train", "--local_rank=1 --config=c.yaml --set a.b=1", "train c.yaml --local_rank=1 --set a.b=1"),
        ("train", "--config c.yaml --dry-run --world 4", "train c.yaml --dry-run --world 4"),
        ("train", "--help", "train --help"),
        ("generate", "--prompt x --run runs/a", "generate runs/a --prompt x"),
        ("generate", "--model exports/a", "generate exports/a"),
        ("export", "--out exports/a --run runs/a", "export runs/a exports/a"),
        ("grow", "--from runs/a --config c.yaml --redraw 0.5", "grow runs/a c.yaml --redraw 0.5"),
        ("report", "symbolic --run runs/a --layer 0", "report symbolic runs/a --layer 0"),
    ],
)
def test_scripts_pass_on_what_was_typed(
    script: str, typed: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[list[str]] = []

    def record(arguments: list[str]) -> int:
        passed.append(arguments)
        return 3

    monkeypatch.setattr(shim, "main", record)
    launcher = __import__(f"launch.{script}", fromlist=["main"])
    assert launcher.main(typed.split()) == 3 and passed == [expected.split()]


def test_a_script_names_the_flag_that_lacks_its_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert shim.run_script(["train"], ("--config",), ["--config"]) == 2
    assert capsys.readouterr().err == "error: --config: give it a value; see mixkabrn train --help\n"


def test_a_launcher_may_put_its_rank_first() -> None:
    options = build_parser().parse_args(["--local_rank=1", "train", "c.yaml", "--set", "a.b=1"])
    assert options.config == Path("c.yaml") and options.set == ["a.b=1"]


def test_a_run_that_does_not_exist_names_those_that_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("large", "small"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    for command in (
        ["generate", "{}"],
        ["export", "{}", "out"],
        ["report", "functions", "{}"],
        ["report", "experts", "{}"],
    ):
        assert main([part.format(tmp_path / "smal") for part in command]) == 2
        error = capsys.readouterr().err
        assert error == f"error: {tmp_path}/smal: no such folder; {tmp_path} contains large, small\n"


def test_the_package_imports_its_names_when_they_are_used() -> None:
    code = (
        "import sys, kabrn_dist as mk\n"
        "assert not {'torch', 'numpy', 'yaml', 'pydantic'} & set(sys.modules)\n"
        "assert callable(mk.load_config) and 'torch' not in sys.modules\n"
        "assert issubclass(mk.UserError, Exception) and mk.__version__\n"
        "assert {'Trainer', 'load_model', 'Run'} <= set(dir(mk))\n"
        "try:\n    mk.nothing\nexcept AttributeError as error:\n    print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout == "module 'kabrn_dist' has no attribute 'nothing'\n", result.stdout + result.stderr


def test_the_api_generates_from_an_export() -> None:
    model, tokenizer = kabrn_dist.load_model(ROOT / "tests/fixtures/version_1/export")
    assert "".join(model.generate("Once", tokenizer=tokenizer, tokens=3, temperature=0)) == "g/#"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "c.yaml", "--stop-after", "-5"], "-5 is less than 0"),
        (["train", "c.yaml", "--processes", "0"], "0 is less than 1"),
        (["plan", "c.yaml", "--world", "-2"], "-2 is less than 1"),
    ],
)
def test_counts_below_their_least_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("generat runs/a", "'generat' is none of prepare, inspect, plan, train, "),
        ("generat runs/a", "; did you mean generate?; see mixkabrn --help"),
        (
            "report function runs/a",
            "'function' is none of experts, functions, symbolic, weights; did you mean functions?",
        ),
        ("prepare --source txt", "--source: 'txt' is none of python-stdlib, text; did you mean text?"),
        ("prepare --source text --vocabulary 2k", "--vocabulary: '2k' is not a whole number; write it in digits"),
        ("prepare --source text --shard-mb big", "--shard-mb: 'big' is not a number; "),
        ("generate runs/a --tokens 0", "--tokens: 0 is less than 1; see mixkabrn generate --help"),
        (
            "generate --run runs/a --prompt x",
            "unknown option --run; give RUN|MODEL without it; see mixkabrn generate --help",
        ),
        ("train --config=c.yaml", "unknown option --config; give CONFIG without it; see mixkabrn train --help"),
        ("train --steps=3", "unknown option --steps; did you mean --set training.steps=3?"),
        ("prepare --sorce text --out x", "unknown option --sorce; did you mean --source?"),
        ("generate --prom x", "the following arguments are required: RUN|MODEL; see mixkabrn generate --help"),
        ("generate runs/a --promt x", "unknown option --promt; did you mean --prompt?"),
        ("generate runs/a b", "b: more than the command takes; quote a text with spaces"),
        ("train c.yaml --steps 10", "unknown option --steps; did you mean --set training.steps=10?"),
        ("train c.yaml --lr=1", "unknown option --lr; did you mean --set optimizer.learning_rate=1?"),
        ("plan c.yaml --hidden-size", "unknown option --hidden-size; did you mean --set model.hidden_size=…?"),
        ("train c.yaml --stop-aftr 3", "unknown option --stop-aftr; did you mean --stop-after?"),
        ("export runs/a", "the following arguments are required: OUT; see mixkabrn export --help"),
    ],
)
def test_a_wrong_command_line_is_answered_in_one_line(
    typed: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(typed.split()) == 2
    out, error = capsys.readouterr()
    assert said in error and error.startswith("error: ") and error.count("\n") == 1 and not out


def test_what_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run/checkpoints/step-00000010").mkdir(parents=True)
    (tmp_path / "run/config.yaml").touch()
    (tmp_path / "data").mkdir()
    for name in ("index.json", "tokenizer.json"):
        (tmp_path / "data" / name).touch()
    for folder, said in (
        ("run/config.yaml", "run/config.yaml: is a file; name the folder of a run"),
        ("run/checkpoints/step-00000010", f"is a part of a run; name the run's folder, {tmp_path}/run\n"),
        ("data", "data: holds shards; name the folder of a run that was trained on them"),
    ):
        for command in (["generate", "{}"], ["export", "{}", "out"], ["report", "functions", "{}"]):
            assert main([part.format(tmp_path / folder) for part in command]) == 2
            assert said in capsys.readouterr().err
    (tmp_path / "model").mkdir()
    for name in ("config.yaml", "model.safetensors", "tokenizer.json"):
        (tmp_path / "model" / name).touch()
    for command in (["export", "{}", "out"], ["report", "weights", "{}"], ["report", "experts", "{}"]):
        assert main([part.format(tmp_path / "model") for part in command]) == 2
        assert "is an export; name the run that it was made from" in capsys.readouterr().err


def test_a_folder_without_shards_is_told_from_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("a text")
    (tmp_path / "data" / "one").mkdir(parents=True)
    (tmp_path / "data" / "one" / "index.json").touch()
    train = ["train", str(ROOT / "configs/cpu.yaml"), "--set"]
    for path, said in (
        ("corpus", "--input corpus --out corpus-shards`, and set data.path to corpus-shards"),
        ("data", "shards lie below it: set data.path to data/one"),
        ("none", "no such folder; make it with `mixkabrn prepare --source text --input TEXTS --out none`"),
    ):
        assert main([*train, f"data.path={path}"]) == 2
        assert said in capsys.readouterr().err


def test_missing_data_is_told_with_its_key_and_its_command_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from kabrn_dist.cli.main import main\n"
        f"code = main(['train', {str(ROOT / 'configs/tiny.yaml')!r}])\n"
        "sys.exit(code if 'torch' not in sys.modules else 'torch was imported')"
    )
    environment = {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2 and ended.stderr == (
        f"error: data.path data/python-stdlib (in {tmp_path}, where the command was started): no such folder; make it "
        "with `mixkabrn prepare --source python-stdlib --vocabulary 2048 --out data/python-stdlib`, or set data.path "
        "to the folder of your shards\n"
    )


def test_a_terminal_gets_no_markdown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "training.steps"]) == 0
    assert capsys.readouterr().out.startswith("- **`training.steps`** (")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["config", "training"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("training\n") and "\n- training.steps (whole number" in shown and "`" not in shown


def test_a_plan_has_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "configs/tiny.yaml", "--world", str(10**12)]) == 2
    assert "1000000000000 processes are not 1 to 1000000" in capsys.readouterr().err
    assert main(["plan", "configs/tiny.yaml", "--world", "2", "--set", "model.hidden_size=1000000000000"]) == 2
    message = capsys.readouterr().err
    assert "a process needs at least " in message and "the largest machine that can be planned for has 1 PiB" in message
