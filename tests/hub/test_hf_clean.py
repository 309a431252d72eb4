"""Exports where only torch and transformers are installed: the trainer's logits, text, and gradients."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from kabrn_dist.data.tokenizer import DOCUMENT_TOKEN, Tokenizer
from tests.hub.test_environments import TRANSFORMERS, make_transformers
from tests.support.environments import run_in_environment
from tests.support.hub_models import expect_gradients, expect_greedy, expect_logits, write_checks, write_hub_model
from tests.support.models import MODEL_KINDS
from tests.support.text_models import train_bpe

SCRIPT = Path(__file__).with_name("clean_check.py")
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a> {% endif %}"
# What is checked in full: every mixer, learned functions on edges and on groups, both kinds of tokenizer.
FULLY = {"hybrid": "bytes", "bspline": "bpe", "plain": "bytes"}


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
            expected[name]["greedy"] = expect_greedy(model, tokenizer, checks[name]["prompt"], 12)
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
