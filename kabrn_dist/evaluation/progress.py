"""How far an evaluation has come: bars on a terminal; in a pipe or a file, lines, at most one a minute for a task."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from kabrn_dist.evaluation.requests import TextRequest
from kabrn_dist.evaluation.run import EvaluationProgress
from kabrn_dist.evaluation.task_data import TaskData

LINE_SECONDS = 60.0
_BAR_WIDTH = 20


@dataclass
class _State:
    """What is known of a task.

    Attributes:
        data: The task.
        bar: On a terminal.
        news: The latest; None before the model is loaded.
        begun: When its turn came, by the monotonic clock; None before.
    """

    data: TaskData
    bar: TaskID
    news: EvaluationProgress | None = None
    begun: float | None = None


class ProgressDisplay:
    """Shows an evaluation from the loading of its model on, also while no example has its result.

    Args:
        console: To print on.
        model: Name of what is loaded first.
        tasks: The tasks.
    """

    def __init__(self, console: Console, model: str, tasks: Iterable[TaskData]) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(_BAR_WIDTH),
            MofNCompleteColumn(),
            TextColumn("{task.fields[tokens]:,} tokens"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._console, self._model = console, model
        self._bars = Progress(*columns, console=console, disable=not console.is_terminal)
        self._loading = self._bars.add_task(f"loading {model}", total=None, tokens=0)
        self._states = [
            _State(
                data,
                self._bars.add_task(data.task.name, total=len(data.examples), start=False, visible=False, tokens=0),
            )
            for data in tasks
        ]
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._lines = threading.Thread(target=self._print_lines, daemon=True)

    def __enter__(self) -> ProgressDisplay:
        if self._console.is_terminal:
            self._bars.start()
        else:
            self._console.print(f"loading {self._model}", soft_wrap=True)
            self._lines.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._lines.is_alive():
            self._lines.join()
        self._bars.stop()

    def update(self, news: EvaluationProgress) -> None:
        """Show what is new of a task."""
        with self._lock:
            state = self._states[news.task]
            state.news = news
            if state.begun is None and news.tokens:
                # Several processes need not be at the same task.
                self._begin(state)
            self._begin_next()
            self._bars.update(state.bar, completed=news.done, tokens=news.tokens)

    def describe_kept(self) -> str:
        """Return how many examples of each task that was begun have results."""
        begun = [(state, state.news) for state in self._states if state.begun is not None and state.news is not None]
        return ", ".join(
            f"{state.data.task.name} {news.done:,} of {len(state.data.examples):,} examples" for state, news in begun
        )

    def _begin_next(self) -> None:
        for state in self._states:
            if state.news is None:
                return
            if state.begun is None:
                self._begin(state)
            if state.news.done < len(state.data.examples):
                return

    def _begin(self, state: _State) -> None:
        assert state.news is not None
        state.begun = time.monotonic()
        self._console.print(_describe_task(state.data, state.news.earlier), soft_wrap=True)
        self._bars.update(self._loading, visible=False)
        self._bars.update(state.bar, completed=state.news.done, visible=True)
        self._bars.start_task(state.bar)

    def _print_lines(self) -> None:
        started = time.monotonic()
        while not self._ended.wait(LINE_SECONDS):
            with self._lock:
                current = [
                    state
                    for state in self._states
                    if state.begun is not None and state.news and state.news.done < len(state.data.examples)
                ]
                now = time.monotonic()
                lines = [_describe_progress(state, now) for state in current]
                if all(state.news is None for state in self._states):
                    lines = [f"still loading {self._model}, after {_format_time(now - started)}"]
            try:
                for line in lines:
                    self._console.print(line, soft_wrap=True)
            except OSError:
                # Nobody reads any more, which the main thread will find out.
                return


def _describe_task(data: TaskData, earlier: int) -> str:
    parts = [f"{data.task.name}: {len(data.examples):,} examples"]
    if data.settings.shots:
        parts.append(f"{data.settings.shots} few-shot examples in a prompt")
    size = _count_bytes(data)
    if size:
        parts.append(f"whole documents of {format_text_size(size)} together")
    if earlier:
        parts.append(f"{earlier:,} of them were answered before")
    return ", ".join(parts)


def _count_bytes(data: TaskData) -> int:
    """The bytes of documents that are read from beginning to end; 0 for other tasks."""
    if not isinstance(data.make_requests(data.examples[0], 0)[0], TextRequest):
        return 0
    requests = (request for example in data.examples for request in data.make_requests(example, 0))
    return sum(len(request.text.encode(errors="replace")) for request in requests if isinstance(request, TextRequest))


def _describe_progress(state: _State, now: float) -> str:
    news, total = state.news, len(state.data.examples)
    assert news is not None and state.begun is not None
    seconds, answered = now - state.begun, news.done - news.earlier
    left = f", about {_format_time(seconds / answered * (total - news.done))} left" if answered else ""
    tokens = f", {news.tokens:,} tokens in them" if news.tokens else ""
    return f"{state.data.task.name}: {news.done:,} of {total:,} examples{tokens}, after {_format_time(seconds)}{left}"


def _format_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def format_text_size(size: int) -> str:
    """Return a number of bytes as people say it.

    >>> format_text_size(812), format_text_size(18_400), format_text_size(4_900_000)
    ('812 bytes', '18.4 kB', '4.9 MB')
    """
    if size < 1000:
        return f"{size} bytes"
    return f"{size / 1e3:,.1f} kB" if size < 1_000_000 else f"{size / 1e6:,.1f} MB"
