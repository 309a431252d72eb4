"""Text that a model was trained on, where it is at hand: to replay while learning, and to see what is forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kabrn_dist.config import Config
from kabrn_dist.data.corpus import open_corpus
from kabrn_dist.data.dataset import Batch, TokenDataset
from kabrn_dist.data.remote import is_url
from kabrn_dist.online_learning.samples import Sample
from kabrn_dist.ops.cross_entropy import IGNORED
from kabrn_dist.utils.errors import UserError

REPLAYED_ROWS, MEASURED_ROWS = 64, 16


class BaseText(NamedTuple):
    """Some of the base's own text.

    Attributes:
        replay: Of the training split, to learn again.
        held_out: Of the validation split, to measure what is forgotten.
    """

    replay: Sequence[Sample] = ()
    held_out: Sequence[Sample] = ()


def read_base_text(config: Config, tokens: int, seed: int = 0) -> BaseText:
    """Read some of the text that a run was trained on; nothing where its shards are not on this machine.

    Args:
        config: The run's configuration.
        tokens: Tokens of a row.
        seed: Of the choice.
    """
    if any(is_url(place) for place in (config.data.path, *(extra.path for extra in config.data.extra_sets))):
        return BaseText()
    try:
        corpus = open_corpus(config.data)
        train = TokenDataset(corpus, "train", tokens, seed)
        validation = TokenDataset(corpus, "validation", tokens, seed, ordered=False)
        replay = train.get(range(min(REPLAYED_ROWS, train.num_sequences)))
        held_out = validation.get(validation.validation_positions(MEASURED_ROWS))
    except UserError:
        # Learning does not need it; whoever calls says that it is missing.
        return BaseText()
    corpus.files.close()
    return BaseText(_divide(replay), _divide(held_out))


def _divide(batch: Batch) -> list[Sample]:
    """Return the documents, or parts of documents, in the rows."""
    samples = []
    rows = (part.tolist() for part in (batch.tokens, batch.targets, batch.positions))
    for tokens, targets, positions in zip(*rows, strict=True):
        # The token after the last one is known only as its target.
        ids = [*tokens, targets[-1] if targets[-1] != IGNORED else tokens[-1]]
        starts = [place for place, position in enumerate(positions) if position == 0]
        for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
            learned = [False, *(target != IGNORED for target in targets[start:stop])]
            if any(learned):
                samples.append(Sample(ids[start : stop + 1], learned))
    return samples
