"""The log of experts: lines that a crash, an editor or a stranger has spoiled are passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kabrn_dist.analysis.log import read_expert_log
from kabrn_dist.metrics.writer import LogWriter
from kabrn_dist.utils.errors import UserError

GOOD: dict[str, Any] = {"step": 1, "experts/load": [[3, 5], [4, 4]], "experts/layers": [0, 2]}
SPOILED: list[dict[str, Any]] = [
    {"experts/load": load}
    for load in (
        [[1, 2], [3]],
        "abc",
        None,
        [],
        [[], []],
        {"a": 1},
        [[10**400] * 2] * 2,
        [[-1, 1]] * 2,
        [1, 2],
        [[1, 2]],
    )
] + [
    {"experts/layers": ["x", "y"]},
    {"experts/layers": [0]},
    {"experts/layers": None},
    {"step": "x"},
    {"step": None},
    {"step": 1e300},
    {"experts/router_entropy/layer_0": "x"},
    {"experts/copies": [[1, 2], [3]], "experts/bytes": "x", "experts/seconds": None},
    {"experts/copies": [[1, 2]]},
]


@pytest.mark.parametrize("change", SPOILED, ids=str)
def test_a_spoiled_entry_is_passed_over(change: dict[str, Any], tmp_path: Path) -> None:
    spoiled = json.dumps(GOOD | change)
    (tmp_path / "log.jsonl").write_text("".join(f"{line}\n" for line in (spoiled, json.dumps(GOOD), spoiled)))
    log = read_expert_log(tmp_path)
    assert log.steps == [1] and log.layers == [0, 2] and log.load.tolist() == [GOOD["experts/load"]]
    assert log.last(10**30).steps == [1]
    (tmp_path / "log.jsonl").write_text(f"{spoiled}\n")
    with pytest.raises(UserError, match="no entry about experts"):
        read_expert_log(tmp_path)


def test_lines_that_are_no_json_end_neither_a_report_nor_a_run(tmp_path: Path) -> None:
    lines = ["[" * 100_000, '{"step": ' + "9" * 5000 + "}", '{"step": ' + "9" * 400 + "}", "\ufffd", json.dumps(GOOD)]
    (tmp_path / "log.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert read_expert_log(tmp_path).steps == [1]
    LogWriter(tmp_path, 1).close()
    assert (tmp_path / "log.jsonl").read_text() == f"{json.dumps(GOOD)}\n"
