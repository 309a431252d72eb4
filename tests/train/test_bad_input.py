"""A user's mistake gives one clear message and a code not 0, on all ranks, with no traceback and no hang."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import fork_server
from tests.support.runs import (
    CommandResult,
    run_command,
    run_training,
    write_small_config,
)


def train(world: int, config: Path, *options: str) -> CommandResult:
    arguments = ("--config", str(config), *options)
    return run_training(world, *arguments, timeout=120)


def check(result: CommandResult, *words: str) -> None:
    assert result.exit_code != 0, result.output
    assert "Traceback" not in result.output, result.output
    assert result.output.count("error: ") == 1, result.output
    message = next(line for line in result.output.splitlines() if "error: " in line)
    for word in words:
        assert word in message, (word, message)


def computes_in_fp16() -> bool:
    return bool(torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_fp16_supported())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__hiden_size": 64}, ("model.hiden_size", "did you mean 'model.hidden_size'")),
        ({"training__steps": "many"}, ("training.steps", "'many'")),
        ({"model__experts__top_k": 9}, ("top_k 9", "4 routed")),
        ({"model__vocab_size": 100}, ("model.vocab_size 100", "257")),
        ({"data__path": "/nowhere"}, ("/nowhere",)),
        ({"data__sequence_length": 10_000_000}, ("10000000",)),
        ({"training__global_batch_size": 3}, ("training.global_batch_size 3", "training.micro_batch_size 2")),
        pytest.param(
            {"training__precision": "fp16"},
            ("training.precision fp16", "bf16"),
            marks=pytest.mark.skipif(computes_in_fp16(), reason="this processor computes in fp16"),
        ),
    ],
)
def test_bad_settings(changes: dict[str, Any], words: tuple[str, ...], shards: Path, tmp_path: Path) -> None:
    check(train(1, write_small_config(tmp_path / "c.yaml", shards, tmp_path / "run", **changes)), *words)
    assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.parametrize("damage", ["missing", "truncated", "tokenizer"])
def test_damaged_data_ends_all_ranks(damage: str, shards: Path, tmp_path: Path) -> None:
    data = tmp_path / "shards"
    shutil.copytree(shards, data)
    shard = next(data.glob("*-train-*.tar"))
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1000])
    else:
        (data / "tokenizer.json").write_text('{"kind": "bytes" }')
    words = ("tokenizer.json",) if damage == "tokenizer" else (shard.name,)
    check(train(2, write_small_config(tmp_path / "c.yaml", data, tmp_path / "run")), *words)


def test_a_shard_that_breaks_while_one_rank_reads_it_ends_all_ranks(shards: Path, tmp_path: Path) -> None:
    data = tmp_path / "shards"
    shutil.copytree(shards, data)
    config = write_small_config(tmp_path / "c.yaml", data, tmp_path / "run", training__steps=2000)
    log, shard = tmp_path / "run" / "log.jsonl", next(data.glob("*-train-*.tar"))
    with fork_server.start_ranks("launch.train:main", [["--config", str(config)]], 2) as group:
        while not (log.exists() and log.read_text().count("\n") >= 3):
            assert group.exit_codes() == [None, None], group.output()
            time.sleep(0.02)
        os.truncate(shard, shard.stat().st_size // 2)
        ended = group.wait(120)
    check(CommandResult(ended.exit_code, ended.output), shard.name, "block")


def test_one_flipped_bit_in_a_shard_ends_all_ranks_before_a_checkpoint(shards: Path, tmp_path: Path) -> None:
    data = tmp_path / "shards"
    shutil.copytree(shards, data)
    shard = next(data.glob("*-train-*.tar"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    config = write_small_config(tmp_path / "c.yaml", data, tmp_path / "run")
    check(train(2, config), shard.name, "sha256", "mixkabrn inspect")
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_two_processes_refuse_what_they_cannot_share(shards: Path, tmp_path: Path) -> None:
    config = write_small_config(tmp_path / "c.yaml", shards, tmp_path / "run", parallel__expert_parallel=3)
    check(train(2, config), "parallel.expert_parallel 3", "2 processes", "1, 2")


def test_resume_says_what_differs(shards: Path, tmp_path: Path) -> None:
    config = write_small_config(tmp_path / "c.yaml", shards, tmp_path / "run")
    check(train(1, config, "--resume", "must"), "--resume must", "no intact checkpoint")
    assert train(1, config, "--stop-after", "2").exit_code == 0
    check(train(1, config, "--resume", "never"), "--resume never", "step-00000002")
    check(train(1, config, "--set", "run.seed=4"), "seed")
    check(train(1, config, "--set", "model.hidden_size=64"), "model.hidden_size is 32", "set model.hidden_size to 32")
    check(train(1, config, "--set", "training.global_batch_size=16"), "training.global_batch_size 16", "set it to 8")


def test_generate_refuses_a_folder_without_a_run(tmp_path: Path) -> None:
    check(run_command([sys.executable, "launch/generate.py", "--run", str(tmp_path)]), "config.yaml")


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    command = [sys.executable, "-m", "data_prep", "--source", "text", "--input", str(tmp_path / "texts")]
    check(run_command([*command, "--tokenizer", "bytes", "--out", str(tmp_path / "out")]), "texts")


def test_a_dry_run_starts_nothing(shards: Path, tmp_path: Path) -> None:
    config = write_small_config(tmp_path / "c.yaml", shards, tmp_path / "run", parallel__expert_parallel=2)
    result = train(1, config, "--dry-run", "--world", "4")
    assert result.exit_code == 0, result.output
    for words in ("parameters", "active per token", "of one expert", "expert groups        [0, 1]; [2, 3]"):
        assert words in result.output
    assert not (tmp_path / "run").exists()
    assert json.dumps(result.output)
