"""Whatever number a key is given, there is one clear message or a run that can be planned, and at once."""

from __future__ import annotations

import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from data_prep.recipe import Recipe, load_recipe
from kabrn_dist.config import Config
from kabrn_dist.config.file import load_config
from kabrn_dist.config.idle import list_idle_settings
from kabrn_dist.planner.count import count_parameters
from kabrn_dist.planner.estimate import describe_plan
from kabrn_dist.planner.memory import check_memory, parameter_floor
from kabrn_dist.train.datasets import open_datasets
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.yaml_section import section_type
from tests.config.test_config import BASE
from tests.config.test_user_values import RECIPE
from tests.support import fork_server
from tests.support.runs import write_small_config
from tests.support.shard_sets import Texts, make_set

NUMBERS = ("1e308", "-1e308", "1e-320", str(2**70), ".nan", ".inf", "-.inf", "-1", "0", "1e12", str(10**12), "1" * 400)
SECONDS = 5.0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_set(folder / "set", Texts("one"), Texts("two"))
    (folder / "base.yaml").write_text(BASE.replace("data/x", str(folder / "set")).replace("size: 64", "size: 300"))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def numeric_keys(model: type[BaseModel], parent: str = "") -> Iterator[tuple[str, str]]:
    """Every key that holds numbers, and how its value is written around one of them."""
    for name, field in model.model_fields.items():
        annotation, key = field.annotation, f"{parent}{name}"
        inner = section_type(annotation)
        origin = typing.get_origin(annotation)
        if inner is not None and origin is not tuple:
            yield from numeric_keys(inner, f"{key}.")
        elif inner is not None:
            yield from numeric_keys(inner, f"{key}.base.") if key == "sources" else ()
        else:
            shapes = {"int": "{}", "float": "{}", "dict": "{{one: {}}}", "tuple": "[{0}, {0}]"}
            text = str(annotation)
            if "int" in text or "float" in text:
                shape = next((shapes[kind] for kind in ("dict", "tuple") if kind in text), "{}")
                yield key, shape


def plan(path: Path, overrides: list[str]) -> None:
    config = load_config(path, overrides)
    config.check_world_size(1)
    check_memory(config, 1, 2.0**34, "this machine")
    assert describe_plan(config, 1) is not None and list_idle_settings(config, 1) is not None
    if overrides[0].startswith(("data", "training", "run", "validation")):
        datasets = open_datasets(config)
        assert datasets.validation.validation_positions(config.validation.eval_sequences)
        total = config.training.steps * config.training.global_batch_size
        assert datasets.train.sequences_drawn(total)


def attempt(work: Callable[[Path, list[str]], object], path: Path, overrides: list[str]) -> str:
    """The message of a refusal; empty if there was none."""
    begin = time.process_time()
    try:
        work(path, overrides)
        message = ""
    except UserError as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 1000, (overrides, message)
    assert time.process_time() - begin < SECONDS, overrides
    return message


@pytest.mark.slow
def test_every_number_of_the_configuration_is_planned_or_refused(base: Path) -> None:
    keys = dict(numeric_keys(Config))
    assert {"model.layers", "guard.hang_timeout_s", "data.epochs", "model.retention.decay"} <= {*keys, "model.layers"}
    for key, shape in {**keys, "model.layers": "{}"}.items():
        for number in NUMBERS:
            needed = ["optimizer.second_stage.learning_rate=1e-4"] if "second_stage" in key else []
            needed += ["finetune.base=runs/base"] if key.startswith("finetune.") else []
            message = attempt(plan, base / "base.yaml", [*needed, f"{key}={shape.format(number)}"])
            assert message or number not in (".nan", ".inf", "-.inf", "1e308", "-1e308", "1e-320"), (key, number)
            assert not message or key.rpartition(".")[2] in message or "memory" in message, (key, number, message)


