"""Scores of continuations and documents are those of one pass over each, whatever is read together or carried over."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.evaluation import reading, scoring
from kabrn_dist.evaluation.requests import ContinuationRequest, TextRequest
from kabrn_dist.evaluation.tokens import split_tokens
from kabrn_dist.evaluation.torch_model import TorchModel
from kabrn_dist.inference.generate import GenerativeModel
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.utils.errors import UserError
from tests.support.models import MODEL_KINDS, make_model, make_model_config
from tests.support.text_models import train_bpe

BYTES = Tokenizer.of_bytes()
CHOICES = ["no", " yes, it is", " é漢", "!"]
CONTEXTS = ["Is it? ", "A longer question, is it", ""]
REQUESTS = [ContinuationRequest(context, choice) for context in CONTEXTS for choice in CHOICES]
REQUESTS.append(ContinuationRequest("Q: alone\n\n ", "the only one"))
TEXTS = ["", "a", "The quick brown fox é jumps over 13 lazy dogs.\n", "short", "x" * 30]


def torch_model(model: GenerativeModel, batch_size: int = 3, in_order: bool = False) -> TorchModel:
    return TorchModel(model, BYTES, "small", "none", batch_size, in_order)


@torch.no_grad()
def logits_after(model: MixKABRN, tokens: list[int]) -> torch.Tensor:
    """The logits [C] after tokens of one document, read at once."""
    ids = torch.tensor([tokens])
    return model.decode(ids, torch.zeros_like(ids), torch.arange(len(tokens))[None], None)[0][0].double()


def nats_naive(model: MixKABRN, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """−log p of all tokens but the first, each after reading all before, and the likeliest token each time."""
    logits = [logits_after(model, tokens[:length]) for length in range(1, len(tokens))]
    nats = [float(each.logsumexp(0) - each[token]) for each, token in zip(logits, tokens[1:], strict=True)]
    return np.array(nats), np.array([int(each[: BYTES.vocab_size].argmax()) for each in logits])


@pytest.mark.parametrize("kind", ["bspline", "hybrid", "dense layers", "scale groups", "plain"])
def test_scores_are_those_of_each_text_alone(kind: str) -> None:
    model = make_model(make_model_config(*MODEL_KINDS[kind]))
    found = dict(torch_model(model).score_continuations(REQUESTS))
    assert sorted(found) == list(range(len(REQUESTS)))
    for number in (0, 1, 6, 11, 12):
        request, score = REQUESTS[number], found[number]
        tokens = [BYTES.document_token, *(request.context + request.continuation).encode()]
        nats, likeliest = nats_naive(model, tokens)
        moved = len(request.context) - len(request.context.rstrip())
        count = len(request.continuation.encode()) + moved
        assert score.num_tokens == count and score.num_bytes == count - moved
        # A sum that is rounded otherwise may move a value of 127 to the next.
        assert abs(score.logprob + nats[-count:].sum()) < 2e-2
        assert score.is_greedy == bool((likeliest[-count:] == tokens[-count:]).all())


def test_in_the_runtimes_order_scores_of_batches_are_those_of_definitions() -> None:
    model = make_model(make_model_config())
    found = dict(torch_model(model, 4, in_order=True).score_texts([TextRequest(text) for text in TEXTS]))
    for number, text in enumerate(TEXTS):
        expected, _ = nats_naive(model, [BYTES.document_token, *text.encode()])
        assert found[number].nats.dtype == np.float64 and found[number].nats.shape == expected.shape
        np.testing.assert_allclose(found[number].nats, expected, atol=2e-6)
        assert found[number].num_bytes.tolist() == [1] * len(text.encode())


@pytest.mark.parametrize("kind", ["rational", "hybrid", "plain"])
def test_a_state_carried_over_slices_gives_one_pass(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(make_model_config(*MODEL_KINDS[kind]))
    requests = [TextRequest(text * 4) for text in TEXTS]
    once = dict(torch_model(model, in_order=True).score_texts(requests))
    choices = dict(torch_model(model, in_order=True).score_continuations(REQUESTS))
    for module in (reading, scoring):
        monkeypatch.setattr(module, "CALL_TOKENS", 12)
    monkeypatch.setattr(reading, "LOGIT_ELEMENTS", 1000)
    sliced = dict(torch_model(model, in_order=True).score_texts(requests))
    for number, score in once.items():
        np.testing.assert_allclose(sliced[number].nats, score.nats, atol=1e-4 if kind == "hybrid" else 5e-6)
    for number, choice in torch_model(model, in_order=True).score_continuations(REQUESTS):
        assert abs(choice.logprob - choices[number].logprob) < 1e-4
        assert choice.is_greedy == choices[number].is_greedy


def test_a_continuation_of_likeliest_tokens_is_greedy() -> None:
    model = make_model(make_model_config())
    contexts = [f"context {number}" for number in range(40)]
    likeliest = [int(logits_after(model, [BYTES.document_token, *each.encode()])[:257].argmax()) for each in contexts]
    context, token = next(pair for pair in zip(contexts, likeliest, strict=True) if 33 < pair[1] < 126)
    after = int(logits_after(model, [BYTES.document_token, *context.encode(), token])[:257].argmax())
    other = "a" if after != ord("a") else "b"
    requests = [ContinuationRequest(context, text) for text in (chr(token), chr(token + 1), chr(token) + other)]
    found = dict(torch_model(model, in_order=True).score_continuations(requests))
    assert [found[number].is_greedy for number in range(3)] == [True, False, False]


def test_spaces_before_a_continuation_are_encoded_with_it() -> None:
    content = train_bpe("gpt2", ["the answer is yes or the answer is no"] * 9, 300).to_str().encode()
    bpe = Tokenizer(content)
    requests = [ContinuationRequest("the answer is ", "yes"), ContinuationRequest("the answer is", " yes")]
    requests += [ContinuationRequest("  ", "yes"), ContinuationRequest("", "yes")]
    spaced, glued, blank, alone = split_tokens(bpe, requests)
    assert spaced == glued and bpe.decode(spaced.continuation) == " yes"
    assert spaced.context == (bpe.document_token, *bpe.encode("the answer is"))
    assert blank.context == alone.context == (bpe.document_token,) and bpe.decode(blank.continuation) == "  yes"
    # A token that holds the end of the context too belongs to the continuation.
    (merged,) = split_tokens(bpe, [ContinuationRequest("the answ", "er")])
    assert len(merged.continuation) >= 1 and bpe.decode([*merged.context[1:], *merged.continuation]) == "the answer"
    with pytest.raises(UserError, match="continuation is empty"):
        split_tokens(bpe, [ContinuationRequest("a", "")])


def test_frozen_codes_are_the_same_bits_until_weights_change() -> None:
    model = make_model(make_model_config("model.scale_group_size=7"))
    tokens = torch.arange(20)[None]
    expected = model.decode(tokens, torch.zeros_like(tokens), tokens, None)[0]
    torch_model(model)
    assert torch.equal(model.decode(tokens, torch.zeros_like(tokens), tokens, None)[0], expected)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "value" in name:
                parameter.neg_()
    changed = model.decode(tokens, torch.zeros_like(tokens), tokens, None)[0]
    assert not torch.equal(changed, expected)
    model.set_quantization(0.5)
    assert not torch.equal(model.decode(tokens, torch.zeros_like(tokens), tokens, None)[0], changed)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    model = make_model(make_model_config("model.vocab_size=200"))
    with pytest.raises(UserError, match="257 tokens, the model 200"):
        torch_model(model)
