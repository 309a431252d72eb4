"""Adapters in `mixkabrn serve`: chosen by name, loaded and unloaded while it runs, and never mixed up."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from kabrn_dist.adapters.adapter import Adapter
from kabrn_dist.adapters.folder import read_adapter, write_adapter
from kabrn_dist.runtime.adapter_file import encode_adapter, write_adapter_file
from kabrn_dist.runtime.model_file import read_model_file
from kabrn_dist.runtime.native import NativeModel
from kabrn_dist.runtime.server.adapters import AdapterReader, AdapterSet
from kabrn_dist.runtime.server.errors import RequestError
from kabrn_dist.utils.errors import UserError
from tests.support.native_adapters import draw_low_ranks, draw_states, patch_between
from tests.support.runs import ROOT
from tests.support.servers import ServerProcess, pack_small_model, start_server

NAMES = ("lora", "state", "patch")
QUESTION = "What is the best way to learn a language?"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_small_model(tmp_path_factory.mktemp("adapters") / "small.mkb")


@pytest.fixture(scope="module")
def adapters(model: Path) -> Path:
    """A folder with an adapter of each method, and one in the runtime's own format."""
    folder, file = model.parent / "adapters", read_model_file(model)
    other = read_model_file(pack_small_model(model.parent / "other.mkb", "run.seed=9"))
    found: dict[str, Adapter] = {
        "lora": draw_low_ranks(file, size=1.0),
        "state": draw_states(file),
        "patch": patch_between(file, other),
        "foreign": draw_low_ranks(other),
    }
    for name, adapter in found.items():
        write_adapter(adapter, folder / name)
    write_adapter_file(found["lora"], file, folder / "lora.mka")
    return folder


@pytest.fixture(scope="module")
def server(model: Path, adapters: Path) -> Iterator[ServerProcess]:
    given = [option for name in NAMES for option in ("--adapter", f"{name}={adapters / name}")]
    with start_server(model, "--contexts", "2", "--max-tokens", "100000", *given) as server:
        yield server


@pytest.fixture
def changing(model: Path, adapters: Path) -> Iterator[ServerProcess]:
    with start_server(model, "--contexts", "1", "--adapter-folder", str(adapters)) as server:
        yield server


def answer(server: ServerProcess, name: str, *texts: str, **fields: Any) -> dict[str, Any]:
    return server.chat(*(texts or (QUESTION,)), model=name, **fields)


def text_of(content: dict[str, Any]) -> str:
    return str(content["choices"][0]["message"]["content"])


def load(server: ServerProcess, name: str, path: str, **fields: Any) -> tuple[int, Any]:
    status, _, content = server.request(
        "POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path, **fields}
    )
    return status, content


def unload(server: ServerProcess, name: str) -> tuple[int, Any]:
    status, _, content = server.request("POST", "/v1/unload_lora_adapter", {"lora_name": name})
    return status, content


def greedy_text(model: Path, adapter: Path | None, weight: float = 1.0, tokens: int = 24) -> str:
    """What the runtime answers to the question without a server."""
    with NativeModel(model) as native, native.context() as context:
        if adapter is not None:
            content = encode_adapter(read_adapter(adapter), read_model_file(model))
            context.set_adapters([(native.adapter(content), weight)])
        context.set_sampling(temperature=0)
        prompt = f"User: {QUESTION}\nAssistant:"
        logits = context.decode([native.info.document_token, *native.tokenize(prompt)])
        found = b""
        for _ in range(tokens):
            assert logits is not None
            token = context.sample(logits)
            found += native.token_bytes(token)
            logits = context.decode([token])
    return found.decode("utf-8", "replace").lstrip()


