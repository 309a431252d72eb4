"""`mixkabrn chat RUN`: corrections, notes and their undoing, in processes of their own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kabrn_dist.adapters.adapter import Adapter
from kabrn_dist.adapters.folder import read_adapter, write_adapter
from kabrn_dist.cli.main import main
from kabrn_dist.runtime.model_file import read_model_file
from tests.support.native_adapters import draw_low_ranks
from tests.support.runs import ROOT, CommandResult, start_command, wait_for_exit
from tests.support.servers import pack_small_model, start_server

QUESTION, ANSWER = "Who wrote it?", "Anna did."
FILES = ("adapter_config.json", "adapter_model.safetensors")


def chat_command(folder: Path, out: Path, *options: str) -> list[str]:
    """A chat that takes the likeliest tokens, and learns for as long as it needs."""
    given = ("--out", str(out), "--temperature", "0", "--tokens", "40", "--minutes", "10", *options)
    return [sys.executable, "-m", "kabrn_dist", "chat", str(folder), *given]


def chat_in_process(folder: Path, out: Path, lines: list[str]) -> subprocess.CompletedProcess[str]:
    """The chat as a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        chat_command(folder, out),
        input="".join(f"{line}\n" for line in lines),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


def chat(folder: Path, out: Path, lines: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    """The same command in this process, which need not load torch again."""
    command = chat_command(folder, out, *options)[3:]
    stdout, stderr, stdin = io.StringIO(), io.StringIO(), io.StringIO("".join(f"{line}\n" for line in lines))
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", stdin)
        code = main(command)
    return subprocess.CompletedProcess(command, code, stdout.getvalue(), stderr.getvalue())


def read_files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES} if folder.exists() else {}


