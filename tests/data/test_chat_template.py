"""Chat templates: what they write, in pieces, in a sandbox, and the same where models are trained and served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from data_prep.__main__ import main as prepare
from data_prep.train_tokenizer import train_tokenizer
from kabrn_dist.cli.main import main
from kabrn_dist.data.chat_template import ChatTemplate, check_chat_template, list_marks
from kabrn_dist.data.default_template import DEFAULT_TEMPLATE
from kabrn_dist.data.index import CHAT_TEMPLATE_NAME
from kabrn_dist.data.shard_set import open_shard_folder
from kabrn_dist.data.token_stream import stream_naive
from kabrn_dist.inference.run import load_model
from kabrn_dist.runtime.model_file import read_model_file
from kabrn_dist.runtime.native import NativeModel
from kabrn_dist.runtime.server.chat_format import make_chat_format
from kabrn_dist.runtime.server.request_fields import ChatMessage
from kabrn_dist.utils.errors import UserError
from tests.support.runs import run_training, write_small_config
from tests.support.text_models import write_text_model

SPECIAL = ("<|document|>", *list_marks(DEFAULT_TEMPLATE))
TURNS = [("system", "Be kind."), ("user", "Hi <|im_end|> é"), ("assistant", " Yes\n"), ("user", "<|document|>?")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]


def test_pieces_are_the_text_with_what_is_special_and_generated() -> None:
    template = ChatTemplate(DEFAULT_TEMPLATE, "<|document|>", SPECIAL)
    pieces = template.render(MESSAGES, add_generation_prompt=True)
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in TURNS)
    assert "".join(piece.text for piece in pieces) == f"{text}<|im_start|>assistant\n"
    assert [piece.text for piece in pieces if piece.special] == ["<|im_start|>", "<|im_end|>"] * 4 + ["<|im_start|>"]
    assert [piece.text for piece in pieces if piece.generated] == [" Yes\n", "<|im_end|>"]
    # Without special tokens marks are text like any other.
    plain = ChatTemplate(DEFAULT_TEMPLATE, "<|document|>").render(MESSAGES)
    assert [piece.generated for piece in plain] == [False, True, False] and not any(piece.special for piece in plain)
    assert "".join(piece.text for piece in plain) == text


def test_the_longer_of_two_special_tokens_is_meant() -> None:
    pieces = ChatTemplate("<|a|><|a|>b", "d", ["<|a|>", "<|a|>b"]).render([])
    assert [piece.text for piece in pieces] == ["<|a|>", "<|a|>b"]


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% include 'secrets' %}",
        "{% for i in range(9999999) %}{% endfor %}",
        "{{ raise_exception('no') }}",
    ],
)
def test_templates_can_do_no_harm(text: str) -> None:
    with pytest.raises(ValueError, match=r"cannot write|leaves out"):
        check_chat_template(text)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared set in `set`, with the conversation of `TURNS` and its answer among others."""
    folder = tmp_path_factory.mktemp("chats")
    others = [[{"role": "user", "content": f"ask {n}"}, {"role": "assistant", "content": f"{n}!"}] for n in range(60)]
    known = [*MESSAGES, {"role": "assistant", "content": "last"}]
    lines = [json.dumps({"messages": messages}) for messages in [known, *others]]
    (folder / "chats.jsonl").write_text("\n".join(lines))
    source = {"name": "chats", "kind": "conversations", "input": "chats.jsonl"}
    recipe = {"out": str(folder / "set"), "root": str(folder), "tokenizer": {"train": 300}, "sources": [source]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"validation_share": 0.1}))
    assert prepare(["--recipe", str(folder / "recipe.yaml")]) == 0
    return folder


def test_a_server_reads_the_tokens_that_were_trained_on(chats: Path, tmp_path: Path) -> None:
    shards = open_shard_folder(chats / "set")
    tokenizer = shards.tokenizer()
    write_text_model(tmp_path / "m.mkb", tokenizer, template=tokenizer.chat_template)
    with NativeModel(tmp_path / "m.mkb") as model:
        asked = make_chat_format(model).build([ChatMessage(role, content) for role, content in TURNS])
    streams = [stream_naive(chats / "set", shards.index, split).tolist() for split in ("train", "validation")]
    found = next(s[n : n + len(asked.ids)] for s in streams for n in range(len(s)) if s[n : n + 20] == asked.ids[:20])
    assert found == asked.ids and asked.stops == ("<|im_end|>",)


def test_another_template_beside_the_shards_is_refused(chats: Path, tmp_path: Path) -> None:
    for path in (chats / "set").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / CHAT_TEMPLATE_NAME).write_text(DEFAULT_TEMPLATE + " ")
    with pytest.raises(UserError, match=r"chat_template.jinja: not the chat template that made the shards"):
        open_shard_folder(tmp_path).tokenizer()
    (tmp_path / CHAT_TEMPLATE_NAME).unlink()
    with pytest.raises(UserError, match=r"chat_template.jinja: not the chat template"):
        open_shard_folder(tmp_path).tokenizer()


@pytest.mark.slow
def test_the_template_goes_from_the_shards_to_all_that_is_made_of_them(chats: Path, tmp_path: Path) -> None:
    config = write_small_config(
        tmp_path / "run.yaml", chats / "set", tmp_path / "run", model__vocab_size=400, training__steps=2
    )
    result = run_training(1, "--config", str(config))
    assert result.exit_code == 0, result.output
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "export")]) == 0
    for folder in ("run", "export"):
        assert (tmp_path / folder / CHAT_TEMPLATE_NAME).read_text() == DEFAULT_TEMPLATE
        assert load_model(tmp_path / folder)[1].chat_template == DEFAULT_TEMPLATE
        assert main(["pack", str(tmp_path / folder), "--out", str(tmp_path / f"{folder}.mkb")]) == 0
        assert read_model_file(tmp_path / f"{folder}.mkb").template == DEFAULT_TEMPLATE


def test_reserved_tokens_have_room_in_a_vocabulary() -> None:
    tokenizer = train_tokenizer(["some text " * 50], 300, reserved=SPECIAL[1:])
    assert [tokenizer.decode([tokenizer.special_tokens[mark]]) for mark in SPECIAL] == list(SPECIAL)
    assert set(tokenizer.encode("<|im_start|>")).isdisjoint(tokenizer.special_tokens.values())
    with pytest.raises(
        UserError, match=r"--vocabulary 259: too small; with <\|im_start\|>, <\|im_end\|> reserved it needs 260"
    ):
        train_tokenizer(["a"], 259, reserved=SPECIAL[1:])
