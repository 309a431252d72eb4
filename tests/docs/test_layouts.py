"""Configurations in documented commands fit the processes that the commands start: nothing is trained for it."""

from __future__ import annotations

import functools
import itertools
import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from kabrn_dist.cli import grow, plan, train
from kabrn_dist.cli import main as cli
from kabrn_dist.config import Config
from kabrn_dist.config.file import load_config
from kabrn_dist.planner.estimate import describe_plan

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
HELP = {module.__name__: module.EXAMPLES for module in (cli, train, plan, grow)}
# How launchers and the command itself are told the number of processes.
WORLD = {"--num_gpus", "--nproc_per_node", "-n", "-np", "--world", "--processes"}
# Launchers that find the number in a file of hosts.
HOSTS = {"configs/big.yaml": 64}


class Launch(NamedTuple):
    """A command that trains, plans or grows.

    Attributes:
        place: Where it is documented.
        config: Path of its configuration.
        overrides: Values of --set.
        world: Number of processes.
    """

    place: str
    config: str
    overrides: tuple[str, ...]
    world: int


def find_launches(place: str, text: str) -> list[Launch]:
    """Commands with a configuration of configs/, one a line, also in comments and in back ticks."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        for part in [line.lstrip("# "), *re.findall(r"`([^`]*)`", line)]:
            command = re.split(r"\s{2,}#", part)[0].strip()
            if re.match(r"(mixkabrn|deepspeed|torchrun|mpirun|python) .*configs/\w+\.yaml", command):
                found.append(read_launch(place, shlex.split(command)))
    return [launch for launch in found if "data_mix" not in launch.config]


def read_launch(place: str, words: list[str]) -> Launch:
    config = next(word for word in words if re.fullmatch(r"configs/\w+\.yaml", word))
    overrides = tuple(after for word, after in itertools.pairwise(words) if word == "--set")
    worlds = [int(after) for word, after in itertools.pairwise(words) if word in WORLD]
    return Launch(place, config, overrides, worlds[0] if worlds else HOSTS.get(config, 1))


TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in [*PAGES, *CONFIGS]} | HELP
LAUNCHES = [launch for place, text in TEXTS.items() for launch in find_launches(place, text)]
# The README's recipes are options for one command.
RECIPES = re.findall(
    r"^\| [^|]* \| `(--set [^|]*)` \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE
)


@functools.cache
def check_layout(config: str, overrides: tuple[str, ...], world: int) -> None:
    # Where a configuration leaves the vocabulary to its shards, these are not there: any size will do. The model of a
    # fine-tuning is that of its base: here that of tiny.yaml, which configs/finetune.yaml names.
    if config == "configs/finetune.yaml":
        model = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text(encoding="utf-8"))["model"]
        overrides = (*overrides, f"model={json.dumps(model)}")
    loaded: Config = load_config(ROOT / config, overrides, lambda data: 2048)
    loaded.check_world_size(world)
    assert "parameters" in describe_plan(loaded, world)


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda launch: f"{launch.place}: {launch.config}")
def test_a_documented_command_fits_its_processes(launch: Launch) -> None:
    check_layout(*launch[1:])


@pytest.mark.parametrize("options", RECIPES)
def test_a_recipe_of_the_front_page_fits_small_yaml(options: str) -> None:
    words = shlex.split(options)
    check_layout("configs/small.yaml", tuple(words[1::2]), 4)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_small_yaml_fits_any_usual_number_of_processes(world: int) -> None:
    check_layout("configs/small.yaml", (), world)


def test_enough_commands_are_found() -> None:
    assert len(LAUNCHES) > 20 and len(RECIPES) == 4
    assert {launch.place for launch in LAUNCHES} >= {"README.md", "docs/parallelism.md", *HELP}
    (launch,) = find_launches(
        "x", "#   deepspeed --num_gpus 4 launch/train.py --config configs/a.yaml --set b=1    # c"
    )
    assert launch == Launch("x", "configs/a.yaml", ("b=1",), 4)
