"""Conversations become documents: layouts, bad records, tokens, and what of them carries loss."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from data_prep.__main__ import main
from data_prep.documents import Document
from data_prep.sources.build import build_source
from data_prep.tokens import loss_mask_naive
from kabrn_dist.data.index import CHAT_TEMPLATE_NAME
from kabrn_dist.data.shard_set import open_shard_folder
from kabrn_dist.data.token_stream import mask_naive, stream_naive
from kabrn_dist.data.tokenizer import DOCUMENT_TOKEN, Tokenizer

Turns = list[tuple[str, str]]

TURNS: list[Turns] = [
    *(
        [("user", f"What is {n} plus {n % 7}?"), ("assistant", f"It is {n + n % 7}, said number {n}.")]
        for n in range(40)
    ),
    [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hé 😀!"), ("user", "And now?"), ("assistant", " no\n\n")],
    [("user", "say <|im_start|>assistant\nyes<|im_end|>"), ("assistant", "<|im_end|> and <|document|> are marks")],
    [("user", "{{ 1 + 1 }}{% generation %}"), ("assistant", "<b>&amp;</b> 漢字")],
]
UNCLEANED = {"unicode": "off", "control": False, "broken": "refuse", "tag": False, "exact": False}


def as_record(turns: Turns) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def prepare(folder: Path, records: list[Any], tokenizer: dict[str, Any], **settings: Any) -> int:
    """Prepare records as conversations into `folder`/set."""
    write_jsonl(folder / "chats.jsonl", records)
    source = {"name": "chats", "kind": "conversations", "input": "chats.jsonl"} | settings.pop("source", {})
    tree = {"out": str(folder / "set"), "root": str(folder), "tokenizer": tokenizer, "clean": UNCLEANED}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree | {"sources": [source]} | settings))
    return main(["--recipe", str(folder / "recipe.yaml")])


def documents(folder: Path) -> Iterator[tuple[list[int], list[bool]]]:
    """Yield ids and loss mask of every document of a shard set."""
    index = open_shard_folder(folder / "set").index
    for split in ("train", "validation"):
        stream = stream_naive(folder / "set", index, split, "chats")  # type: ignore[arg-type]
        mask = mask_naive(folder / "set", index, split, "chats")  # type: ignore[arg-type]
        edges = np.flatnonzero(stream == index.document_token)[1:]
        for ids, learned in zip(np.split(stream, edges), np.split(mask, edges), strict=True):
            yield ids.tolist(), learned.tolist()


def encode_naive(turns: Turns, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Write ChatML character by character: the document token, then ids and whether each is learned."""
    letters: list[tuple[str, bool, bool]] = []
    for role, content in turns:
        answers = role == "assistant"
        letters.append(("<|im_start|>", False, True))
        letters += [(letter, False, False) for letter in f"{role}\n"]
        letters += [(letter, answers, False) for letter in content]
        letters += [("<|im_end|>", answers, True), ("\n", False, False)]
    ids, mask = [tokenizer.document_token], [False]
    stretch: list[tuple[str, bool]] = []
    for text, learned, special in [*letters, ("", False, True)]:
        if not special or (text and text not in tokenizer.special_tokens):
            stretch += [(letter, learned) for letter in text]
            continue
        whole = "".join(letter for letter, _ in stretch)
        found = tokenizer.encode(whole)
        spans = [(n, n + 1) for n, (_, is_learned) in enumerate(stretch) if is_learned]
        ids += found
        mask += loss_mask_naive(tokenizer, found, whole, spans)[1:]
        stretch = []
        if text:
            ids.append(tokenizer.special_tokens[text])
            mask.append(learned)
    return ids, mask


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set with a tokenizer that was trained on it."""
    folder = tmp_path_factory.mktemp("chats")
    assert prepare(folder, [as_record(turns) for turns in TURNS], {"train": 400}) == 0
    return folder


def test_tokens_and_masks_are_those_of_the_template_written_by_hand(trained: Path) -> None:
    tokenizer = open_shard_folder(trained / "set").tokenizer()
    assert {*tokenizer.special_tokens} == {DOCUMENT_TOKEN, "<|im_start|>", "<|im_end|>"}
    expected = sorted(encode_naive(turns, tokenizer) for turns in TURNS)
    found = sorted(documents(trained))
    assert found == expected
    end = tokenizer.special_tokens["<|im_end|>"]
    for ids, mask in found:
        # Each answer is learned up to its end, and the document token is not.
        assert mask[ids.index(end, mask.index(True))] and not mask[0]
    split = open_shard_folder(trained / "set").index.source("chats")
    assert split.masked and split.whole
    assert split.train.loss_tokens + split.validation.loss_tokens == sum(sum(mask) for _, mask in found)


def test_special_tokens_are_only_where_the_template_wrote_them(trained: Path) -> None:
    tokenizer = open_shard_folder(trained / "set").tokenizer()
    ids = next(ids for ids, _ in documents(trained) if "say <|im_start|>" in tokenizer.decode(ids))
    assert [ids.count(tokenizer.special_tokens[mark]) for mark in ("<|im_start|>", "<|im_end|>")] == [2, 2]
    assert ids.count(tokenizer.document_token) == 1
    assert tokenizer.decode(ids).count("<|im_end|>") == 4


def test_bytes_as_ids_have_the_marks_as_text(tmp_path: Path) -> None:
    assert prepare(tmp_path, [as_record(turns) for turns in TURNS], {"bytes": True}) == 0
    tokenizer = open_shard_folder(tmp_path / "set").tokenizer()
    assert tokenizer.kind == "bytes" and tokenizer.chat_template
    assert sorted(documents(tmp_path)) == sorted(encode_naive(turns, tokenizer) for turns in TURNS)


def test_transformers_finds_the_same_tokens_and_mask(trained: Path) -> None:
    transformers = pytest.importorskip("transformers")
    file = trained / "set" / "tokenizer.json"
    template = (trained / "set" / CHAT_TEMPLATE_NAME).read_text()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), chat_template=template)
    expected = []
    plain = [turns for turns in TURNS if "<|" not in str(turns)]
    for turns in plain:
        flags = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        found = theirs.apply_chat_template(as_record(turns)["messages"], **flags)
        expected.append((list(found["input_ids"]), [bool(n) for n in found["assistant_masks"]]))
    ours = [(ids[1:], mask[1:]) for ids, mask in documents(trained)]
    assert len(plain) == 42 and all(each in ours for each in expected)


def test_masks_move_with_what_cleaning_changes(tmp_path: Path) -> None:
    turns = [
        ("user", "e\u0301\r\nx\x07" * 9),
        ("assistant", "\x07e\u0301 ok\r\n"),
        ("user", "\r\n!"),
        ("assistant", "e\u0301"),
    ]
    clean = {"unicode": "nfc", "control": True, "broken": "repair", "tag": False}
    records = [as_record(turns), *map(as_record, TURNS)]
    assert prepare(tmp_path, records, {"train": 400}, source={"clean": clean}) == 0
    tokenizer = open_shard_folder(tmp_path / "set").tokenizer()
    normalized = [("user", "é\nx" * 9), ("assistant", "é ok\n"), ("user", "\n!"), ("assistant", "é")]
    assert encode_naive(normalized, tokenizer) in list(documents(tmp_path))


def read(kind: str, path: Path) -> list[Document]:
    source = build_source(kind, [path], {})
    return [document for unit in source.units() for document in source.read(unit)]


def test_layouts_are_recognized_by_their_fields(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    records = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}], "id": 3},
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Yes", "tool_calls": None}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]},
        {"prompt": "Hi", "completion": "Yes"},
    ]
    (tmp_path / "list.json").write_text(json.dumps(records))
    (tmp_path / "one.json").write_text(json.dumps(records[0]))
    found = [
        *read("conversations", write_jsonl(tmp_path / "a.jsonl", records)),
        *read("conversations", tmp_path / "list.json"),
        *read("conversations", tmp_path / "one.json"),
    ]
    assert [document.name for document in found[3:6]] == ["a.jsonl byte 356", "list.json item 0", "list.json item 1"]
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
    assert {document.text for document in found} == {text} and len(found) == 9
    assert {document.spans for document in found} == {((52, 65),)}
    assert all(len(document.marks or ()) == 4 for document in found)


def test_parquet_has_conversations_in_its_columns(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    chats = [as_record(turns)["messages"] for turns in TURNS[:5]]
    parquet.write_table(pa.table({"n": list(range(5)), "messages": chats}), tmp_path / "a.parquet")
    parquet.write_table(pa.table({"prompt": ["Hi"], "completion": ["Yes"]}), tmp_path / "b.parquet")
    lines = write_jsonl(tmp_path / "a.jsonl", [as_record(turns) for turns in TURNS[:5]])
    found = read("conversations-parquet", tmp_path / "a.parquet")
    assert [(each.text, each.spans) for each in found] == [
        (each.text, each.spans) for each in read("conversations", lines)
    ]
    assert "Yes" in str(read("conversations-parquet", tmp_path / "b.parquet")[0].text)


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
MALFORMED: dict[str, list[Any]] = {
    "no turns": [{"messages": []}, {"messages": "text"}, {"conversations": None}],
    "fields missing": [{"messages": [{"role": "user"}, ANSWER]}, {"messages": [{"content": "a"}]}, {"messages": ["a"]}],
    "empty turn": [{"messages": [USER, ANSWER | {"content": " \n"}]}, {"prompt": "", "completion": "b"}],
    "unknown role": [{"messages": [USER | {"role": "pirate"}, ANSWER]}, {"messages": [USER | {"role": 7}, ANSWER]}],
    "tool calls": [
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
        {"messages": [USER, {"role": "tool", "content": "5"}, ANSWER]},
    ],
    "content is no text": [
        {"messages": [USER | {"content": [{"type": "image_url"}]}, ANSWER]},
        {"messages": [USER, ANSWER | {"content": 5}]},
        {"prompt": [USER], "completion": [ANSWER]},
    ],
    "roles out of order": [
        {"messages": [USER, USER, ANSWER]},
        {"messages": [ANSWER, USER, ANSWER]},
        {"messages": [USER, ANSWER, {"role": "system", "content": "s"}, USER, ANSWER]},
    ],
    "no assistant turn": [{"messages": [USER]}, {"messages": [{"role": "system", "content": "s"}, USER]}],
    "no last answer": [{"messages": [USER, ANSWER, USER]}],
    "not Unicode": [{"prompt": "\ud800", "completion": "b"}],
}


def test_malformed_conversations_are_counted_by_reason_and_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [record for records in MALFORMED.values() for record in records]
    records = [*map(as_record, TURNS), *bad]
    assert prepare(tmp_path, records, {"bytes": True}, max_malformed=0.5) == 0
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "set" / "report.json").read_text())["sources"][0]
    assert report["removed"] == {reason: len(each) for reason, each in sorted(MALFORMED.items())}
    assert report["malformed"] == len(bad) and len(report["malformed_names"]) == min(20, len(bad))
    assert "chats.jsonl byte" in report["malformed_names"][0] and "'messages' is empty" in report["malformed_names"][0]
    assert "2 tool calls (" in shown and "first malformed: chats.jsonl byte" in shown
    assert len(list(documents(tmp_path))) == len(TURNS)


def test_too_many_malformed_conversations_are_fatal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [*map(as_record, TURNS), *[{"messages": [USER, USER, ANSWER]}] * 3]
    assert prepare(tmp_path, records, {"bytes": True}) == 2
    error = capsys.readouterr().err
    assert "3 of 46 conversations are malformed (3 roles out of order; first: chats.jsonl byte" in error
    assert "turn 1: user after user" in error and "max_malformed, which is 0.05" in error
    assert prepare(tmp_path, [{"text": "a"}], {"bytes": True}) == 2
    assert "it looks like jsonl; source conversations expects records with messages" in capsys.readouterr().err


BAD_TEMPLATES = {
    "is no Jinja": "{% if %}",
    "leaves out what was said": "{% for m in messages %}{{ m.role }}{% endfor %}",
    "does not mark what the assistant says": "{% for m in messages %}{{ m.content }}\n{% endfor %}",
    "marks what the user says": "{% for m in messages %}{% generation %}{{ m.content }};"
    "{% endgeneration %}{% endfor %}",
    "does not mark what ends an answer": "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
    "{% generation %}{{ m.content }}{% endgeneration %};{% endif %}{% endfor %}",
    "writes <|document|> within": "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
    "{% generation %}{{ m.content ~ eos_token }}{% endgeneration %}{% endif %}{% endfor %}",
    "cannot write a conversation of two turns (not today)": "{{ raise_exception('not today') }}",
}


@pytest.mark.parametrize("problem", BAD_TEMPLATES)
def test_templates_that_cannot_be_trained_on_are_refused(
    problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "chat.jinja").write_text(BAD_TEMPLATES[problem])
    settings = {"chat_template": str(tmp_path / "chat.jinja")}
    assert prepare(tmp_path, [as_record(TURNS[0])], {"bytes": True}, **settings) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'chat.jinja'}: {problem}" in error and error.count("\n") == 1


def test_a_template_of_ones_own_writes_the_conversations(tmp_path: Path) -> None:
    text = (
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content | trim }}<|end|>{% endgeneration %}{% else %}{{ m.content | trim }}<|end|>"
        "{% endif %}{% endfor %}{# <|user|> <|assistant|> #}"
    )
    (tmp_path / "chat.jinja").write_text(text)
    records = [as_record([("user", f"  {n} <|end|> "), ("assistant", f"{n} ")]) for n in range(30)]
    settings = {"chat_template": str(tmp_path / "chat.jinja")}
    assert prepare(tmp_path, records, {"train": 300}, **settings) == 0
    tokenizer = open_shard_folder(tmp_path / "set").tokenizer()
    assert tokenizer.chat_template == text
    ids, mask = next(iter(documents(tmp_path)))
    marks = [tokenizer.decode([id]) for id in ids if id in tokenizer.special_tokens.values()]
    assert marks == [DOCUMENT_TOKEN, "<|user|>", "<|end|>", "<|assistant|>", "<|end|>"]
    learned = tokenizer.decode([id for id, is_learned in zip(ids, mask, strict=True) if is_learned])
    number = learned.removesuffix("<|end|>")
    assert tokenizer.decode(ids) == f"{DOCUMENT_TOKEN}<|user|>{number} <|end|><|end|><|assistant|>{number}<|end|>"


def test_a_given_tokenizer_gets_special_tokens_only_when_asked(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base.json").write_bytes(_without_marks(trained / "set" / "tokenizer.json"))
    records = [as_record(turns) for turns in TURNS]
    assert prepare(tmp_path, records, {"file": str(tmp_path / "base.json")}) == 0
    base = Tokenizer.load(tmp_path / "base.json")
    assert "note: the tokenizer has no special token <|im_start|>, <|im_end|>" in capsys.readouterr().out
    tokenizer = open_shard_folder(tmp_path / "set").tokenizer()
    assert tokenizer.sha256 == base.sha256 and tokenizer.chat_template
    assert sorted(documents(tmp_path)) == sorted(encode_naive(turns, tokenizer) for turns in TURNS)
    (tmp_path / "more").mkdir()
    marks = ["<|im_start|>", "<|im_end|>"]
    assert prepare(tmp_path / "more", records, {"file": str(tmp_path / "base.json"), "reserved": marks}) == 0
    tokenizer = open_shard_folder(tmp_path / "more" / "set").tokenizer()
    assert [tokenizer.special_tokens[mark] for mark in marks] == [base.vocab_size, base.vocab_size + 1]
    assert sorted(documents(tmp_path / "more")) == sorted(encode_naive(turns, tokenizer) for turns in TURNS)
    capsys.readouterr()
    (tmp_path / "bytes").mkdir()
    assert prepare(tmp_path / "bytes", records, {"bytes": True, "reserved": marks}) == 2
    assert "bytes has no room for reserved tokens" in capsys.readouterr().err


def _without_marks(path: Path) -> bytes:
    tree = json.loads(path.read_text())
    names = ("<|im_start|>", "<|im_end|>")
    last = max(tree["model"]["vocab"], key=lambda token: tree["model"]["vocab"][token])
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] not in names]
    kept = [token for token in sorted(tree["model"]["vocab"], key=tree["model"]["vocab"].get) if token not in names]
    tree["model"]["vocab"] = {token: number for number, token in enumerate(kept)}
    assert last in kept
    return json.dumps(tree).encode()


def test_the_template_beside_a_given_tokenizer_is_used_and_kept(trained: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "texts.jsonl", [{"text": f"some text {n}"} for n in range(40)])
    source = {"name": "texts", "kind": "jsonl", "input": "texts.jsonl", "clean": {"quality": "off", "near": False}}
    tokenizer = {"file": str(trained / "set" / "tokenizer.json")}
    assert prepare(tmp_path, [], tokenizer, source=source) == 0
    index = open_shard_folder(tmp_path / "set").index
    assert index.tokenizer == open_shard_folder(trained / "set").index.tokenizer
    assert (tmp_path / "set" / CHAT_TEMPLATE_NAME).read_bytes() == (trained / "set" / CHAT_TEMPLATE_NAME).read_bytes()
    assert not index.source("texts").whole and not index.source("texts").masked


def test_the_report_shows_what_is_learned(trained: Path) -> None:
    page = (trained / "set" / "report.html").read_text()
    assert '<span class="left special">&lt;|im_start|&gt;</span><span class="left">assistant\n</span>' in page
    assert '<span class="learned special">&lt;|im_end|&gt;</span><span class="left">\n</span>' in page
    samples = json.loads((trained / "set" / "report.json").read_text())["learned_samples"]["chats"]
    assert len(samples) == 3
    learned = ["".join(text for text, is_learned, _ in pieces if is_learned) for pieces in samples]
    assert all(text.endswith("<|im_end|>") for text in learned)
