"""Learning in a chat: what is learned is saved at once, and can be taken back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from kabrn_dist.adapters.adapter import Adapter, AdapterInfo
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.online_learning.base_text import BaseText
from kabrn_dist.online_learning.chat import Conversation
from kabrn_dist.online_learning.chat_writer import ChatWriter
from kabrn_dist.online_learning.course import LearningLimits, LearningResult
from kabrn_dist.online_learning.history import AdapterHistory
from kabrn_dist.online_learning.learner import Learner, Report
from kabrn_dist.online_learning.samples import Notes, SampleReader
from kabrn_dist.online_learning.trainable import TrainableAdapter
from kabrn_dist.utils.errors import UserError


class _Before(NamedTuple):
    """What there was before a learning."""

    values: list[Tensor]
    corrections: int
    messages: list[dict[str, str]]


class LearningSession:
    """A conversation whose model learns.

    Args:
        model: The model, with what else is attached to it.
        tokenizer: Its tokenizer.
        writer: How conversations are written.
        conversation: The conversation.
        history: Where the adapter is saved.
        learned: The adapter that is there, of this model, which is learned further; None: there is none.
        info: What a new adapter says about itself.
        limits: What each learning may take.
        note_tokens: Longest piece of a note.
        read_base_text: Returns texts of the base, in rows of so many tokens; called once, at the first learning.
        seed: Of random numbers.

    Raises:
        UserError: for an adapter that does not fit the model, or cannot be trained further.
    """

    def __init__(
        self,
        model: MixKABRN,
        tokenizer: Tokenizer,
        writer: ChatWriter,
        conversation: Conversation,
        history: AdapterHistory,
        learned: Adapter | None,
        info: AdapterInfo,
        limits: LearningLimits,
        note_tokens: int,
        read_base_text: Callable[[int], BaseText],
        seed: int = 0,
    ) -> None:
        self._model, self._tokenizer, self._writer = model, tokenizer, writer
        self.conversation, self.history = conversation, history
        self._info, self._limits, self._note_tokens, self._seed = info, limits, note_tokens, seed
        self._read_base_text = read_base_text
        self._before: list[_Before] = []
        self._adapter: TrainableAdapter | None = None
        self._learner: Learner | None = None
        self.has_base_text = False
        if learned is not None:
            self._adapter = TrainableAdapter(model, learned.info, seed)
            self._adapter.load(learned)

    @property
    def steps(self) -> int:
        """Steps that the adapter has been trained for; 0 without one."""
        return self._adapter.info.steps if self._adapter else 0

    def read(self, path: Path) -> Notes:
        """Read what is to be learned: a file or a folder.

        Args:
            path: Text, or conversations as .jsonl.

        Raises:
            UserError: if there is nothing to learn from.
        """
        return self._prepare()[1].read(path)

    def learn(self, notes: Notes, report: Report = lambda _: None) -> LearningResult:
        """Learn what was read, and save what was learned.

        Args:
            notes: What `read` returned.
            report: Told of each step.

        Raises:
            UserError: if the disk refuses, or losses are not finite.
        """
        learner, _ = self._prepare()
        return self._keep(lambda: learner.learn(notes.samples, report))

    def correct(self, text: str, report: Report = lambda _: None) -> LearningResult:
        """Take the last answer back, learn to give another one, and save what was learned.

        Args:
            text: What the answer should have been.
            report: Told of each step.

        Raises:
            UserError: if there is no answer, or no text, or the disk refuses.
        """
        messages = self.conversation.messages
        if not messages or messages[-1]["role"] != "assistant":
            raise UserError("/correct needs an answer to correct; say something first")
        if not text.strip():
            raise UserError("/correct needs the right answer: /correct TEXT")
        learner, reader = self._prepare()
        right = [*messages[:-1], {"role": "assistant", "content": text}]
        sample = reader.conversation(right)
        result = self._keep(lambda: learner.correct(sample, report))
        self.conversation.messages = right
        return result

    def undo(self) -> bool:
        """Take the last learning back, from memory and from the disk; return whether something learned is left.

        Raises:
            UserError: if nothing was learned.
        """
        found = self.history.undo()
        before = self._before.pop() if self._before else None
        if self._adapter is not None:
            if before is not None:
                self._adapter.restore(before.values)
            elif found is None:
                self._adapter.restore(None)
            else:
                self._adapter.load(found)
            self._adapter.info = self._info if found is None else found.info
        if before is not None:
            self.conversation.messages = before.messages
            if self._learner is not None:
                self._learner.forget_corrections(before.corrections)
        self.conversation.forget_states()
        return found is not None

    def _keep(self, learn: Callable[[], LearningResult]) -> LearningResult:
        """Learn, and save what was learned; what is not saved is not kept in memory either."""
        assert self._adapter is not None and self._learner is not None
        # Before the work, which would be lost.
        self.history.hold()
        messages = [dict(message) for message in self.conversation.messages]
        before, info = _Before(self._adapter.copy(), self._learner.corrections, messages), self._adapter.info
        try:
            result = learn()
            if result.steps:
                self.history.save(self._adapter.adapter(result.steps))
        except BaseException:
            self._adapter.restore(before.values)
            self._adapter.info = info
            self._learner.forget_corrections(before.corrections)
            raise
        if result.steps:
            self._before.append(before)
            self.conversation.forget_states()
        return result

    def _prepare(self) -> tuple[Learner, SampleReader]:
        if self._adapter is None:
            self._adapter = TrainableAdapter(self._model, self._info, self._seed)
        if self._learner is None:
            base_text = self._read_base_text(self._note_tokens)
            self.has_base_text = bool(base_text.held_out)
            self._learner = Learner(self._model, self._adapter, self._limits, base_text, self._seed)
        tokens = self._learner.row_tokens
        return self._learner, SampleReader(self._tokenizer, self._writer, min(self._note_tokens, tokens), tokens)
