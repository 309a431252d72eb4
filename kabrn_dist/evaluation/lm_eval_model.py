"""This package's models for lm-eval, the harness of EleutherAI: `lm_eval --model mixkabrn --model_args path=…`.

lm-eval 0.4.13 knows models by their registration alone and looks for none in other packages, so that
`python -m kabrn_dist.evaluation.lm_eval_model` is its command with this model registered; all its options are the same.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from kabrn_dist.evaluation.answering import submit_requests
from kabrn_dist.evaluation.load import load_evaluated_model
from kabrn_dist.evaluation.requests import (
    ContinuationRequest,
    ContinuationScore,
    EvaluatedModel,
    GenerateRequest,
    Request,
    TextRequest,
    TextScore,
)
from kabrn_dist.utils.errors import UserError

# As lm-eval's own models where a task does not say.
_DEFAULT_TOKENS = 256
_KNOWN_ARGUMENTS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "seed"}


@register_model("mixkabrn")
class MixKABRNLM(LM):
    """A run, an export or a model file, as lm-eval asks it.

    Args:
        path: Folder of a run or an export, or a model file.
        batch_size: Sequences at once; "auto" for 32.
        device: Such as "cpu".
        max_batch_size: Of lm-eval; unused.

    Attributes:
        model: The model.

    Raises:
        UserError: for a path that holds no model.
    """

    def __init__(
        self,
        path: str,
        batch_size: int | str = 32,
        device: str | None = "cpu",
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        rows = int(batch_size) if str(batch_size).isdigit() else 32
        # What lm-eval passes on where no device was asked for, whatever the machine has.
        is_asked = device is not None and not (device == "cuda:0" and not torch.cuda.is_available())
        self.model: EvaluatedModel = load_evaluated_model(Path(path), str(device) if is_asked else "cpu", rows)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation and whether greedy decoding would write it."""
        answers = self._ask([ContinuationRequest(*instance.args) for instance in requests])
        return [(answer.logprob, answer.is_greedy) for answer in answers if isinstance(answer, ContinuationScore)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return the log-probability of each document; the state is carried over its whole length."""
        answers = self._ask([TextRequest(instance.args[0]) for instance in requests])
        return [-float(answer.nats.sum()) for answer in answers if isinstance(answer, TextScore)]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the continuation of each prompt.

        Raises:
            UserError: for an argument that this model does not know.
        """
        answers = self._ask([make_generate_request(*instance.args) for instance in requests])
        return [answer[0].text for answer in answers if isinstance(answer, list)]

    def _ask(self, requests: Sequence[Request]) -> list[Any]:
        found = dict(submit_requests(self.model, requests))
        return [found[number] for number in range(len(requests))]


def make_generate_request(prompt: str, arguments: dict[str, Any]) -> GenerateRequest:
    """Return the request that lm-eval's arguments of a generation describe.

    Args:
        prompt: Text to continue.
        arguments: Its `gen_kwargs`.

    Raises:
        UserError: for one that is unknown here.
    """
    unknown = [name for name in arguments if name not in _KNOWN_ARGUMENTS]
    if unknown:
        raise UserError(f"--gen_kwargs {unknown[0]}: is none of {', '.join(sorted(_KNOWN_ARGUMENTS))}; leave it out")
    until = arguments.get("until") or ()
    draws = arguments.get("do_sample", "temperature" in arguments)
    request = GenerateRequest(
        prompt,
        max_tokens=int(arguments.get("max_gen_toks", _DEFAULT_TOKENS)),
        stop=(until,) if isinstance(until, str) else tuple(stop for stop in until if stop),
        temperature=float(arguments.get("temperature", 1.0)) if draws else 0.0,
        top_p=float(arguments.get("top_p", 1.0)),
    )
    return dataclasses.replace(request, seed=int(arguments["seed"])) if "seed" in arguments else request


def main() -> int:
    """Run lm-eval's command; return the exit code."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
