"""The terminal of a chat that learns: commands, answers as they are written, and how learning goes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from kabrn_dist.online_learning.course import LearningProgress, LearningResult
from kabrn_dist.online_learning.samples import Notes
from kabrn_dist.online_learning.session import LearningSession
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.terminal import escape_controls

HELP = """/correct TEXT      take the last answer back, and learn this one
/learn PATH        learn notes or conversations: a file or a folder
/undo              take the last learning back
/regenerate, /r    another answer
/reset             forget the conversation, but nothing that was learned
/system TEXT       begin anew with this text at the beginning
/temperature X     0 always takes the likeliest token
/quit              end; so does Ctrl-D. Ctrl-C ends an answer or a learning, and keeps what there is.
"""

PROMPT = "> "
BAR_CELLS, BAR_SECONDS = 24, 0.2


class ChatTerminal:
    """Reads lines, and does what they say.

    Args:
        session: The conversation and what it learns.
    """

    def __init__(self, session: LearningSession) -> None:
        self._session = session
        self._shown, self._bar_at = "", 0.0
        # A file or a program gets the text as it is; a terminal would obey some of it.
        self._escape: Callable[[str], str] = escape_controls if sys.stdout.isatty() else str
        self._commands: dict[str, Callable[[str], None]] = {
            "/correct": self._correct,
            "/learn": lambda text: self.learn(Path(_required(text, "/learn needs a file or a folder: /learn notes"))),
            "/undo": self._undo,
            "/regenerate": self._regenerate,
            "/r": self._regenerate,
            "/reset": lambda text: self._session.conversation.reset(),
            "/system": session.conversation.begin,
            "/temperature": self._set_temperature,
            "/help": lambda text: _say(HELP.rstrip()),
        }

    def greet(self, name: str) -> None:
        """Say who answers, and what was learned before."""
        steps, folder = self._session.steps, self._session.history.folder
        learned = f"with {folder}, learned in {steps} steps" if steps else f"what it learns is saved in {folder}"
        _say(f"{name}: {learned}. /help shows the commands.")

    def talk(self) -> int:
        """Read lines until the end of the input; return the exit code."""
        while True:
            try:
                line = input(PROMPT if sys.stdin.isatty() else "")
            except EOFError:
                if sys.stdin.isatty():
                    print()
                return 0
            except KeyboardInterrupt:
                print()
                continue
            except UnicodeDecodeError:
                _say("the line is not UTF-8; set the terminal to UTF-8")
                continue
            if line.strip() == "/quit":
                return 0
            try:
                self._obey(line)
            except UserError as error:
                _say(str(error))
            except KeyboardInterrupt:
                # While something was read: an answer and steps of learning end by themselves.
                _say("interrupted")

    def learn(self, path: Path) -> None:
        """Learn from notes or conversations, and tell what became of it.

        Raises:
            UserError: if there is nothing to learn from, or the disk refuses.
        """
        notes = self._session.read(path)
        _say(_describe_notes(path, notes))
        try:
            result = self._session.learn(notes, self._show_bar)
        finally:
            self._end_bar()
        if result.passes < 1:
            _say(f"time or steps were up after {result.passes:.0%} of them; --minutes and --steps are the limits")
        self._tell(result)

    def _obey(self, line: str) -> None:
        word, _, rest = line.strip().partition(" ")
        if word in self._commands:
            self._commands[word](rest.strip())
        elif word.startswith("/"):
            _say(f"{word}: no such command; /help shows those that there are")
        elif word:
            self._session.conversation.say(line)
            self._answer()

    def _answer(self) -> None:
        try:
            for piece in self._session.conversation.answer():
                print(self._escape(piece), end="", flush=True)
        except KeyboardInterrupt:
            pass
        print(flush=True)

    def _correct(self, text: str) -> None:
        try:
            result = self._session.correct(text, self._show_bar)
        finally:
            self._end_bar()
        self._tell(result)

    def _undo(self, text: str) -> None:
        left = self._session.undo()
        _say(f"taken back; {f'learned in {self._session.steps} steps' if left else 'nothing learned is left'}")

    def _regenerate(self, text: str) -> None:
        self._session.conversation.take_answer_back()
        self._answer()

    def _set_temperature(self, text: str) -> None:
        try:
            self._session.conversation.set_temperature(float(text))
        except ValueError:
            raise UserError("/temperature needs a number, such as 0.8") from None

    def _tell(self, result: LearningResult) -> None:
        held_out = " of what was left out to check" if result.held_out else ""
        lines = [f"loss{held_out}: {result.before:.3f} → {result.after:.3f} nats a token"]
        lines.append(f"{result.steps} steps, {result.seconds:.0f} s" + (", interrupted" if result.interrupted else ""))
        if result.base_before is not None and result.base_after is not None:
            lines.append(f"the base's own text: {result.base_before:.3f} → {result.base_after:.3f}")
        if not result.steps:
            lines.append("nothing better was found, and nothing is saved")
        else:
            lines.append(f"saved in {self._session.history.folder}; /undo takes it back")
        _say("\n".join(lines))

    def _show_bar(self, progress: LearningProgress) -> None:
        """Draw the bar on a terminal, a few times a second."""
        now = time.monotonic()
        if not sys.stderr.isatty() or now - self._bar_at < BAR_SECONDS:
            return
        self._bar_at = now
        cells = round(progress.share * BAR_CELLS)
        bar = "█" * cells + "░" * (BAR_CELLS - cells)
        self._shown = f"{bar} loss {progress.loss:.3f}, at most {progress.seconds_left:.0f} s more"
        print(f"\r{self._shown}\x1b[K", end="", file=sys.stderr, flush=True)

    def _end_bar(self) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._shown = ""


def _describe_notes(path: Path, notes: Notes) -> str:
    tokens = sum(sample.targets for sample in notes.samples)
    lines = [f"{path}: {tokens:,} tokens to learn in {len(notes.samples):,} pieces of {_count(notes.files, 'file')}"]
    if notes.left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in notes.left_out.most_common())
        lines.append(f"left out: {reasons}")
        lines += [f"  {example}" for example in notes.examples]
    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _required(text: str, message: str) -> str:
    if not text:
        raise UserError(message)
    return text


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
