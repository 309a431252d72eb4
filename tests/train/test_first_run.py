"""What a newcomer's first configuration leaves out or asks too much of."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import kabrn_dist as mk
from kabrn_dist.config.file import load_config
from kabrn_dist.distributed.mesh import single_process_mesh
from kabrn_dist.train.datasets import describe_repetition, open_datasets
from kabrn_dist.train.throughput import Speed, Utilization, describe_long_run, measure_speed
from kabrn_dist.utils.errors import UserError
from tests.support import fork_server
from tests.support.runs import write_small_config
from tests.support.shard_sets import Texts, make_set


def test_a_vocabulary_that_is_left_out_is_that_of_the_shards(tmp_path: Path) -> None:
    make_set(tmp_path / "set", Texts("one"))
    config = write_small_config(tmp_path / "c.yaml", tmp_path / "set", tmp_path / "run")
    tree = yaml.safe_load(config.read_text())
    del tree["model"]["vocab_size"]
    config.write_text(yaml.safe_dump(tree))
    loaded = mk.load_config(config)
    assert loaded.model.vocab_size == 257 == open_datasets(loaded).tokenizer.vocab_size
    assert mk.load_config(config, ["model.vocab_size=300"]).model.vocab_size == 300
    with pytest.raises(UserError, match=r"model\.vocab_size is missing"):
        load_config(config)
    with pytest.raises(UserError, match="nowhere"):
        mk.load_config(config, ["data.path=/nowhere"])


def test_a_run_of_more_than_a_day_is_told_at_the_start(shards: Path, tmp_path: Path) -> None:
    assert describe_long_run(86_400.0, "x") == describe_long_run(float("nan"), "x") == ""
    config = write_small_config(tmp_path / "c.yaml", shards, tmp_path / "run", training__steps=10**9)
    with fork_server.start_ranks("launch.train:main", [["--config", str(config), "--stop-after", "3"]], 1) as group:
        ended = group.wait(60)
    assert ended.exit_codes == (0,), ended.output
    assert ended.output.count("warning: at the speed of the first steps this run takes ") == 1
    assert " days to its last step; lower training.steps" in ended.output


def test_a_text_that_is_read_too_often_is_told(shards: Path, tmp_path: Path) -> None:
    config = mk.load_config(write_small_config(tmp_path / "c.yaml", shards, tmp_path / "run", training__steps=10**6))
    train = open_datasets(config).train
    epochs = 10**6 * config.training.global_batch_size / train.num_sequences
    assert f"{train.corpus.names[0]} {epochs:,.0f} times" in describe_repetition(config, train)
    few = mk.load_config(tmp_path / "c.yaml", ["training.steps=10"])
    assert describe_repetition(few, train) == ""


def test_a_rate_that_steps_exceed_is_measured_again(shards: Path, tmp_path: Path) -> None:
    config = mk.load_config(write_small_config(tmp_path / "c.yaml", shards, tmp_path / "run"))
    mesh = single_process_mesh()
    flops = measure_speed(config, mesh)
    # What a machine measures that works on other things meanwhile.
    slow = Speed(flops.matmul_rate / 1000, flops.mfu_per_token_rate * 1000)
    utilization = Utilization(config, mesh, slow)
    tokens_per_second = 0.1 / flops.mfu_per_token_rate
    again, line = utilization.measure(tokens_per_second)
    assert 0 < again < 1 and "while the machine was busy" in line
    assert utilization.measure(tokens_per_second) == (again, "")


def test_a_set_without_validation_trains_where_none_is_asked_for(tmp_path: Path) -> None:
    texts = Texts("one", validation=0)
    make_set(tmp_path / "set", texts)
    config = write_small_config(
        tmp_path / "c.yaml",
        tmp_path / "set",
        tmp_path / "run",
        model__vocab_size=257,
        training__steps=2,
        validation__eval_interval=0,
    )
    ended = fork_server.run_ranks("launch.train:main", [["--config", str(config)]], 1)
    assert ended.exit_code == 0 and "nothing validates this run" in ended.output, ended.output
    with pytest.raises(UserError, match=r"0 tokens.*hold out more text.*validation\.eval_interval to 0"):
        open_datasets(load_config(config, ["validation.eval_interval=1"]))
