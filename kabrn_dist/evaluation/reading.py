"""Rows of tokens of unlike lengths, read by a model together, in calls of bounded memory.

Rows begin together and leave the batch where they end, so that no token is read for nothing and states need no padding.

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
from kabrn_dist.inference.states import DOCUMENT, concatenate_rows, select_rows
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.utils.errors import UserError

# Tokens of one call, and elements of logits in memory at a time.
CALL_TOKENS, LOGIT_ELEMENTS = 4096, 1 << 24


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

    def call(self, rows: Sequence[Sequence[int]], before: ReadRows | None, width: int) -> tuple[Tensor, list[Any]]:
        """Read rows, filled up to `width` tokens; what follows the end of a row does not change what is before it.

        Returns:
            [B,T,D], what the head reads of each token, and the states after `width` tokens.
        """
        tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=self.device)
        starts = torch.tensor(before.lengths if before else [0] * len(rows), device=self.device)
        positions = starts[:, None] + torch.arange(width, device=self.device)
        states = before.states if before else None
        return self.model.read(tokens, torch.full_like(tokens, DOCUMENT), positions, states, self.in_order)

    def read(self, rows: Sequence[Sequence[int]], before: ReadRows | None = None) -> ReadRows:
        """Read rows of at least one token each, and return what is known after each of them, in their order.

        Args:
            rows: The tokens of each row; a row that nothing was read before begins with the document token.
            before: What was read before, row by row; None for nothing.
        """
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
        lengths = [len(rows[row]) for row in order]
        current = before.select(order) if before else None
        done: list[ReadRows] = []
        column, active = 0, len(order)
        while active:
            stop = min(lengths[active - 1], column + max(1, CALL_TOKENS // active))
            part = [rows[row][column:stop] for row in order[:active]]
            hidden, states = self.call(part, current, stop - column)
            read = [length + stop - column for length in current.lengths] if current else [stop] * active
            current = ReadRows(hidden[:, -1], states, read)
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


def read_prefix(reader: RowReader, rows: Sequence[Sequence[int]]) -> tuple[ReadRows | None, list[Sequence[int]]]:
    """Read the tokens that all rows begin with, once; return what is known after them, and the rows' rests."""
    count = common_prefix(rows)
    if not count:
        return None, list(rows)
    return reader.read([rows[0][:count]]), [row[count:] for row in rows]


def repeat_row(read: ReadRows | None, times: int) -> ReadRows | None:
    """Return the only row of `read` several times; None for None."""
    return None if read is None else read.select([0] * times)