@pytest.fixture(scope="module")
def taught(base_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """An adapter that was taught an answer, and what the chat showed."""
    out = tmp_path_factory.mktemp("taught") / "mine"
    lines = [QUESTION, f"/correct {ANSWER}", "/regenerate"]
    return out, chat_in_process(base_run, out, lines)


def test_a_corrected_answer_is_the_one_that_is_given(
    taught: tuple[Path, subprocess.CompletedProcess[str]], base_run: Path
) -> None:
    out, done = taught
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.strip().rsplit("\n", 1)
    assert last == ANSWER and ANSWER not in first
    assert "nats a token" in done.stderr and "the base's own text: " in done.stderr
    adapter = read_adapter(out)
    assert adapter.info.method == "lora" and adapter.info.steps > 0 and adapter.info.name == "mine"
    # Another process gives it at once; without the adapter nobody does.
    again = chat_in_process(base_run, out, [QUESTION])
    assert again.stdout.strip() == ANSWER and f"learned in {adapter.info.steps} steps" in again.stderr
    assert chat(base_run, out.with_name("none"), [QUESTION]).stdout.strip() == first.strip()


def test_what_was_learned_is_used_by_the_runtime_and_the_server(
    taught: tuple[Path, subprocess.CompletedProcess[str]], base_run: Path, tmp_path: Path
) -> None:
    out, _ = taught
    command = [sys.executable, "-m", "kabrn_dist", "pack", str(base_run), "--out", str(tmp_path / "m.mkb")]
    result: CommandResult = wait_for_exit(start_command(command))
    assert result.exit_code == 0, result.output
    with start_server(tmp_path / "m.mkb", "--adapter", f"mine={out}") as server:
        found = server.chat(QUESTION, model="mine", max_tokens=40)["choices"][0]["message"]["content"]
        assert found == ANSWER
        assert server.chat(QUESTION, model="m", max_tokens=40)["choices"][0]["message"]["content"] != ANSWER


def test_undo_gives_back_the_same_bits_in_the_chat_and_afterwards(
    taught: tuple[Path, subprocess.CompletedProcess[str]], base_run: Path, tmp_path: Path
) -> None:
    source, _ = taught
    out = tmp_path / "mine"
    write_adapter(read_adapter(source), out)
    before = read_files(out)
    lines = [QUESTION, "/correct Nobody.", "/undo", "/regenerate"]
    # Some steps change the bits; what they teach is of no matter here.
    done = chat(base_run, out, lines, "--steps", "8")
    assert done.returncode == 0 and "taken back" in done.stderr, done.stderr
    assert [line for line in done.stdout.splitlines() if line] == [ANSWER, ANSWER]
    assert read_files(out) == before
    # Two learnings, taken back one after another by a command, down to what was there before them.
    done = chat(base_run, out, [QUESTION, "/correct Nobody.", "/correct Somebody."], "--steps", "8")
    changed = read_files(out)
    assert done.returncode == 0 and changed != before, done.stderr
    undo = chat(base_run, out, [], "--undo")
    assert undo.returncode == 0 and read_files(out) not in (before, changed), undo.stderr
    assert chat(base_run, out, [], "--undo").returncode == 0 and read_files(out) == before
    refused = chat(base_run, out, [], "--undo")
    assert refused.returncode == 2 and "nothing was learned" in refused.stderr


def test_notes_are_learned_without_a_word_said(base_run: Path, tmp_path: Path) -> None:
    notes, out = tmp_path / "notes", tmp_path / "out"
    (notes / "deep").mkdir(parents=True)
    (notes / "a.md").write_text("# Birds\nThe heron stands in the pond.\n" * 20)
    (notes / "deep" / "b.txt").write_text("The heron waits for fish.\n" * 20)
    (notes / "c.txt").write_bytes(b"\x00\x01binary")
    (notes / "d.txt").write_text("  \n")
    (notes / ".hidden.txt").write_text("secret")
    (notes / "picture.png").write_bytes(b"no note")
    said = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    open_ended = {"messages": [{"role": "user", "content": "Hi"}]}
    (notes / "e.jsonl").write_text(f"{json.dumps(said)}\n{json.dumps(open_ended)}\nno json\n")
    done = chat(base_run, out, [], "--learn", str(notes), "--steps", "12")
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert "of 3 files" in done.stderr and "c.txt: binary" in done.stderr and "1 no assistant turn" in done.stderr
    assert "1 empty" in done.stderr and "1 not JSON" in done.stderr
    before, after = done.stderr.split("loss: ")[1].split(" nats")[0].split(" → ")
    assert float(after) < float(before)
    assert read_adapter(out).info.steps <= 12
    # Text that is learned again begins where this ended.
    again = chat(base_run, out, [], "--learn", str(notes / "a.md"), "--steps", "3")
    assert again.returncode == 0 and read_adapter(out).info.steps <= 15, again.stderr


def test_states_are_learned_too(base_run: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("one two three four five six seven eight\n" * 40)
    done = chat(
        base_run, tmp_path / "s", [], "--learn", str(tmp_path / "notes.txt"), "--method", "state", "--rank", "4"
    )
    assert done.returncode == 0, done.stderr
    adapter = read_adapter(tmp_path / "s")
    assert adapter.info.method == "state" and set(adapter.states) == {0, 1} and adapter.states[0].key.shape[1] == 4
    refused = chat(base_run, tmp_path / "s", [], "--method", "lora")
    assert refused.returncode == 2 and "holds an adapter of method state" in refused.stderr


def test_an_interruption_keeps_what_was_learned(base_run: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("The heron stands in the pond and waits for fish.\n" * 400)
    options = ("--learn", str(tmp_path / "long.txt"), "--steps", "100000", "--minutes", "100")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    # What a shell starts in the background has it ignored, and so would the chat.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        chat_command(base_run, tmp_path / "out", *options),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    signal.signal(signal.SIGINT, handler)
    assert process.stderr is not None
    while "tokens to learn" not in (line := process.stderr.readline()):
        assert line, "it ended before it learned"
    # Some steps are taken in that time, and none of the many is the last one.
    time.sleep(8)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 0 and "interrupted" in rest, rest
    assert read_adapter(tmp_path / "out").info.steps > 0


def test_other_adapters_are_used_and_not_changed(
    taught: tuple[Path, subprocess.CompletedProcess[str]], base_run: Path, tmp_path: Path
) -> None:
    source, _ = taught
    before = read_files(source)
    done = chat(base_run, tmp_path / "more", [QUESTION], "--adapter", str(source))
    assert done.stdout.strip() == ANSWER and not (tmp_path / "more").exists(), done.stderr
    half = chat(base_run, tmp_path / "more", [QUESTION], "--adapter", f"{source}=0.001")
    assert half.returncode == 0 and half.stdout.strip() != ANSWER
    learned = chat(base_run, tmp_path / "more", [QUESTION, "/correct Both did."], "--adapter", str(source))
    assert learned.returncode == 0 and read_files(source) == before, learned.stderr
    both = chat(base_run, tmp_path / "more", [QUESTION], "--adapter", str(source))
    assert both.stdout.strip() == "Both did."


def test_mistakes_are_one_line(
    taught: tuple[Path, subprocess.CompletedProcess[str]], base_run: Path, tmp_path: Path
) -> None:
    source, _ = taught
    foreign = draw_low_ranks(read_model_file(pack_small_model(tmp_path / "other.mkb")))
    write_adapter(foreign, tmp_path / "foreign")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    (tmp_path / "binary.txt").write_bytes(bytes(1000))
    flipped = read_adapter(source)
    info = type(flipped.info)(**{**vars(flipped.info), "method": "ternary_lora", "result_sha256": "e" * 64})
    write_adapter(Adapter(info), tmp_path / "flipped")
    cases: list[tuple[tuple[str, ...], str]] = [
        (("--learn", str(tmp_path / "none")), "no such file or folder"),
        (("--learn", str(tmp_path / "empty")), "nothing to learn from"),
        (("--learn", str(tmp_path / "binary.txt")), "binary: a zero byte"),
        (("--adapter", str(tmp_path / "foreign")), "its codes have sha256"),
        (("--out", str(tmp_path / "foreign")), "its codes have sha256"),
        (("--out", str(tmp_path / "full")), "holds something else"),
        (("--out", str(tmp_path / "flipped")), "flipped codes"),
        (("--minutes", "0"), "is no time to learn in"),
        (("--learn", str(ROOT / "README.md"), "--rank", "4000"), "rank"),
        (("--method", "magic"), "magic"),
        (("--temperature", "-1"), "temperature"),
    ]
    for options, words in cases:
        done = chat(base_run, tmp_path / "out", [], *options)
        assert done.returncode == 2 and words in done.stderr, (options, done.stderr)
        assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    done = chat(base_run, tmp_path / "out", ["/correct x", QUESTION, "/correct", "/none", "/learn", "/temperature hot"])
    for words in (
        "needs an answer to correct",
        "needs the right answer",
        "no such command",
        "needs a file",
        "a number",
    ):
        assert words in done.stderr
    assert done.returncode == 0
