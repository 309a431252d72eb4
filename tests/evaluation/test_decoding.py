"""Batches of unlike prompts are continued as each prompt alone, by every kind of model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.evaluation import reading
from kabrn_dist.evaluation.decoding import draw_tokens, generate_naive
from kabrn_dist.evaluation.draw import SampledText, draw_one
from kabrn_dist.evaluation.requests import Continuation, GenerateRequest
from kabrn_dist.evaluation.tokens import common_prefix
from kabrn_dist.evaluation.torch_model import TorchModel
from kabrn_dist.inference.generate import GenerativeModel
from kabrn_dist.inference.states import select_rows
from kabrn_dist.utils.errors import UserError
from tests.support.models import MODEL_KINDS, make_model, make_model_config

BYTES = Tokenizer.of_bytes()
PROMPTS = ["Q: 1+1?\nA:", "", "Q: a much longer question?\nA:", "Q: é漢\nA:", "Q: 1+1?\nA:", "x"]
REQUESTS = [
    GenerateRequest(prompt, 5 + number % 3, num_samples=1 + number % 2, temperature=0.9 * (number % 3), seed=number)
    for number, prompt in enumerate(PROMPTS)
]


def torch_model(model: GenerativeModel, batch_size: int = 3, in_order: bool = True) -> TorchModel:
    return TorchModel(model, BYTES, "small", "none", batch_size, in_order)


def texts_of(model: TorchModel, requests: list[GenerateRequest]) -> list[list[Continuation]]:
    found = dict(model.generate(requests))
    assert sorted(found) == list(range(len(requests)))
    return [found[number] for number in range(len(requests))]


@pytest.fixture(scope="module")
def small() -> GenerativeModel:
    return make_model(make_model_config("model.layers=RA", "model.short_conv_size=3"))


@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_a_batch_of_unlike_prompts_is_each_of_them_alone(kind: str) -> None:
    model = make_model(make_model_config(*MODEL_KINDS[kind]))
    expected = [generate_naive(model, BYTES, request) for request in REQUESTS]
    assert texts_of(torch_model(model), REQUESTS) == expected
    assert all(len(each) == request.num_samples for each, request in zip(expected, REQUESTS, strict=True))


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_no_batch_changes_what_is_drawn(small: GenerativeModel, batch_size: int) -> None:
    expected = [texts_of(torch_model(small), [request])[0] for request in REQUESTS]
    backwards = texts_of(torch_model(small, batch_size), REQUESTS[::-1])
    assert backwards[::-1] == expected


def test_prompts_that_begin_alike_have_it_read_once(small: GenerativeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    shots = "Question: what is it?\nAnswer: nothing.\n\n" * 3
    requests = [replace(request, prompt=shots + request.prompt) for request in REQUESTS]
    expected = [generate_naive(small, BYTES, request) for request in requests]
    read: list[int] = []
    call = reading.RowReader.call

    def counted(self: reading.RowReader, rows: list[list[int]], *rest: object) -> object:
        read.append(sum(map(len, rows)))
        return call(self, rows, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(reading.RowReader, "call", counted)
    assert texts_of(torch_model(small), requests) == expected
    asked = sum(len(BYTES.encode(request.prompt)) for request in requests)
    assert max(read) >= len(shots) and sum(read) < asked / 2


@pytest.mark.parametrize("shots", ["", "Question: what is it?\nAnswer: nothing.\n\n"])
def test_many_rows_end_in_few_places_and_are_read_as_alone(
    small: GenerativeModel, shots: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [GenerateRequest(shots + "ab?"[: number % 4] + "x" * (3 * number % 37), 2) for number in range(20)]
    expected = [texts_of(torch_model(small, 1), [request])[0] for request in requests]
    calls: list[int] = []
    call = reading.RowReader.call

    def counted(self: reading.RowReader, rows: list[list[int]], states: object, starts: object, width: int) -> object:
        calls.append(width)
        return call(self, rows, states, starts, width)  # type: ignore[arg-type]

    monkeypatch.setattr(reading.RowReader, "call", counted)
    assert texts_of(torch_model(small, 20), requests) == expected
    # The rows' lengths, a step after the first token, and the states before each of the beginning's last tokens.
    assert len(calls) <= 4 + 1 + (reading.LENGTH_STEP if shots else 0)


def test_what_rows_have_in_common_leaves_a_token_of_each() -> None:
    tens = list(range(10))
    assert common_prefix([tens, tens]) == 9 and common_prefix([tens]) == 0 and common_prefix([]) == 0
    assert common_prefix([[*tens, 1], [*tens, 2, 3]]) == 10 and common_prefix([tens[:5], tens[:5]]) == 0
    assert common_prefix([[*tens, 5], [*tens[:8], 0, 0], [*tens, 7]]) == 8


def test_reading_in_slices_is_reading_at_once(small: GenerativeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = texts_of(torch_model(small), REQUESTS)
    monkeypatch.setattr(reading, "CALL_TOKENS", 8)
    assert texts_of(torch_model(small), REQUESTS) == expected


def test_the_chunkwise_form_gives_nearly_the_logits_of_the_runtimes_order(small: GenerativeModel) -> None:
    rows = [BYTES.encode(prompt * 5) for prompt in PROMPTS if prompt]
    fast, exact = (reading.RowReader(small, in_order).read(rows) for in_order in (False, True))
    torch.testing.assert_close(fast.hidden, exact.hidden, atol=2e-2, rtol=0)
    assert fast.lengths == exact.lengths == [len(row) for row in rows]


def test_caches_of_attention_shrink_with_the_rows_they_lose(small: GenerativeModel) -> None:
    read = reading.RowReader(small).read([[1] * 40, [2] * 4])
    cache = read.states[1].mixer_state
    assert cache.documents.shape == (2, 40) and cache.documents[1].sum() == 4
    shorter = select_rows(read.states, torch.tensor([1]))[1].mixer_state
    assert shorter.k.shape[2] == shorter.v.shape[2] == shorter.documents.shape[1] == 4


def scripted(pieces: list[str], **values: object) -> Continuation:
    """What becomes of tokens that a model draws; each piece is the bytes of several tokens."""
    request = GenerateRequest("", **{"max_tokens": 100, **values})  # type: ignore[arg-type]
    text = SampledText(request, 0, BYTES)
    for token in [token for piece in pieces for token in BYTES.encode(piece)] + [BYTES.document_token]:
        if text.finish_reason or text.push(token):
            break
    return text.result()


class _Words:
    """A tokenizer whose tokens are words."""

    document_token, vocab_size = 0, 4

    def token_bytes(self, id: int) -> bytes:
        return [b"", b"one\nQ", b"uestion: two", b" end\nQu"][id]

    def encode_batch(self, texts: object) -> list[list[int]]:
        return []


def test_a_stop_string_ends_a_text_wherever_tokens_begin() -> None:
    assert scripted(["a b\nQ: c"], stop=("\nQ:", "zzz")) == Continuation("a b", 6, "stop")
    assert scripted(["a é漢"], stop=("é",)) == Continuation("a ", 4, "stop")
    assert scripted(["done"]) == Continuation("done", 4, "stop")
    assert scripted(["done"], max_tokens=2) == Continuation("do", 2, "length")
    assert scripted(["é漢"], max_tokens=3) == Continuation("é\ufffd", 3, "length")
    assert scripted([""], max_tokens=0) == Continuation("", 0, "length")
    for stops, tokens, expected in (
        (("\nQuestion:",), [1, 2], Continuation("one", 2, "stop")),
        (("two", "\nQuestion:"), [1, 2], Continuation("one", 2, "stop")),
        (("\nQu",), [1, 1, 3], Continuation("one\nQone\nQ end", 3, "stop")),
    ):
        text = SampledText(GenerateRequest("", 9, stops), 0, _Words())
        assert [text.push(token) for token in tokens][-1] and text.result() == expected


def test_a_model_stops_at_its_stop_strings(small: GenerativeModel) -> None:
    request = GenerateRequest("Q: 1", 12)
    (whole,) = texts_of(torch_model(small), [request])[0]
    stop = next(letter for letter in whole.text[3:] if letter.isascii())
    (cut,) = texts_of(torch_model(small), [replace(request, stop=(stop,))])[0]
    assert cut.finish_reason == "stop" and cut.text == whole.text[: whole.text.index(stop)]


def test_samples_differ_and_the_likeliest_text_does_not(small: GenerativeModel) -> None:
    sampled, likeliest = texts_of(
        torch_model(small), [GenerateRequest("x", 8, (), 7, 1.0), GenerateRequest("x", 8, (), 3)]
    )
    assert len({each.text for each in sampled}) == 7 and len(likeliest) == 3 and len(set(likeliest)) == 1


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-9])
def test_rows_are_drawn_as_one_alone_and_only_among_the_likeliest(top_p: float) -> None:
    generator = torch.Generator().manual_seed(0)
    # Flat rows need more tokens than are sorted at first.
    logits = torch.randn(30, 700, generator=generator) * torch.linspace(0.01, 6, 30)[:, None]
    texts = [SampledText(GenerateRequest("", 1, (), 1, 0.7, top_p, seed), 3, BYTES) for seed in range(30)]
    again = [SampledText(GenerateRequest("", 1, (), 1, 0.7, top_p, seed), 3, BYTES) for seed in range(30)]
    drawn = draw_tokens(logits, texts)
    assert drawn == [draw_one(row.numpy(), 0.7, top_p, text.uniform()) for row, text in zip(logits, again, strict=True)]
    for row, token in zip((logits.double() / 0.7).softmax(1), drawn, strict=True):
        assert float(row[row > row[token]].sum()) < top_p


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))
    uniforms = (np.arange(1000) + 0.5) / 1000
    counts = [np.bincount([draw_one(logits, 1.0, top_p, u) for u in uniforms], minlength=4) for top_p in (1.0, 0.65)]
    assert np.abs(counts[0] - [100, 200, 300, 400]).max() <= 1
    assert np.abs(counts[1] - [0, 0, 3000 / 7, 4000 / 7]).max() <= 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"top_p": 0.0}, "top_p 0"),
        ({"num_samples": 0}, "num_samples 0"),
        ({"stop": ("",)}, "stop: an empty string"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"prompt": "caf\udce9"}, "not UTF-8"),
    ],
)
def test_a_request_without_a_meaning_is_refused(small: GenerativeModel, change: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        list(torch_model(small).generate([replace(REQUESTS[0], **change)]))  # type: ignore[arg-type]


def test_no_padding_of_the_vocabulary_and_no_nan_is_drawn() -> None:
    model = make_model(make_model_config())
    with torch.no_grad():
        model.head.weight[257:] = model.head.weight[:1] * 0 + 50 * torch.randn(40)
    found = texts_of(torch_model(model), [GenerateRequest("x", 8, num_samples=4, temperature=1.0)])[0]
    assert all(each.num_tokens or each.finish_reason == "stop" for each in found)
    with torch.no_grad():
        model.head.weight[3] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        list(torch_model(model).generate([REQUESTS[0]]))
    with pytest.raises(UserError, match="batch_size 0"):
        torch_model(model, 0)
