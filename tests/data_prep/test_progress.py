"""What the progress bar shows while workers write down what they have done."""

from __future__ import annotations

from pathlib import Path

from data_prep.progress import StageProgress


def test_workers_add_up_and_a_note_that_is_being_written_sets_nothing_back(tmp_path: Path) -> None:
    first, second = (
        StageProgress(tmp_path, 0, "read", 100, already_completed=10),
        StageProgress(tmp_path, 1, "read", 100),
    )
    first.advance(2, 30, 20)
    second.advance(1, 5, 4)
    for tally in (first, second):
        tally.publish()
    assert first._sum() == (3, 35, 34)
    (tmp_path / "read 1").write_text("")
    (tmp_path / "read 0").write_text("3 4")
    assert first._sum() == (3, 35, 34)
    second.publish()
    assert first._sum() == (3, 35, 34)
