"""Any number of workers, and any number of kills: the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources of several units each, some of whose documents are there twice or nearly twice."""
    folder = tmp_path_factory.mktemp("corpus")
    chance = np.random.default_rng(4)
    vocabulary = np.array([f"{a}{b}{c}" for a in "bcdfg" for b in "aeiou" for c in "klmn"])
    texts = [" ".join(chance.choice(vocabulary, chance.integers(30, 200))) for _ in range(300)]
    texts[200:220] = texts[:20]
    texts[220:240] = [f"{text} again" for text in texts[20:40]]
    for part in range(8):
        lines = [json.dumps({"text": text}) for text in texts[part * 25 : part * 25 + 25]]
        (folder / f"part-{part}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "more").mkdir()
    for number, text in enumerate(texts[200:]):
        (folder / "more" / f"{number}.txt").write_text(text)
    pairs = [json.dumps({"question": f"{n} + 1?", "answer": str(n + 1)}) for n in range(80)]
    (folder / "train.jsonl").write_text("\n".join(pairs) + "\n")
    sources = [
        {"name": "parts", "kind": "jsonl", "input": [f"part-{part}.jsonl" for part in range(8)]},
        {"name": "more", "kind": "text", "input": "more", "weight": 2},
        {"name": "qa", "kind": "openqa", "input": "train.jsonl", "options": {"loss": "answer"}},
    ]
    clean = {"quality": "off", "repetition": "off", "tag": False, "near_numbers": "distinct"}
    tree = {"out": "set", "root": str(folder), "tokenizer": {"train": 400}, "clean": clean, "sources": sources}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree | {"shard_mb": 0.02}))
    return folder / "recipe.yaml"


def command(recipe: Path, out: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "data_prep", "--recipe", str(recipe), "--out", str(out), *flags]


def start(arguments: list[str], **variables: str) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "PMI_SIZE")}
    environment |= {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run(arguments: list[str], **variables: str) -> tuple[int, str]:
    process = start(arguments, **variables)
    out, errors = process.communicate(timeout=120)
    return process.returncode, out + errors


def contents(folder: Path) -> dict[str, bytes]:
    """Without the report, which tells the time that it took."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith("report.")}


@pytest.fixture(scope="module")
def expected(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes, left in peace."""
    out = tmp_path_factory.mktemp("one") / "set"
    code, said = run(command(recipe, out))
    assert code == 0, said
    made = contents(out)
    assert sum(name.startswith("parts-train-") for name in made) > 1 and "index.json" in made
    assert all(source["train"]["documents"] > 20 for source in json.loads(made["index.json"])["sources"])
    return made


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_workers_give_the_same_bytes(workers: int, recipe: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    code, said = run(command(recipe, tmp_path / "set", "--workers", str(workers)))
    assert code == 0, said
    assert contents(tmp_path / "set") == expected


def test_workers_begin_anew_together(recipe: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    for _ in range(2):
        code, said = run(command(recipe, tmp_path / "set", "--workers", "2", "--force"))
        assert code == 0 and "wrote" in said, said
        assert contents(tmp_path / "set") == expected


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_mpirun_gives_the_same_bytes(processes: int, recipe: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    mpirun = str(Path(sys.executable).parent / "mpirun")
    code, said = run([mpirun, "-n", str(processes), *command(recipe, tmp_path / "set")])
    assert code == 0, said
    assert said.count("wrote ") == 1 and contents(tmp_path / "set") == expected


@pytest.mark.parametrize("flags", [("--recipe", "absent.yaml"), ("--set", "root=absent")])
def test_what_one_machine_lacks_ends_all(flags: tuple[str, str], recipe: Path, tmp_path: Path) -> None:
    mpirun = str(Path(sys.executable).parent / "mpirun")
    sound = ["-n", "1", *command(recipe, tmp_path / "set")]
    code, said = run([mpirun, *sound, ":", *sound, *flags])
    assert code != 0 and "Traceback" not in said, said
    assert said.count("error: ") == 1 and "absent" in said, said


def finished(out: Path) -> dict[Path, int]:
    """Records of what has been read, and of shards with these, and when they were written."""
    items, shards = out.glob(".work/runs/item-*.json"), list(out.glob(".work/shards/*-*-[0-9]*.json"))
    tars = (out / path.with_suffix(".tar").name for path in shards)
    return {path: path.stat().st_mtime_ns for path in (*items, *shards, *tars)}


def test_a_run_that_was_killed_goes_on(recipe: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    """Killed at every kind of point, by turns the first of two workers and the other, until it is done."""
    out = tmp_path / "set"
    for fault, workers in (
        ("data.part#2:kill", 1),
        ("data.part@1#2:kill", 2),
        # Of two workers, one may be given all pieces.
        ("data.piece#1:kill", 1),
        ("data.shard#1:kill", 1),
        ("data.shard#2:kill", 1),
        ("data.index:kill", 1),
    ):
        before = finished(out)
        code, said = run(command(recipe, out, "--workers", str(workers)), KABRN_FAULT=fault)
        if "@1" in fault:
            assert code == 2 and "was killed" in said and "Traceback" not in said, said
        else:
            assert code == -signal.SIGKILL, said
        assert not (out / "index.json").exists()
        assert before.items() <= finished(out).items(), "what is finished is not done again"
    assert any(path.suffix == ".tar" for path in finished(out))
    code, said = run(command(recipe, out, "--workers", "2"))
    assert code == 0, said
    assert contents(out) == expected and not (out / ".work").exists()


def test_kills_at_any_moment(recipe: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    chance, kills = random.Random(3), 0
    for _ in range(6):
        process = start(command(recipe, tmp_path / "set", "--workers", "2"))
        time.sleep(chance.uniform(0.3, 3.0))
        kills += process.poll() is None
        process.kill()
        process.communicate(timeout=60)
    code, said = run(command(recipe, tmp_path / "set"))
    assert code == 0 and kills >= 3, said
    assert contents(tmp_path / "set") == expected


def test_changes_under_an_unfinished_run_are_noticed(recipe: Path, tmp_path: Path) -> None:
    out, texts = tmp_path / "set", tmp_path / "texts"
    texts.mkdir()
    for number in range(4):
        (texts / f"{number}.txt").write_text(f"text number {number}")
    flags = ["--source", "text", "--input", str(texts), "--out", str(out), "--tokenizer", "bytes"]
    arguments = [sys.executable, "-m", "data_prep", *flags]
    assert run(arguments, KABRN_FAULT="data.shard:kill")[0] == -signal.SIGKILL
    (texts / "2.txt").write_text("another text")
    code, said = run(arguments)
    assert code == 2 and "sources that have changed since" in said and said.count("\n") == 1, said
    code, said = run([*arguments, "--force"])
    assert code == 0 and "wrote" in said, said
    assert "nothing to do" in run(arguments)[1]
    (texts / "2.txt").write_text("yet another text")
    code, said = run(arguments)
    assert code == 2 and "--force" in said and said.count("\n") == 1, said


def test_a_second_preparation_of_the_folder_is_refused(recipe: Path, tmp_path: Path) -> None:
    first = start(command(recipe, tmp_path / "set"), KABRN_FAULT="data.index:sleep")
    deadline = time.monotonic() + 60
    while not (tmp_path / "set" / "report.json").exists():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    code, said = run(command(recipe, tmp_path / "set", "--force"))
    first.kill()
    first.communicate()
    assert code == 2 and "another preparation is at work" in said, said