def test_every_number_of_a_recipe_is_read_or_refused(base: Path) -> None:
    for key, shape in numeric_keys(Recipe):
        for number in NUMBERS:
            attempt(load_recipe, base / "recipe.yaml", [f"{key}={shape.format(number)}"])


@pytest.mark.parametrize("kind", ["rational", "chebyshev", "hat", "bspline", "swiglu", "relu2"])
def test_sizes_beyond_memory_are_refused_with_the_figures(kind: str, base: Path) -> None:
    given = f"model.experts.type={kind}"
    for key, count in {
        "model.vocab_size": 10**12,
        "model.hidden_size": 10**12,
        "model.experts.num_experts": 10**12,
        "model.experts.expert_hidden_size": 10**12,
        "training.micro_batch_size": 10**12,
        "training.global_batch_size": 2 * 10**12,
        "model.short_conv_size": 10**15,
    }.items():
        more = ["training.global_batch_size=1000000000000"] if key == "training.micro_batch_size" else []
        message = attempt(plan, base / "base.yaml", [f"{key}={count}", given, *more])
        assert "a process needs at least " in message and "this machine has 16.00 GiB" in message, (key, message)
    message = attempt(plan, base / "base.yaml", ["model.layers=1000000000", given])
    assert "1000000000 layers are more than 10000" in message
    model = load_config(base / "base.yaml", [given, "model.layers=RRA", "model.experts.num_dense_layers=1"]).model
    floor, counts = sum(parameter_floor(model)), count_parameters(model)
    assert 0.4 * counts.total < floor <= counts.total


def test_the_largest_values_that_are_taken_train(shards: Path, tmp_path: Path) -> None:
    largest: dict[str, Any] = {
        "guard__spike_window": 10**6,
        "guard__hang_timeout_s": 1e8,
        "guard__spike_sigma": 1e30,
        "guard__max_bad_steps": 10**15,
        "parallel__bucket_size": 10**15,
        "parallel__ranks_per_node": 10**15,
        "model__scale_group_size": 10**15,
        "model__experts__capacity_factor": 1e6,
        "model__retention__chunk_size": 65536,
        "model__retention__decay": [0.01, 50],
        "checkpoint__keep_last": 10**15,
        "checkpoint__keep_every": 10**15,
        "checkpoint__save_interval": 10**15,
        "validation__eval_sequences": 10**15,
        "run__seed": 10**15,
        "run__max_minutes": 1e30,
        "training__steps": 10**9,
    }
    config = write_small_config(tmp_path / "c.yaml", shards, tmp_path / "run", **largest)
    command = ["--config", str(config), "--stop-after", "2"]
    with fork_server.start_ranks("launch.train:main", [command], 1) as group:
        ended = group.wait(60)
    assert ended.exit_codes == (0,) and "stopped at step 2" in ended.output, ended.output


def test_settings_without_an_effect_are_said(base: Path) -> None:
    def said(*overrides: str) -> str:
        return "\n".join(list_idle_settings(load_config(base / "base.yaml", overrides), 1))

    assert said() == ""
    auto = said("parallel.experts_per_rank=auto")
    assert auto == "parallel.experts_per_rank auto has no effect: parallel.expert_parallel is 1"
    for override, reason in {
        "parallel.state_exchange=ring": "parallel.sequence_parallel is 1",
        "parallel.ternary_wire_format=base_three": "parallel.shard_ternary is false",
        "model.experts.grid_size=7": "model.experts.type is rational",
        "model.router.n_group=2": "topk_group does not limit",
        "model.experts.dense_hidden_size=8": "no layer is dense",
        "data.cache_size_gb=3": "no shard set is a URL",
        "optimizer.warmup_steps=10": "the run ends in its warm-up",
    }.items():
        assert override.partition("=")[0] in said(override) and reason in said(override)
    assert said("guard.spike=off", "guard.spike_window=16") != "" == said("guard.spike_window=16")
