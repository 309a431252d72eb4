"""Small bases and fine-tunings of them, as tests train them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.runs import run_sessions, write_small_config
from tests.support.shard_sets import Texts, make_set

BASE_STEPS, STEPS = 8, 6


def train_base(folder: Path, **changes: Any) -> Path:
    """Train a base on random bytes in one process, and return the folder of its run."""
    make_set(folder / "old", Texts("noise", sizes=(40, 200)), seed=5)
    settings = {"training__steps": BASE_STEPS} | changes
    config = write_small_config(folder / "base.yaml", folder / "old", folder / "base", **settings)
    run_sessions(1, [[str(config), "never", None]], folder)
    return folder / "base"


def write_finetune(path: Path, data: Path, base: Path, method: str, **changes: Any) -> Path:
    """Write the configuration of a fine-tuning; the run's folder has the name of the file."""
    section = {"base": str(base), "method": method, "rank": 4, "alpha": 32.0}
    section |= {key.removeprefix("finetune__"): changes.pop(key) for key in list(changes) if key.startswith("finetune")}
    settings: dict[str, Any] = {
        "finetune": section,
        "model": None,
        "training__steps": STEPS,
        # All weights follow a larger rate so fast that a flipped code would show between layouts.
        "optimizer__learning_rate": 3e-3 if method == "full" else 2e-2,
    }
    return write_small_config(path, data, path.with_suffix(""), **settings | changes)
