"""A model in PyTorch that answers the requests of tasks, many at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.evaluation.decoding import generate_batched
from kabrn_dist.evaluation.reading import RowReader
from kabrn_dist.evaluation.requests import (
    Continuation,
    ContinuationRequest,
    ContinuationScore,
    GenerateRequest,
    TextRequest,
    TextScore,
)
from kabrn_dist.evaluation.scoring import score_continuations_batched, score_texts_batched
from kabrn_dist.inference.frozen_codes import freeze_codes
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.utils.errors import UserError


class TorchModel:
    """An `EvaluatedModel` of a whole model in this process, on a CPU or a card.

    What a request answers does not hang on the other requests of a call, but for the rounding of sums: draws are those
    of its own seed, and rows of a batch do not see each other. Of a ternary model with retention alone that reads
    `in_order` on a CPU, all but the head's product is the same bits in any batch, and those of the runtime in C.

    Args:
        model: With all experts in this process. It is left in evaluation mode.
        tokenizer: The one it was trained with.
        name: See `EvaluatedModel`.
        fingerprint: See `EvaluatedModel`.
        batch_size: Rows that are read and decoded together.
        in_order: See `RowReader`.
        freeze: Whether the model keeps its ternary codes, see `freeze_codes`; not for one that is still trained.

    Raises:
        UserError: for a tokenizer with more tokens than the model.
    """

    def __init__(
        self,
        model: MixKABRN,
        tokenizer: Tokenizer,
        name: str,
        fingerprint: str,
        batch_size: int = 32,
        in_order: bool = False,
        freeze: bool = True,
    ) -> None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}: they do not "
                "belong together; use the tokenizer that the model was trained with"
            )
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: rows that are read together; use 1 or more, such as 32")
        model.eval()
        if freeze:
            freeze_codes(model)
        self.name, self.fingerprint = name, fingerprint
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self._reader = RowReader(model, in_order)

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of an ordinary text."""
        return len(self.tokenizer.encode(text))

    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[tuple[int, list[Continuation]]]:
        """Yield (number of the request, its continuations); see `generate_batched`."""
        return generate_batched(self._reader, self.tokenizer, requests, self.batch_size)

    def score_continuations(self, requests: Sequence[ContinuationRequest]) -> Iterator[tuple[int, ContinuationScore]]:
        """Yield (number of the request, its score); see `score_continuations_batched`."""
        return score_continuations_batched(self._reader, self.tokenizer, requests, self.batch_size)

    def score_texts(self, requests: Sequence[TextRequest]) -> Iterator[tuple[int, TextScore]]:
        """Yield (number of the request, its losses); see `score_texts_batched`."""
        return score_texts_batched(self._reader, self.tokenizer, requests, self.batch_size)
