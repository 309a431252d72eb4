"""What a newcomer's first configuration leaves out or asks too much of."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kabrn_dist.config.file import load_config
from kabrn_dist.train.datasets import open_datasets, read_vocab_size
from kabrn_dist.train.throughput import describe_long_run
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
    loaded = load_config(config, find_vocab_size=read_vocab_size)
    assert loaded.model.vocab_size == 257 == open_datasets(loaded).tokenizer.vocab_size
    assert load_config(config, ["model.vocab_size=300"], read_vocab_size).model.vocab_size == 300
    with pytest.raises(UserError, match=r"model\.vocab_size is missing"):
        load_config(config)
    with pytest.raises(UserError, match="nowhere"):
        load_config(config, ["data.path=/nowhere"], read_vocab_size)


def test_a_run_of_more_than_a_day_is_told_at_the_start(shards: Path, tmp_path: Path) -> None:
    assert describe_long_run(86_400.0, "x") == describe_long_run(float("nan"), "x") == ""
    config = write_small_config(tmp_path / "c.yaml", shards, tmp_path / "run", training__steps=10**9)
    with fork_server.start_ranks("launch.train:main", [["--config", str(config), "--stop-after", "3"]], 1) as group:
        ended = group.wait(60)
    assert ended.exit_codes == (0,), ended.output
    assert ended.output.count("warning: at the speed of the first steps this run takes ") == 1
    assert " days to its last step; lower training.steps" in ended.output


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
