"""Rows of tokens of unlike lengths, read by a model together, in calls of bounded memory.

Rows begin together and leave the batch where they end. Many rows are first lengthened in front to multiples of a few
tokens, so that they end in few places: by tokens of another document, which leave nothing behind, or by the last tokens
of what all rows begin with, read on top of the state before them.

Shapes:
    B: batch.
    T: tokens of a row.
    D: hidden size.
    C: vocabulary size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kabrn_dist.evaluation.tokens import common_prefix
from kabrn_dist.inference.states import DOCUMENT, NOTHING, concatenate_rows, select_rows
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.utils.errors import UserError

# Tokens of one call, and elements of logits in memory at a time.
CALL_TOKENS, LOGIT_ELEMENTS = 4096, 1 << 24
# Lengths of many rows are multiples of it.
LENGTH_STEP = 16


class ReadRows(NamedTuple):
    """What a model knows after the tokens it has read, row by row.

    Attributes:
        hidden: [B,D], what the head reads of each row's last token.
        states: One per layer, of all rows.
        lengths: Tokens that each row has read, the document token included.
    """

    hidden: Tensor
    states: list[Any]
    lengths: list[int]

    def select(self, rows: Sequence[int]) -> ReadRows:
        """Return some of the rows, in any order and repeated where named again."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.hidden.device)
        return ReadRows(self.hidden[index], select_rows(self.states, index), [self.lengths[row] for row in rows])


def concatenate_read(parts: Sequence[ReadRows]) -> ReadRows:
    """Return the rows of all parts, one below the other."""
    if len(parts) == 1:
        return parts[0]
    lengths = [length for part in parts for length in part.lengths]
    return ReadRows(
        torch.cat([part.hidden for part in parts]), concatenate_rows([part.states for part in parts]), lengths
    )


class RowReader:
    """A model that reads rows on top of what it has read.

    Args:
        model: In evaluation mode.
        in_order: Whether sums are taken in the order of the runtime in C, where a CPU can: slower, and then results of
            retention do not depend on how many tokens or rows are read at a time.
    """

    def __init__(self, model: MixKABRN, in_order: bool = False) -> None:
        self.model, self.in_order = model, in_order
        self.device = model.embedding.weight.device

    def call(
        self, rows: Sequence[Sequence[int]], states: list[Any] | None, starts: Sequence[int], width: int
    ) -> tuple[Tensor, list[Any]]:
        """Read rows, filled up to `width` tokens; what follows the end of a row does not change what is before it.

        Args:
            rows: The tokens of each row.
            states: What was read before; None for nothing.
            starts: Position of each row's first token in its document; tokens at negative ones belong to others.
            width: Tokens to read of each row.

        Returns:
            [B,T,D], what the head reads of each token, and the states after `width` tokens.
        """
        tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=self.device)
        positions = torch.tensor(starts, device=self.device)[:, None] + torch.arange(width, device=self.device)
        documents = torch.where(positions < 0, NOTHING, DOCUMENT)
        return self.model.read(tokens, documents, positions.clamp(min=0), states, self.in_order)

    def read(
        self, rows: Sequence[Sequence[int]], before: ReadRows | None = None, starts: Sequence[int] | None = None
    ) -> ReadRows:
        """Read rows of at least one token each, and return what is known after each of them, in their order.

        Args:
            rows: The tokens of each row; a row that nothing was read before begins with the document token.
            before: What was read before, row by row; None for nothing.
            starts: See `call`; by default what follows from `before`.
        """
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
        lengths = [len(rows[row]) for row in order]
        current = before.select(order) if before else None
        starts = starts or (before.lengths if before else [0] * len(rows))
        reached = [starts[row] for row in order]
        done: list[ReadRows] = []
        column, active = 0, len(order)
        while active:
            stop = min(lengths[active - 1], column + max(1, CALL_TOKENS // active))
            part = [rows[row][column:stop] for row in order[:active]]
            hidden, states = self.call(part, current.states if current else None, reached[:active], stop - column)
            reached = [position + stop - column for position in reached[:active]]
            current = ReadRows(hidden[:, -1], states, reached)
            column, staying = stop, sum(length > stop for length in lengths[:active])
            if staying < active:
                done.append(current.select(range(staying, active)) if staying else current)
                current = current.select(range(staying)) if staying else None
                active = staying
        found = concatenate_read(done[::-1])
        places = {row: place for place, row in enumerate(order)}
        return found.select([places[row] for row in range(len(rows))]) if len(rows) > 1 else found

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [...,C] fp32 of what the head reads [...,D].

        Raises:
            UserError: if they are not finite.
        """
        logits: Tensor = self.model.head(hidden).float()
        if not bool(logits.isfinite().all()):
            raise UserError("the model's outputs are not finite: its training has diverged; use an earlier checkpoint")
        return logits

    @torch.no_grad()
    def score(self, hidden: Tensor, targets: Tensor, choices: int) -> tuple[Tensor, Tensor]:
        """Score tokens, a bounded number of logits at a time.

        Args:
            hidden: [N,D], what the head reads of the token before each.
            targets: [N] int64.
            choices: Tokens that may be drawn, the first ones of the vocabulary.

        Returns:
            log p of each target [N] fp64, over the whole vocabulary, and whether it is the likeliest token [N].
        """
        step = max(1, LOGIT_ELEMENTS // self.model.config.vocab_size)
        logprobs, greedy = [], []
        for part, ids in zip(hidden.split(step), targets.split(step), strict=True):
            logits = self.logits(part)
            chosen = logits.gather(1, ids[:, None])[:, 0].double()
            logprobs.append(chosen - logits.double().logsumexp(1))
            greedy.append(logits[:, :choices].argmax(1) == ids)
        return torch.cat(logprobs).cpu(), torch.cat(greedy).cpu()


class SharedBeginning:
    """The first tokens that all rows have in common, read once, and not at all if there are few of them.

    Args:
        reader: The model.
        rows: All rows, each from its document token on.
    """

    def __init__(self, reader: RowReader, rows: Sequence[Sequence[int]]) -> None:
        self._reader, self._step = reader, LENGTH_STEP if len(rows) > LENGTH_STEP else 1
        count = common_prefix(rows)
        count = count if count >= self._step else 0
        self._tokens = list(rows[0][:count]) if count else []
        # After all of the beginning, all but its last token, and so on.
        self._known: list[ReadRows] = []
        if count:
            known = reader.read([self._tokens[: count - self._step + 1]])
            self._known = [known]
            for token in self._tokens[count - self._step + 1 :]:
                self._known.insert(0, reader.read([[token]], self._known[0]))

    def read(self, rows: Sequence[Sequence[int]]) -> ReadRows:
        """Read some of the rows, and return what is known after each of them."""
        count = len(self._tokens)
        missing = [-(len(row) - count) % self._step for row in rows]
        if not count:
            padded = [[*[0] * pad, *row] for pad, row in zip(missing, rows, strict=True)]
            return self._reader.read(padded, starts=[-pad for pad in missing])
        rests = [row[count - pad :] for pad, row in zip(missing, rows, strict=True)]
        return self._reader.read(rests, concatenate_read([self._known[pad] for pad in missing]))