def test_the_client_of_openai_chooses_an_adapter_by_its_name(
    server: ServerProcess, model: Path, adapters: Path
) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30)
    assert [found.id for found in client.models.list()] == ["small", *NAMES]
    about: Any = client.models.retrieve("lora")
    assert about.parent == "small" and about.root == "café" and about.meta["method"] == "lora"
    assert f"adapters: {', '.join(NAMES)}" in server.shown
    question: Any = [{"role": "user", "content": QUESTION}]
    found = {}
    for name in ("small", *NAMES):
        whole = client.chat.completions.create(model=name, messages=question, temperature=0, max_tokens=24)
        assert whole.model == name
        found[name] = whole.choices[0].message.content or ""
        pieces = client.chat.completions.create(
            model=name, messages=question, temperature=0, max_tokens=24, stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == found[name]
        expected = greedy_text(model, None if name == "small" else adapters / name)
        assert found[name].rstrip("\ufffd") == expected.rstrip("\ufffd")
    assert len(set(found.values())) == 4
    completion = client.completions.create(model="state", prompt="Once", temperature=0, max_tokens=12)
    base = client.completions.create(model="small", prompt="Once", temperature=0, max_tokens=12)
    assert completion.choices[0].text != base.choices[0].text
    with pytest.raises(openai.NotFoundError, match="there is small, lora, state, patch"):
        client.chat.completions.create(model="lorry", messages=question)


def test_states_of_one_adapter_are_never_those_of_another(server: ServerProcess, model: Path) -> None:
    names = ("small", *NAMES)
    said: dict[str, list[str]] = {name: [QUESTION] for name in names}
    with start_server(
        model, "--cache", "0", *(o for n in NAMES for o in ("--adapter", f"{n}={model.parent / 'adapters' / n}"))
    ) as forgetful:
        for turn in range(3):
            for name in names:
                kept, plain = answer(server, name, *said[name]), answer(forgetful, name, *said[name])
                assert kept["choices"] == plain["choices"], (name, turn)
                details = kept["usage"]["prompt_tokens_details"]
                if turn:
                    assert kept["usage"]["prompt_tokens"] - details["cached_tokens"] == len(" And?\nAssistant:")
                said[name] += [text_of(kept), "And?"]
    # The same conversation, which another adapter has read, is read anew.
    assert answer(server, "small", "Only the lora has read this sentence.")["usage"]
    usage = answer(server, "lora", "Only the lora has read this sentence.")["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0


def test_many_clients_with_different_adapters_get_what_each_asked_for(server: ServerProcess) -> None:
    names = ("small", *NAMES)
    expected = {name: text_of(answer(server, name)) for name in names}
    with ThreadPoolExecutor(8) as threads:
        wanted = [names[number % 4] for number in range(48)]
        found = list(threads.map(lambda name: text_of(answer(server, name)), wanted))
    assert found == [expected[name] for name in wanted]


def test_adapters_are_loaded_and_unloaded_while_it_runs(changing: ServerProcess, adapters: Path) -> None:
    def list_models() -> list[str]:
        return [found["id"] for found in changing.request("GET", "/v1/models")[2]["data"]]

    base = text_of(answer(changing, "small"))
    assert list_models() == ["small"]
    assert load(changing, "a", "lora")[0] == load(changing, "b", str(adapters / "lora.mka"))[0] == 200
    assert load(changing, "half", "lora", weight=0.5)[0] == 200
    assert list_models() == ["small", "a", "b", "half"]
    found = {name: text_of(answer(changing, name)) for name in ("a", "b", "half")}
    assert found["a"] == found["b"] != base and found["half"] not in (base, found["a"])
    status, content = load(changing, "a", "state")
    assert status == 400 and "adapter a: is loaded already" in content["error"]["message"]
    assert load(changing, "a", "state", load_inplace=True)[0] == 200
    # States of the adapter that had the name before are not found.
    fresh = answer(changing, "a")
    assert fresh["usage"]["prompt_tokens_details"]["cached_tokens"] == 0 and text_of(fresh) != found["a"]
    assert unload(changing, "a")[0] == 200 and list_models() == ["small", "b", "half"]
    status, content = unload(changing, "a")
    assert status == 404 and content["error"]["param"] == "lora_name"
    status, _, content = changing.request("POST", "/v1/completions", {"prompt": "a", "model": "a"})
    assert status == 404 and content["error"]["code"] == "model_not_found"
    assert text_of(answer(changing, "small")) == base == text_of(answer(changing, ""))


def test_an_answer_that_is_running_is_finished_by_its_adapter_after_it_is_unloaded(
    changing: ServerProcess, adapters: Path
) -> None:
    assert load(changing, "once", "lora")[0] == 200
    expected = text_of(answer(changing, "once", max_tokens=3000))
    body = {"messages": [{"role": "user", "content": QUESTION}], "model": "once", "temperature": 0}
    content = json.dumps({**body, "max_tokens": 3000, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", changing.port), timeout=30) as connection:
        connection.sendall(head.encode() + content)
        found = connection.recv(200)
        assert found.startswith(b"HTTP/1.1 200")
        assert unload(changing, "once")[0] == 200
        while b"[DONE]" not in found:
            piece = connection.recv(1 << 16)
            assert piece
            found += piece
    events = [part.split(b"data: ", 1)[1] for part in found.split(b"\n\n") if b"data: {" in part]
    choices = [json.loads(event[: event.rindex(b"}") + 1])["choices"][0] for event in events]
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == expected
    kept = changing.request("GET", "/v1/models")[2]["data"][0]["meta"]["kept_states"]
    assert kept == 0, "states that nobody can ask for"
    assert load(changing, "once", "lora")[0] == 200
    assert answer(changing, "once")["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_clients_load_nothing_from_outside_of_the_folder(
    changing: ServerProcess, server: ServerProcess, adapters: Path, model: Path
) -> None:
    outside = shutil.copytree(adapters / "lora", model.parent / "outside", dirs_exist_ok=True)
    link = adapters / "link"
    if not link.is_symlink():
        link.symlink_to(outside)
    for path in ("../outside", str(outside), "link", "/etc/passwd", "", ".", "..", "lora/../../outside"):
        status, content = load(changing, "x", path)
        assert status == 403 and "does not lie below" in content["error"]["message"], path
    for fields, words in (
        ({"lora_path": "nothing"}, "no such file"),
        ({"lora_path": "foreign"}, "small.mkb"),
        ({"lora_path": "a\0b"}, "lora_path: "),
        ({"lora_path": 5}, "lora_path: is a number"),
        ({"lora_path": "patch", "weight": 0.5}, "have no weight"),
        ({"lora_path": "lora", "weight": "big"}, "weight: is a text"),
        ({"lora_path": "lora", "lora_name": "small"}, "is the name of the model"),
        ({"lora_path": "lora", "lora_name": "a b"}, "a name has 1 to 100"),
        ({"lora_path": "lora", "lora_name": ""}, "a name has 1 to 100"),
        ({"lora_path": "lora", "lora_name": None}, "lora_name: is missing"),
    ):
        body = {"lora_name": "x", **fields}
        status, _, content = changing.request("POST", "/v1/load_lora_adapter", body)
        assert status == 400 and words in content["error"]["message"], (fields, content)
    assert len(changing.request("GET", "/v1/models")[2]["data"]) == 1
    # A server without a folder changes nothing.
    for path in ("load", "unload"):
        status, _, content = server.request("POST", f"/v1/{path}_lora_adapter", {"lora_name": "lora"})
        assert status == 403 and "--adapter-folder" in content["error"]["message"]
    assert server.request("GET", "/v1/load_lora_adapter")[0] == 405


def test_threads_may_load_and_unload_at_once(model: Path, adapters: Path) -> None:
    with NativeModel(model) as native:
        found = AdapterSet("small", AdapterReader(native, model).open, adapters, strict=True)
        errors: list[Exception] = []

        def change(number: int) -> None:
            try:
                for _ in range(10):
                    found.load(f"n{number}", adapters / "lora")
                    assert found.find(f"n{number}") is not None
                    assert not found.unload(f"n{number}").loaded
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=change, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors and found.list() == []
        with pytest.raises(RequestError, match="there is no 'n1'"):
            found.find("n1")
        with pytest.raises(UserError, match="is the name of the model"):
            found.load("small", adapters / "lora")


def test_mistakes_in_the_options_are_one_line(model: Path, adapters: Path, tmp_path: Path) -> None:
    for options, words in (
        (["--adapter", "lora"], "--adapter lora: no name or no path"),
        (["--adapter", f"x={tmp_path}/none"], "no such file"),
        (["--adapter", f"x={adapters / 'foreign'}"], "small.mkb"),
        (["--adapter", f"x={adapters / 'lora'}=nan"], "'nan' is no weight"),
        (["--adapter", f"x={adapters / 'patch'}=2"], "have no weight"),
        (["--adapter", f"small={adapters / 'lora'}"], "is the name of the model"),
        (["--adapter", f"x={adapters / 'lora'}", "--adapter", f"x={adapters / 'state'}"], "is loaded already"),
        (["--adapter-folder", str(tmp_path / "none")], "no such folder"),
    ):
        command = [sys.executable, "-m", "kabrn_dist", "serve", str(model), "--port", "0", *options]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, (options, done)
