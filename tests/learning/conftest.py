"""A small run, trained for real on conversations, that learns in a chat."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.runs import run_command, run_sessions, write_small_config

RECIPE = """
out: {out}
tokenizer: {{train: 330}}
sources:
  - {{name: chats, kind: conversations, input: {input}}}
"""


@pytest.fixture(scope="session")
def base_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that has learned to answer with one of a few names."""
    folder = tmp_path_factory.mktemp("learning")
    names = ("Tom", "Eva", "Ida", "Max")
    with (folder / "chats.jsonl").open("w") as file:
        for page in range(400):
            asked = {"role": "user", "content": f"Who wrote page {page}?"}
            answer = {"role": "assistant", "content": f"{names[page % 7 % 4]} did."}
            file.write(json.dumps({"messages": [asked, answer]}) + "\n")
    (folder / "recipe.yaml").write_text(RECIPE.format(out=folder / "shards", input=folder / "chats.jsonl"))
    command = [sys.executable, "-m", "kabrn_dist", "prepare", "--recipe", str(folder / "recipe.yaml")]
    result = run_command(command)
    assert result.exit_code == 0, result.output
    config = write_small_config(
        folder / "config.yaml",
        folder / "shards",
        folder / "run",
        training__steps=100,
        model__vocab_size=336,
        model__short_conv_size=4,
        optimizer__learning_rate=1.0e-2,
        data__sequence_length=64,
    )
    run_sessions(1, [[str(config), "never", None]], folder)
    return folder / "run"
