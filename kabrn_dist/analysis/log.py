"""Reader of the entries about experts in log.jsonl.

Shapes: S logged steps, L mixture layers, E routed experts, W ranks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kabrn_dist.inference.folder import check_run_folder
from kabrn_dist.metrics.writer import LOG_BYTES_LIMIT
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safe_open import read_plain

COLUMNS = ("router_entropy", "bias_range", "dropped")


class ExpertLog(NamedTuple):
    """Logged metrics of the mixtures of experts, oldest step first.

    Attributes:
        layers: Indices of the L layers.
        steps: The S steps.
        load: [S,L,E] float64, tokens routed to each expert.
        entropy: [S,L] float64, mean entropy of the router in nats per token.
        bias_range: [S,L] float64, maximum − minimum of the router's bias.
        dropped: [S,L] float64, fraction of the routed tokens that were dropped.
        traffic: S times [W,L,3] for each rank: tokens received, bytes sent, seconds; None if not logged. W may differ
            between sessions.
    """

    layers: list[int]
    steps: list[int]
    load: Tensor
    entropy: Tensor
    bias_range: Tensor
    dropped: Tensor
    traffic: list[Tensor | None]

    def last(self, steps: int) -> ExpertLog:
        """Return the log of the last `steps` logged steps."""
        tail = slice(-min(steps, len(self.steps)), None)
        load, entropy, bias_range, dropped = (
            part[tail] for part in (self.load, self.entropy, self.bias_range, self.dropped)
        )
        return ExpertLog(self.layers, self.steps[tail], load, entropy, bias_range, dropped, self.traffic[tail])


def read_expert_log(folder: Path) -> ExpertLog:
    """Return the metrics of experts in `folder`/log.jsonl.

    Raises:
        UserError: if the folder is not that of a run, has no log, or the log has no entries about experts.
    """
    check_run_folder(folder, "log.jsonl")
    path = folder / "log.jsonl"
    text = read_plain(path, LOG_BYTES_LIMIT, follow_links=True).decode(errors="replace")
    # What a crash or an editor has spoiled is passed over, as other lines tell the same.
    entries = [entry for entry in map(_parse, text.splitlines()) if "experts/load" in entry and _is_whole(entry)]
    if not entries:
        raise UserError(
            f"{path}: no entry about experts: the model has no mixture layer, no step was logged, or an older "
            "version wrote the log; train with a mixture and training.log_interval below training.steps"
        )
    # A folder may have been reused for another model: entries of the newest one's shape belong to one run.
    shape = torch.tensor(entries[-1]["experts/load"]).shape
    entries = [entry for entry in entries if torch.tensor(entry["experts/load"]).shape == shape]
    layers = [int(layer) for layer in entries[-1]["experts/layers"]]
    entropy, bias_range, dropped = (_column(entries, name, layers) for name in COLUMNS)
    load = torch.tensor([entry["experts/load"] for entry in entries], dtype=torch.float64)
    steps = [int(entry["step"]) for entry in entries]
    return ExpertLog(layers, steps, load, entropy, bias_range, dropped, [_traffic(entry) for entry in entries])


def _parse(line: str) -> dict[str, Any]:
    """The object in a line; empty for a line that a crash truncated."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}


def _is_whole(entry: dict[str, Any]) -> bool:
    """Return whether an entry's loads are numbers of tokens, [L,E], with the L layers and the step that they are of."""
    layers = entry.get("experts/layers")
    try:
        load = torch.tensor(entry["experts/load"], dtype=torch.float64)
        columns = [float(entry.get(f"experts/{name}/layer_{layer}", 0.0)) for name in COLUMNS for layer in layers or ()]
        _traffic(entry)
    except (ValueError, TypeError, RuntimeError, KeyError, OverflowError):
        return False
    is_shaped = load.dim() == 2 and load.numel() > 0 and isinstance(layers, list) and len(layers) == len(load)
    are_numbers = bool((load.isfinite() & (load >= 0)).all()) and all(map(math.isfinite, columns))
    whole = (entry.get("step"), *layers) if isinstance(layers, list) else ()
    return is_shaped and are_numbers and all(type(number) is int and 0 <= number < 2**50 for number in whole)


def _column(entries: list[dict[str, Any]], name: str, layers: list[int]) -> Tensor:
    """[S,L] values of a scalar; a fraction that was not logged is 0, as nothing was dropped."""
    rows = [[float(entry.get(f"experts/{name}/layer_{layer}", 0.0)) for layer in layers] for entry in entries]
    return torch.tensor(rows, dtype=torch.float64)


def _traffic(entry: Mapping[str, Any]) -> Tensor | None:
    if "experts/copies" not in entry:
        return None
    parts = [torch.tensor(entry[f"experts/{name}"], dtype=torch.float64) for name in ("copies", "bytes", "seconds")]
    return torch.stack(parts, -1)
