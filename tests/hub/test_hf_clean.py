"""Exports where only torch and transformers are installed: the trainer's logits, text, and gradients."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kabrn_dist.data.tokenizer import DOCUMENT_TOKEN, Tokenizer
from tests.hub.test_environments import TRANSFORMERS, make_transformers
from tests.support.environments import run_in_environment
from tests.support.hub_models import expect_gradients, expect_greedy, expect_logits, write_checks, write_hub_model
from tests.support.models import MODEL_KINDS
from tests.support.text_models import train_bpe

SCRIPT = Path(__file__).with_name("clean_check.py")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a> {% endif %}"
)
# What is checked in full: every mixer, learned functions on edges and on groups, both kinds of tokenizer.
FULLY = {"hybrid": "bytes", "bspline": "bpe"}


def draw_texts(count: int) -> list[str]:
    """Texts of any characters, among them what careless tokenizers change."""
    generator = random.Random(0)
    letters = [*"aB 0é\u0301漢😀\u200d\t\n\r\x00", "\u2028", "ﬁ", "  ", "'s", DOCUMENT_TOKEN, "def f(x):\n    return x"]
    anything = [chr(generator.choice([*range(0xD800), *range(0xE000, 0x110000)])) for _ in range(200)]
    return ["", *("".join(generator.choices([*letters, *anything], k=20)) for _ in range(count))]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    texts = draw_texts(40)
    bpe = train_bpe("gpt2", [*texts, (Path(__file__)).read_text(encoding="utf-8")], 400)
    tokenizers = {"bytes": Tokenizer.of_bytes(), "bpe": Tokenizer(bpe.to_str().encode())}
    checks: dict[str, Any] = {}
    expected = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for kind, overrides in MODEL_KINDS.items():
        name = kind.replace(" ", "_")
        tokenizer = tokenizers[FULLY.get(kind, "bytes")]
        # With a decay of every kind.
        decay = "exponent" if len(kind) % 2 else "[1.5,7]"
        model = write_hub_model(
            folder / name, tokenizer, *overrides, f"model.retention.decay={decay}", template=TEMPLATE
        )
        expected[name] = expect_logits(model, tokenizer)
        checks[name] = {}
        if kind in FULLY:
            checks[name] = {
                "texts": {text: [tokenizer.document_token, *tokenizer.encode(text)] for text in texts},
                "prompt": "A model of né",
            }
            expected[name]["greedy"] = expect_greedy(model, tokenizer, checks[name]["prompt"], 6)
            expected[name] |= expect_gradients(model, expected[name]["tokens"])
    torch.set_num_threads(threads)
    write_checks(folder, checks, expected)
    return folder


@pytest.fixture(scope="module", params=TRANSFORMERS)
def found(request: pytest.FixtureRequest, exports: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the child process of one version of transformers found."""
    environment = make_transformers(request.param)
    result = run_in_environment(environment, [SCRIPT, exports], tmp_path_factory.mktemp("home"), timeout=240)
    assert result.returncode == 0, result.stderr[-4000:]
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert answer["transformers"] == request.param and answer["package"] is False
    return answer


def named(kind: str) -> str:
    return kind.replace(" ", "_")


@pytest.mark.slow
def test_every_kind_of_model_gives_the_trainers_logits_to_the_last_bit(found: dict[str, Any]) -> None:
    for kind in MODEL_KINDS:
        logits = found[named(kind)]["logits"]
        assert set(logits) == ({"latent"} if "plain" in kind else {"latent", "ternary"})
        assert set(logits.values()) == {0.0}, (kind, logits)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FULLY)
def test_texts_have_the_trainers_tokens_behind_the_document_token(kind: str, found: dict[str, Any]) -> None:
    tokenizer = found[named(kind)]["tokenizer"]
    assert tokenizer["wrong"] == tokenizer["back"] == []
    assert tokenizer["keys"] == ["attention_mask", "input_ids"] and tokenizer["side"] == "left"
    assert tokenizer["names"] == [DOCUMENT_TOKEN] * 3
    assert tokenizer["chat"] == f"{DOCUMENT_TOKEN}<user> né\n<a> "
    assert tokenizer["chat_ids"][0] == (0 if FULLY[kind] == "bpe" else 256)
    assert tokenizer["chat_ids"].count(tokenizer["chat_ids"][0]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", FULLY)
def test_pieces_pads_and_packing_change_no_logits(kind: str, found: dict[str, Any]) -> None:
    """But for the head's product, whose sums depend on the number of rows."""
    cache = found[named(kind)]["cache"]
    for name in ("chunked", "padded", "padded without cache", "packed"):
        assert cache[name] <= 2e-6, (name, cache[name])
    assert cache["chunkwise"] <= 0.02
    assert cache["seen"] == 70 and len(set(cache["sizes"])) == 1
    assert "pad on the left" in cache["right"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", FULLY)
def test_generation_writes_what_this_package_writes(kind: str, found: dict[str, Any], exports: Path) -> None:
    generation = found[named(kind)]["generation"]
    assert generation.pop("greedy") == load_file(exports / f"{named(kind)}.safetensors")["greedy"].tolist()
    assert generation.pop("assisted").startswith("ValueError: assisted generation is not supported")
    samples = generation.pop("samples")
    assert samples[0] == samples[1] and samples[0][0] == 3
    assert generation == dict.fromkeys(generation, True) and len(generation) == 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", FULLY)
def test_training_has_this_packages_loss_and_gradients(kind: str, found: dict[str, Any]) -> None:
    training = found[named(kind)]["training"]
    assert training["loss"] <= 1e-6 and training["gradient"] <= 1e-5
    assert training["unexpected"] == [] and training["unmoved"] == []
    assert training["checkpointed"] <= 1e-7 and 0 < training["trainer"] < 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", FULLY)
def test_saved_models_are_the_same_and_packed_ones_refuse_training(kind: str, found: dict[str, Any]) -> None:
    saving = found[named(kind)]["saving"]
    for flavor in found[named(kind)]["logits"]:
        assert saving[flavor] == 0 and saving[f"{flavor} base"] == [2, 70, 40]
        assert saving[f"{flavor} bf16"] < 0.5 and saving[f"{flavor} bf16 dtype"] == ["torch.bfloat16", True]
    assert "packed ternary codes, which cannot be trained" in found[named(kind)]["packed training"]
