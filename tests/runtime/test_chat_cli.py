"""The program in C: the text of `mixkabrn generate`, whole characters, stop strings, and chats whose state is exact."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from data_prep.train_tokenizer import train_tokenizer
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.runtime.build import compile_runtime
from kabrn_dist.runtime.native import NativeModel
from tests.support.text_models import train_bpe, write_scripted_model, write_text_model

ROOT = Path(__file__).parents[2]
BPE = train_tokenizer([(ROOT / "README.md").read_text(encoding="utf-8")], 300)
# After a colon it says "Héi", and goes on as the user.
BYTES = Tokenizer.of_bytes()
SCRIPT = ":Héi\nUser:".encode()
SECONDS = 120
# The script goes round and round.
ENDLESS = "generate {} --prompt User: --tokens 1000000000 --temperature 0"


def run(*arguments: object, stdin: bytes = b"", expect: int = 0) -> tuple[bytes, str]:
    command = [str(compile_runtime("program")), *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=SECONDS, check=False)
    errors = done.stderr.decode(errors="replace")
    assert done.returncode == expect, errors
    return done.stdout, errors


def chat(model: Path, *lines: str, options: tuple[object, ...] = ()) -> tuple[list[str], str]:
    """The answers to some lines, and what was said besides."""
    out, errors = run("chat", model, *options, stdin="".join(f"{line}\n" for line in lines).encode())
    return out.decode().splitlines(), errors


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scripted") / "m.mkb"
    write_scripted_model(path, BYTES, SCRIPT)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("random") / "m.mkb"
    write_text_model(path, BPE)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bpe", "bytes", "hybrid"])
def test_the_likeliest_text_is_that_of_python(kind: str, tmp_path: Path) -> None:
    tokenizer = BYTES if kind == "bytes" else BPE
    overrides = ["model.layers=RAR"] if kind == "hybrid" else []
    random_model = write_text_model(tmp_path / "m.mkb", tokenizer, *overrides)
    for prompt in ("", "def f(x):\n", "Ελληνικά 漢字 👩‍💻 <|document|>"):
        expected = "".join(random_model.generate(prompt, tokenizer, tokens=60, temperature=0))
        out, errors = run("generate", tmp_path / "m.mkb", "--prompt", prompt, "--tokens", 60, "--temperature=0")
        assert out.decode() == prompt + expected and "tokens/s]" in errors
        out, errors = run(
            *("generate", tmp_path / "m.mkb", "-", "--tokens", 60, "--temperature", 0, "--quiet"),
            stdin=prompt.encode(),
        )
        assert out.decode() == expected and errors == ""


@pytest.mark.slow
def test_draws_depend_on_the_seed_alone(model: Path) -> None:
    texts = [run("generate", model, "--seed", seed, "--quiet")[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    settings = "--top-k 0 --top-p 0.9 --min-p 0.01 --repetition-penalty 1.2 --repetition-window 32 --threads 2"
    assert run("generate", model, *settings.split(), "--verify")[0]


@pytest.mark.slow
def test_a_saved_text_goes_on_with_the_same_bits(model: Path, tmp_path: Path) -> None:
    whole, _ = run("generate", model, "--prompt", "One", "--tokens", 80, "--seed", 3, "--quiet")
    part, _ = run(
        *("generate", model, "--prompt", "One", "--tokens", 30, "--seed", 3, "--quiet", "--state-out", tmp_path / "s")
    )
    # Characters that are cut between the parts come out as U+FFFD; compare the ids of what is not cut.
    rest, _ = run("generate", model, "--tokens", 50, "--quiet", "--state-in", tmp_path / "s")
    common = part.decode().rstrip("\ufffd")
    assert whole.decode().startswith(common) and whole.decode().endswith(rest.decode().lstrip("\ufffd")[-60:])
    other, _ = run("generate", model, "--tokens", 50, "--quiet", "--state-in", tmp_path / "s", "--seed", 4)
    assert other != rest


@pytest.mark.slow
def test_stop_strings_are_never_shown(scripted: Path) -> None:
    base = ["generate", scripted, "--prompt", "User:", "--temperature", 0, "--quiet"]
    cycle = "Héi\nUser:" * 60
    assert run(*base, "--tokens", 101)[0].decode() == cycle.encode()[:101].decode()
    for stop, expected in (("\nUser:", "Héi"), ("r:H", "Héi\nUse"), ("éi\nU", "H"), ("H", ""), ("é", "H")):
        assert run(*base, "--stop", stop)[0].decode() == expected
    # What begins like a stop string, but is none, is shown; so is what the end cuts off.
    assert run(*base, "--tokens", 9, "--stop", "Use!", "--stop", "User:X")[0].decode() == "Héi\nUser"
    assert run(*base, "--stop", "ser:", "--stop", "User")[0].decode() == "Héi\n"
    # A part of a character.
    assert run(*base, "--tokens", 2)[0].decode() == "H\ufffd"


def compare_states(path: Path, state: Path, text: str | list[int]) -> float:
    """How far the logits after a saved state and one more token are from those after a document of this text."""
    with NativeModel(path) as native, native.context() as saved, native.context() as fresh:
        saved.load_state(state)
        fresh.decode([native.info.document_token, *(text.encode() if isinstance(text, str) else text)])
        assert fresh.position == saved.position
        ours, theirs = saved.decode([65]), fresh.decode([65])
        assert ours is not None and theirs is not None
        return float(np.abs(ours - theirs).max())


@pytest.mark.slow
def test_the_state_of_a_chat_is_its_text(scripted: Path, tmp_path: Path) -> None:
    greedy = ("--temperature", 0)
    answers, errors = chat(scripted, "one", "two", f"/save {tmp_path / 's'}", options=greedy)
    assert answers == ["Héi", "Héi"] and "ChatML" not in errors
    text = "User: one\nAssistant:Héi\nUser: two\nAssistant:Héi\nUser:"
    assert compare_states(scripted, tmp_path / "s", text) < 1e-4
    # A turn reads its own text alone: " two\nAssistant:".
    assert "[15 tokens read at " in errors.splitlines()[2]
    # A limit inside the answer, another stop string, and a prefix of another kind.
    for options, answer in ((("--tokens", 2), "H\ufffd"), (("--stop", "i"), "Hé")):
        answers, _ = chat(scripted, "one", f"/save {tmp_path / 's'}", options=(*greedy, *options))
        assert answers == [answer]
    assert compare_states(scripted, tmp_path / "s", "User: one\nAssistant:Hé\nUser:") < 1e-4
    chat(scripted, "one", f"/save {tmp_path / 's'}", options=(*greedy, "--system", "Be brief."))
    assert compare_states(scripted, tmp_path / "s", "Be brief.\n\nUser: one\nAssistant:Héi\nUser:") < 1e-4


@pytest.mark.slow
def test_a_document_that_ends_ends_the_answer(tmp_path: Path) -> None:
    write_scripted_model(tmp_path / "m.mkb", BYTES, [*b":Hi", BYTES.document_token])
    answers, _ = chat(tmp_path / "m.mkb", "one", f"/save {tmp_path / 's'}", options=("--temperature", 0))
    assert answers == ["Hi"]
    assert compare_states(tmp_path / "m.mkb", tmp_path / "s", "User: one\nAssistant:Hi\nUser:") < 1e-4


@pytest.mark.slow
def test_chatml_is_used_when_the_template_has_it(tmp_path: Path) -> None:
    bpe = train_bpe("gpt2", [(ROOT / "README.md").read_text(encoding="utf-8")], 270)
    bpe.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = Tokenizer(bpe.to_str().encode())
    start, end = tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
    script = [*tokenizer.encode("\nHey"), end]
    template = "{% for m in messages %}<|im_start|>{{ m.role }}"
    write_scripted_model(tmp_path / "m.mkb", tokenizer, script, template=template)
    lines = ("one <|im_end|>", f"/save {tmp_path / 's'}")
    answers, errors = chat(tmp_path / "m.mkb", *lines, options=("--temperature", 0, "--system", "Be."))
    assert answers == ["Hey"] and "ChatML" in errors
    # What the user says holds no special token, whatever it spells.
    parts = [start, "system\n", "Be.", end, "\n", start, "user\n", "one <|im_end|>", end, "\n", start, "assistant\n"]
    parts += ["Hey", end, "\n", start, "user\n"]
    ids = [id for part in parts for id in ([part] if isinstance(part, int) else tokenizer.encode(part))]
    assert compare_states(tmp_path / "m.mkb", tmp_path / "s", ids) < 1e-4


@pytest.mark.slow
def test_turns_are_taken_back_edited_and_answered_again(model: Path, tmp_path: Path) -> None:
    options = ("--tokens", 12, "--seed", 5)
    plain, _ = chat(model, "one", "two", options=options)
    # Nothing remains of a turn that was taken back but used random numbers.
    saved = f"/save {tmp_path / 'a'}"
    again = f"/save {tmp_path / 'b'}"
    greedy = ("--tokens", 12, "--temperature", 0)
    chat(model, "one", "two", saved, options=greedy)
    for lines in (
        ("one", "wrong", "/undo", "two"),
        ("one", "wrong", "/edit two"),
        ("one", "two", "/regenerate"),
        ("wrong", "/reset", "one", "two", "/r", "/r"),
        ("one", "two", "three", "/undo", "/r"),
    ):
        chat(model, *lines, again, options=greedy)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes(), lines
    answers, errors = chat(model, "one", "/r", options=options)
    assert len(set(answers)) > 1 and answers != plain
    # Another answer reads one token, the last before it.
    assert errors.splitlines()[2].startswith("[1 token read at ")
    _, errors = chat(model, "/undo", "/r", "/edit x", "/nothing", "/temperature x", "/load absent", options=options)
    for message in ("no turn to take back", "no turn to edit", "no such command", "needs a number", "No such file"):
        assert message in errors


@pytest.mark.slow
def test_a_saved_chat_goes_on_with_the_same_bits(model: Path, tmp_path: Path) -> None:
    options = ("--tokens", 20, "--seed", 6, "--quiet")
    whole, _ = chat(model, "one", f"/save {tmp_path / 's'}", "two", "three", options=options)
    rest, _ = chat(model, f"/load {tmp_path / 's'}", "two", "three", options=("--tokens", 20, "--quiet"))
    assert "\n".join(whole).endswith("\n".join(rest)) and rest
    rest, _ = chat(model, "two", "three", options=("--tokens", 20, "--quiet", "--state-in", tmp_path / "s"))
    assert "\n".join(whole).endswith("\n".join(rest)) and rest


@pytest.mark.slow
def test_a_turn_for_which_caches_have_no_room_is_taken_back(tmp_path: Path) -> None:
    write_text_model(tmp_path / "m.mkb", BYTES, "model.layers=RAR")
    options = ("--temperature", 0, "--tokens", 10, "--context", 120)
    plain, _ = chat(tmp_path / "m.mkb", "one", "two", options=options)
    # Too long to be read, and too long to be answered.
    for text in ("x" * 200, "x" * 75):
        answers, errors = chat(tmp_path / "m.mkb", "one", text, "two", options=options)
        assert "room for 120 tokens in its attention layers; use a larger --context" in errors
        assert "\n".join(answers).endswith("\n".join(plain)[-8:]) and "\n".join(plain[:1]) in "\n".join(answers)
    out, _ = run("generate", tmp_path / "m.mkb", "--tokens", 300, "--quiet")
    assert out
    _, errors = run("generate", tmp_path / "m.mkb", "--prompt", "x" * 30, "--context", 20, expect=1)
    assert "use a larger --context" in errors


@pytest.mark.slow
def test_many_turns_are_bounded(scripted: Path) -> None:
    answers, errors = chat(scripted, *["x"] * 40, *["/undo"] * 33, options=("--temperature", 0))
    assert answers == ["Héi"] * 40 and errors.count("no turn to take back") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate"], 2, "usage: mixkabrn generate MODEL"),
        (["generate", "MODEL", "--bad"], 2, "--bad is no option here"),
        (["generate", "MODEL", "--tokens", "0"], 2, "--tokens 0: use a whole number from 1"),
        (["generate", "MODEL", "--tokens", "-3"], 2, "--tokens -3: use a whole number"),
        (["generate", "MODEL", "--seed", "x"], 2, "--seed x: use a whole number"),
        (["generate", "MODEL", "--temperature", "nan"], 2, "temperature"),
        (["generate", "MODEL", "--top-p", "2"], 2, "top_p 2: use more than 0"),
        (["generate", "MODEL", "--stop", ""], 2, "--stop: use a text"),
        (["generate", "MODEL", "--stop", b"\xff"], 2, "--stop: not UTF-8"),
        (["generate", "MODEL", "--prompt"], 2, "--prompt needs a value"),
        (["generate", "MODEL", "-", "--prompt", "x"], 2, "give one of them"),
        (["generate", "MODEL", "MODEL"], 2, "one model file is enough"),
        (["generate", "absent.mkb"], 1, "absent.mkb: cannot be opened: No such file"),
        (["generate", "MODEL", "--prompt-file", "absent.txt"], 1, "absent.txt: cannot be opened: No such file"),
        (["generate", "MODEL", "--prompt-file", "/"], 1, "/: cannot be read"),
        (["generate", "MODEL", "--state-in", "absent.mks"], 1, "absent.mks: cannot be opened"),
        (["generate", "MODEL", "--state-in", "MODEL"], 1, "is not a saved state"),
        (["generate", "MODEL", "--state-out", "/absent/s"], 1, "/absent/s: cannot be written: No such file"),
        (["generate", "MODEL", "--state-out", "MODEL"], 1, "is there and is not a saved state"),
        (["generate", "MODEL", "--state-out", "/dev/null"], 1, "is not a file that can be read"),
        (["chat", "MODEL", "--user-prefix", ""], 2, "--user-prefix"),
        (["tokenize", "MODEL", "--tokens", "3"], 2, "--tokens is no option here"),
    ],
)
def test_mistakes_are_answered_in_a_line(arguments: list[str | bytes], code: int, message: str, model: Path) -> None:
    program = str(compile_runtime("program"))
    command = [program, *(str(model) if argument == "MODEL" else argument for argument in arguments)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, check=False)
    assert done.returncode == code and message.encode() in done.stderr, done.stderr
    if code == 1:
        assert done.stderr.strip().count(b"\n") <= 2


@pytest.mark.slow
def test_any_prompt_is_read(model: Path, tmp_path: Path) -> None:
    few = ("--tokens", 3, "--quiet")
    for content in (b"", b"\xff\xfe\x00\xc3", b"\x00" * 10):
        (tmp_path / "p").write_bytes(content)
        assert run("generate", model, "--prompt-file", tmp_path / "p", *few)[0]
        out, _ = run("tokenize", model, "--prompt-file", tmp_path / "p")
        assert BPE.decode_bytes([int(id) for id in out.split()]) == content
    out, _ = run("tokenize", model, "-", stdin=b"word " * 2_000_000)
    assert len(out.split()) == len(BPE.encode("word " * 1000)) // 1000 * 2_000_000 or len(out.split()) > 1_000_000


@pytest.mark.slow
def test_an_output_that_is_closed_or_full_is_told(scripted: Path) -> None:
    command = [str(compile_runtime("program")), *ENDLESS.format(scripted).split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(5)
        process.stdout.close()
        assert b"cannot be written: Broken pipe" in process.stderr.read()
    assert process.returncode == 1
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=SECONDS, check=False)
    assert done.returncode == 1 and b"No space left" in done.stderr


@pytest.mark.slow
def test_ctrl_c_ends_generate(scripted: Path) -> None:
    command = [str(compile_runtime("program")), *ENDLESS.format(scripted).split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(100)
        # The pipe is full by now, and the program waits for its reader.
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 130 and b"interrupted" in errors and b"tokens/s]" in errors


@pytest.mark.slow
def test_a_chat_goes_on_from_a_generated_text(scripted: Path, tmp_path: Path) -> None:
    state, end = tmp_path / "s.mks", tmp_path / "t.mks"
    run("generate", scripted, "--prompt", "User:", "--tokens", 2, "--temperature", 0, "--state-out", state)
    (tmp_path / "said").write_bytes(b"one\r\n")
    answers, _ = chat(
        scripted, f"/file {tmp_path / 'said'}\r", f"/save {end}\r", options=("--temperature", 0, "--state-in", state)
    )
    assert answers == ["Héi"]
    text = list(b"User:H\xc3\nUser: one\nAssistant:" + "Héi\nUser:".encode())
    assert compare_states(scripted, end, text) < 1e-4


@pytest.mark.slow
def test_commands_are_listed_and_typos_named() -> None:
    out, _ = run("--help")
    assert all(name in out for name in (b"generate", b"chat", b"tokenize", b"bench", b"selftest"))
    assert run("--version")[0].startswith(b"mixkabrn ")
    assert "did you mean generate?" in run("genrate", expect=2)[1]
    assert "usage: mixkabrn COMMAND" in run(expect=2)[1]


@pytest.mark.slow
def test_a_model_file_that_is_cut_while_in_use_is_told(tmp_path: Path) -> None:
    write_scripted_model(tmp_path / "m.mkb", BYTES, SCRIPT)
    command = [str(compile_runtime("program")), *ENDLESS.format(tmp_path / "m.mkb").split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(100)
        os.truncate(tmp_path / "m.mkb", 0)
        _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 1 and b"changed or cut while in use" in errors


@pytest.mark.slow
def test_blank_lines_before_an_answer_and_unused_templates(tmp_path: Path) -> None:
    script = [*b":\n\t Hi", BYTES.document_token]
    write_scripted_model(tmp_path / "m.mkb", BYTES, script, template="{{ messages }}")
    answers, errors = chat(tmp_path / "m.mkb", "one", options=("--temperature", 0))
    assert answers == ["Hi"] and "`mixkabrn serve` uses it" in errors


@pytest.mark.slow
def test_a_state_with_an_absurd_position_is_refused_first(tmp_path: Path) -> None:
    write_text_model(tmp_path / "m.mkb", BYTES, "model.layers=RAR")
    state = tmp_path / "s.mks"
    run("generate", tmp_path / "m.mkb", "--prompt", "One", "--tokens", 3, "--state-out", state)
    content = bytearray(state.read_bytes())
    content[88:96] = (10**8).to_bytes(8, "little")
    state.write_bytes(content)
    _, errors = run("generate", tmp_path / "m.mkb", "--state-in", state, expect=1)
    assert "100000000 tokens do not fit" in errors
    state.write_bytes(content[:5000])
    _, errors = run("generate", tmp_path / "m.mkb", "--state-in", state, expect=1)
    assert "bytes expected, 5000 found" in errors


class Terminal:
    """A chat on a pseudo-terminal."""

    def __init__(self, *arguments: object) -> None:
        self.output = ""
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.execv(str(compile_runtime("program")), ["mixkabrn", *map(str, arguments)])

    def wait_for(self, pattern: str) -> str:
        """Read until a pattern; return what came up to its end."""
        end = time.monotonic() + SECONDS
        while not (found := re.search(pattern, self.output)):
            assert time.monotonic() < end, self.output
            if select.select([self.file], [], [], 1)[0]:
                self.output += os.read(self.file, 65536).decode(errors="replace")
        text, self.output = self.output[: found.end()], self.output[found.end() :]
        return text

    def send(self, text: str) -> None:
        os.write(self.file, text.encode())

    def close(self) -> int:
        """Read to the end, and return the exit code."""
        end = time.monotonic() + SECONDS
        with suppress(OSError):
            while time.monotonic() < end and os.read(self.file, 65536):
                pass
        if time.monotonic() >= end:
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        os.close(self.file)
        return os.waitstatus_to_exitcode(status)


@pytest.mark.slow
def test_a_chat_on_a_terminal_obeys_the_keys(scripted: Path) -> None:
    compile_runtime("program")
    terminal = Terminal("chat", scripted, "--temperature", 0)
    assert "/help" in terminal.wait_for("> ")
    terminal.send("one\n")
    assert "Héi\r\n" in terminal.wait_for("> ")
    terminal.send("two\\\n")
    terminal.send("three\n")
    assert "Héi\r\n" in terminal.wait_for("> ")
    terminal.send("\x04")
    assert terminal.close() == 0
    prefixes = ("--user-prefix", "Q:", "--assistant-prefix", "A:")
    terminal = Terminal("chat", scripted, "--tokens", 1000000000, "--temperature", 0, *prefixes)
    terminal.wait_for("> ")
    terminal.send("endless\n")
    terminal.wait_for(r"endless\r\n(?s:.){200}")
    terminal.send("\x03")
    # The answer ends, the chat goes on.
    terminal.wait_for(r"tokens/s\]\r\n> ")
    terminal.send("/undo\n")
    assert "the last turn is taken back" in terminal.wait_for("> ")
    # At the prompt it drops the line alone.
    terminal.send("\x03")
    assert "/quit" not in terminal.wait_for("\r\n> ")
    terminal.send("\x03")
    assert "Ctrl-D or /quit ends" in terminal.wait_for("\r\n> ")
    terminal.send("\x04")
    assert terminal.close() == 0


@pytest.mark.slow
def test_a_terminal_is_told_nothing_that_it_would_obey(tmp_path: Path) -> None:
    write_scripted_model(tmp_path / "m.mkb", BYTES, [*b":a\x1b[2J\x07\tb\xc2\x9bc", BYTES.document_token])
    out, _ = run("generate", tmp_path / "m.mkb", "--prompt", ":", "--temperature", 0, "--quiet")
    assert out == b"a\x1b[2J\x07\tb\xc2\x9bc"
    terminal = Terminal("generate", tmp_path / "m.mkb", "--prompt", ":", "--temperature", 0)
    assert ":a·[2J·" in terminal.wait_for(r"b·c")
    assert terminal.close() == 0
