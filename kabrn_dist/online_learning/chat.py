"""A conversation with a model in torch: what was read is kept as states, so that a turn reads only its new tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.inference.generate import draw_token
from kabrn_dist.inference.sampling import check_sampling
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.online_learning.chat_writer import ChatWriter
from kabrn_dist.runtime.server.answer_text import AnswerText
from kabrn_dist.utils.errors import UserError

# Recurrent decoding holds the states of some tokens at a time.
READ_TOKENS = 256


class Sampling(NamedTuple):
    """How answers are drawn.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k: Draws among so many likeliest tokens; 0: among all.
        max_tokens: Longest answer.
    """

    temperature: float = 0.8
    top_k: int = 50
    max_tokens: int = 512


class Conversation:
    """Turns of a user and a model.

    Args:
        model: The model, with its adapters set.
        tokenizer: Its tokenizer.
        writer: How conversations are written.
        sampling: How answers are drawn.
        system: Text in front of all turns; "" for none.
        seed: Of the sampling.

    Attributes:
        messages: Role and content of each turn so far, the text of the system included.
    """

    def __init__(
        self,
        model: MixKABRN,
        tokenizer: Tokenizer,
        writer: ChatWriter,
        sampling: Sampling,
        system: str = "",
        seed: int = 0,
    ) -> None:
        self._model, self._tokenizer, self._writer, self.sampling = model, tokenizer, writer, sampling
        self._generator = torch.Generator().manual_seed(seed)
        self.messages: list[dict[str, str]] = []
        self._kept: list[tuple[list[int], list[Any]]] = []
        self.begin(system)

    def begin(self, system: str) -> None:
        """Forget all turns, and begin with a text of the system; "" for none."""
        self.messages = [{"role": "system", "content": system}] if system else []
        self._kept = []

    def reset(self) -> None:
        """Forget all turns but the text of the system."""
        self.begin(next((each["content"] for each in self.messages if each["role"] == "system"), ""))

    def say(self, text: str) -> None:
        """Add a turn of the user; one that got no answer becomes a part of it."""
        if self.messages and self.messages[-1]["role"] == "user":
            text = f"{self.messages.pop()['content']}\n{text}"
        self.messages.append({"role": "user", "content": text})

    def take_answer_back(self) -> None:
        """Remove the last answer, so that another one can be given.

        Raises:
            UserError: if there is none.
        """
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise UserError("there is no answer yet; say something first")
        self.messages.pop()

    def set_temperature(self, temperature: float) -> None:
        """Choose how answers are drawn from now on.

        Raises:
            UserError: for a value that has no meaning.
        """
        check_sampling("", 1, temperature, 0, 0)
        self.sampling = self.sampling._replace(temperature=temperature)

    def forget_states(self) -> None:
        """Read everything again before the next answer: the model has become another one."""
        self._kept = []

    def answer(self) -> Iterator[str]:
        """Yield the answer to the turns so far, piece by piece, and keep it as a turn, also a part of it.

        Raises:
            UserError: if the template refuses the conversation, or the model's outputs are not finite.
        """
        ids = self._writer.write(self.messages, ask=True).ids
        text = AnswerText(self._writer.stops, self._writer.trim)
        logits, states = self._read(ids)
        self._kept.append((list(ids), states))
        self.messages.append({"role": "assistant", "content": ""})
        try:
            for _ in range(self.sampling.max_tokens):
                scores = logits[0, : self._tokenizer.vocab_size].cpu()
                token = draw_token(scores, self.sampling.temperature, self.sampling.top_k, self._generator)
                if self._writer.ends(token):
                    break
                yield text.add(self._tokenizer.token_bytes(token))
                if text.stopped:
                    break
                logits, states = self._decode([token], len(ids), states)
                ids.append(token)
            yield text.finish()
        finally:
            self.messages[-1]["content"] = text.text
            self._kept.append((ids, states))

    def _read(self, ids: list[int]) -> tuple[torch.Tensor, list[Any]]:
        """Read on top of the longest kept state that has read the first of these tokens, but not the last."""
        found: tuple[list[int], list[Any] | None] = ([], None)
        for read, states in self._kept:
            if len(found[0]) < len(read) < len(ids) and ids[: len(read)] == read:
                found = (read, states)
        # What other turns have led to is of no use any more.
        self._kept = [each for each in self._kept if ids[: len(each[0])] == each[0]]
        place, kept = len(found[0]), found[1]
        while True:
            logits, kept = self._decode(ids[place : place + READ_TOKENS], place, kept)
            place += READ_TOKENS
            if place >= len(ids):
                return logits, kept

    def _decode(self, ids: list[int], place: int, states: list[Any] | None) -> tuple[torch.Tensor, list[Any]]:
        device = next(self._model.parameters()).device
        tokens = torch.tensor([ids], device=device)
        positions = torch.arange(place, place + len(ids), device=device)[None]
        return self._model.decode(tokens, torch.zeros_like(tokens), positions, states)
