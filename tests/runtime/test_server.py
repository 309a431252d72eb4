"""`mixkabrn serve` over real sockets: OpenAI's client, states of conversations, bad input, clients that go away."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.runs import ROOT
from tests.support.servers import ServerProcess, pack_small_model, start_server

TOKEN = "a-token-of-the-tests-0123"
LONG = ["--max-tokens", "1000000"]
SLOW = {"max_tokens": 20_000, "temperature": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_small_model(tmp_path_factory.mktemp("serve") / "small.mkb")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[ServerProcess]:
    with start_server(model, "--contexts", "1", *LONG) as server:
        yield server


@pytest.fixture
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30)


def wait_until(server: ServerProcess, running: int, waiting: int) -> None:
    deadline, wanted = time.monotonic() + 10, {"status": "ok", "running": running, "waiting": waiting}
    while (health := server.request("GET", "/health")[2]) != wanted:
        assert time.monotonic() < deadline, health
        time.sleep(0.02)


def test_the_client_of_openai_chats(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").owned_by == "mixkabrn"
    question: Any = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hé"}]
    options: Any = {"model": "small", "messages": question, "max_completion_tokens": 30, "temperature": 0, "seed": 1}
    whole = client.chat.completions.create(**options, extra_body={"unknown": [1]})
    choice = whole.choices[0]
    assert whole.usage is not None and whole.usage.completion_tokens <= 30 and choice.message.role == "assistant"
    assert whole.usage.prompt_tokens == len("0Be kind.\n\nUser: Hé\nAssistant:".encode())
    assert choice.finish_reason in ("length", "stop") and choice.message.content
    pieces, usage = "", None
    for chunk in client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        pieces += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert pieces == choice.message.content
    assert usage is not None and usage.total_tokens == whole.usage.total_tokens
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1


def test_the_client_of_openai_completes_texts(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="small", prompt="Once", max_tokens=20, temperature=0)
    pieces = client.completions.create(model="small", prompt=[79, 110, 99, 101], temperature=0, stream=True)
    text = "".join(chunk.choices[0].text for chunk in pieces)
    # A character that the shorter answer's last token begins is shown only by the longer one.
    assert whole.choices[0].text.startswith(text.rstrip("\ufffd")) and len(text) > 3
    assert client.completions.create(model="small", prompt="", max_tokens=3).usage.prompt_tokens == 1  # type: ignore
    drawn = [client.completions.create(model="small", prompt="a", seed=seed).choices[0].text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="small", prompt="a", temperature=9)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_a_stop_string_ends_an_answer_and_is_not_shown(server: ServerProcess) -> None:
    def complete(**fields: Any) -> tuple[str, str]:
        body = {"prompt": "Stop", "temperature": 0, "max_tokens": 60, **fields}
        choice = server.request("POST", "/v1/completions", body)[2]["choices"][0]
        return choice["text"], choice["finish_reason"]

    text, reason = complete()
    assert reason == "length" and len(text) > 20
    stop = text[10:13]
    expected = (text[: text.index(stop)], "stop")
    assert complete(stop=stop) == complete(stop=["never to be found", stop]) == expected
    # What may become a stop string is held back, and shown when it does not.
    assert complete(stop=text[-3:-1] + "never") == (text, "length")
    body = {"prompt": "Stop", "temperature": 0, "max_tokens": 60, "stop": stop, "stream": True}
    events = server.request("POST", "/v1/completions", body)[2].decode().split("\n\n")
    pieces = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == expected[0] and events[-2] == "data: [DONE]"


def test_a_turn_reads_only_its_new_tokens_and_says_the_same_as_without_the_cache(
    server: ServerProcess, model: Path
) -> None:
    with start_server(model, "--contexts", "1", "--cache", "0") as forgetful:
        said: dict[str, list[str]] = {"blue": ["My color is blue."], "red": ["My color is red, and I like it."]}
        for turn in range(3):
            # In turns, so that a state that leaks would be seen.
            for name, texts in said.items():
                answer, plain = server.chat(*texts), forgetful.chat(*texts)
                assert answer["choices"] == plain["choices"], (name, turn)
                usage, without = answer["usage"], plain["usage"]
                cached = usage["prompt_tokens_details"].pop("cached_tokens")
                assert without["prompt_tokens_details"].pop("cached_tokens") == 0 and usage == without
                if turn:
                    # All but " And now?\nAssistant:"; another conversation has none of it.
                    assert usage["prompt_tokens"] - cached == len(" And now?\nAssistant:")
                texts += [answer["choices"][0]["message"]["content"], "And now?"]
        # A turn before is edited: what was said before it is still known.
        edited = server.chat(*said["red"][:2], "Another question")
        new = edited["usage"]["prompt_tokens"] - edited["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert new == len(" Another question\nAssistant:")
        assert edited["choices"] == forgetful.chat(*said["red"][:2], "Another question")["choices"]


def test_a_system_prompt_is_read_once_for_all_conversations(server: ServerProcess) -> None:
    system = {"role": "system", "content": "Answer in few words, and kindly. " * 4}
    for number, text in enumerate(("First", "Second")):
        body = {"messages": [system, {"role": "user", "content": text}], "max_tokens": 1}
        usage = server.request("POST", "/v1/chat/completions", body)[2]["usage"]
        expected = 1 + len(system["content"]) + 2 if number else 0
        assert usage["prompt_tokens_details"]["cached_tokens"] == expected


def test_a_chat_template_writes_the_conversation(tmp_path: Path) -> None:
    template = (
        "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
        "{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
        "{% if messages[0].content == 'no' %}{{ raise_exception('not so') }}{% endif %}"
    )
    model = pack_small_model(tmp_path / "m.mkb", "model.layers=RA", template=template)
    with start_server(model, "--contexts", "1") as server:
        first = server.chat("Hello")
        rendered = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
        assert first["usage"]["prompt_tokens"] == 1 + len(rendered)
        answer = first["choices"][0]["message"]["content"]
        second = server.chat("Hello", answer, "More")["usage"]
        new = second["prompt_tokens"] - second["prompt_tokens_details"]["cached_tokens"]
        assert new == len("<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n")
        status, _, content = server.request("POST", "/v1/chat/completions", {"messages": [user("no")]})
        assert status == 400 and "not so" in content["error"]["message"]
        # A model with attention has room for so many tokens, and says so before it begins.
        body = {"messages": [user("a" * 9000)]}
        status, _, content = server.request("POST", "/v1/chat/completions", body)
        assert status == 400 and content["error"]["code"] == "context_length_exceeded"


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


BAD_BODIES: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{", "is not JSON"),
    "no object": (b"[]", "is a list"),
    "no UTF-8": (b'{"messages": "\xff"}', "is not UTF-8 at byte 14"),
    "deep": (b"[" * 100_000, "is not JSON"),
    "NaN": (b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', "NaN is no number"),
    "infinite": (b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}', "temperature"),
    "no messages": ({}, "messages: is missing"),
    "empty messages": ({"messages": []}, "messages: is empty"),
    "messages of another type": ({"messages": "hi"}, "messages: is a text"),
    "no message": ({"messages": [1]}, "messages[0]: is a number"),
    "role": ({"messages": [{"role": "pirate", "content": "a"}]}, 'messages[0].role: "pirate" is none of'),
    "content": ({"messages": [user(5)]}, "messages[0].content: is a number"),
    "picture": ({"messages": [user([{"type": "image_url", "image_url": {}}])]}, "a part that is no text"),
    "surrogate": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "half of a surrogate pair"),
    "late system": ({"messages": [user("a"), {"role": "system", "content": "b"}]}, "must come before all others"),
    "penalty": ({"messages": [user("a")], "frequency_penalty": 0.5}, "frequency_penalty: 0.5 is not supported"),
    "presence": ({"messages": [user("a")], "presence_penalty": -1}, "presence_penalty: -1 is not supported"),
    "bias": ({"messages": [user("a")], "logit_bias": {"5": 1}}, "logit_bias: {"),
    "no tokens": ({"messages": [user("a")], "max_tokens": 0}, "max_tokens: 0 is less than 1"),
    "true tokens": ({"messages": [user("a")], "max_tokens": True}, "max_tokens: is true or false"),
    "stops": ({"messages": [user("a")], "stop": ["a"] * 100}, "stop: has 100 texts; send at most 16"),
    "empty stop": ({"messages": [user("a")], "stop": ""}, "stop: has a text of another length"),
    "stop": ({"messages": [user("a")], "stop": 5}, "stop: is neither"),
    "n": ({"messages": [user("a")], "n": 2}, "n: 2 is not supported"),
    "tools": ({"messages": [user("a")], "tools": [{}]}, "tools: [{}] is not supported"),
    "seed": ({"messages": [user("a")], "seed": 0.5}, "seed: is a number; send a whole number"),
    "stream": ({"messages": [user("a")], "stream": "yes"}, "stream: is a text; send true or false"),
    "stream options": ({"messages": [user("a")], "stream_options": {"include_usage": 1}}, "include_usage: is a number"),
}


@pytest.mark.parametrize("kind", BAD_BODIES)
def test_bad_requests_are_answered_with_what_is_wrong(kind: str, server: ServerProcess) -> None:
    body, words = BAD_BODIES[kind]
    status, _, content = server.request("POST", "/v1/chat/completions", body)
    error = content["error"]
    assert status == 400 and error["type"] == "invalid_request_error" and words in error["message"], content


def test_what_clients_send_by_custom_is_taken(model: Path) -> None:
    with start_server(model, "--max-tokens", "30") as server:
        content = server.chat("Hello", max_tokens=99_999, frequency_penalty=0, presence_penalty=0.0, logit_bias={})
        assert content["usage"]["completion_tokens"] == 30 and content["choices"][0]["finish_reason"] == "length"
        for temperature in (1e-9, 9.9e-5, 1e-4, 1e-3):
            assert server.chat("Hello", temperature=temperature)["choices"]
        assert server.chat("Hello", temperature=1e-9)["choices"] == server.chat("Hello")["choices"]
        assert server.chat("Hello")["timings"]["prompt_ms"] < 10_000
        assert "1 thread each" in server.shown


def test_an_upgrade_is_answered_without_a_line_in_the_log(model: Path) -> None:
    with start_server(model) as server:
        headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
        assert server.request("GET", "/health", headers=headers)[0] == 200
        assert server.stop() == (0, "stopped\n")


def test_a_model_file_that_is_replaced_is_not_served(tmp_path: Path) -> None:
    model = pack_small_model(tmp_path / "m.mkb")
    with start_server(model) as server:
        assert server.chat("Hello")["choices"]
        model.write_bytes(model.read_bytes())
        for _ in range(2):
            status, _, content = server.request("POST", "/v1/completions", {"prompt": "a"})
            assert status == 503 and content["error"]["code"] == "model_replaced", content
        assert server.request("GET", "/health")[0] == 200
        code, shown = server.stop()
        assert code == 0 and shown.count("m.mkb was replaced while it was served; start the server again") == 1


def test_other_paths_methods_and_prompts_are_answered_too(server: ServerProcess) -> None:
    for prompt in (None, 5, ["a", "b"], [[300]], [-1], [1 << 70], [True]):
        status, _, content = server.request("POST", "/v1/completions", {"prompt": prompt})
        assert status == 400 and content["error"]["message"].startswith("prompt: "), content
    assert server.request("GET", "/v2")[0] == 404 and server.request("GET", "/v1/completions")[0] == 405
    status, headers, content = server.request("POST", "/v1/chat/completions", b" " * (10 << 20))
    assert status == 413 and content["error"]["code"] == "too_large" and headers["x-content-type-options"] == "nosniff"
    # A long prompt that is allowed, with bytes that are no text.
    body = {"prompt": "\x00\ufffd\U0001f600 " * 20_000, "max_tokens": 1}
    assert server.request("POST", "/v1/completions", body)[2]["usage"]["prompt_tokens"] == 1 + 9 * 20_000
    wait_until(server, 0, 0)


def test_only_this_machine_may_ask_and_only_by_its_names(server: ServerProcess, model: Path) -> None:
    assert server.request("GET", "/health", headers={"Host": f"localhost:{server.port}"})[0] == 200
    for headers in (
        {"Host": "evil.example"},
        {"Host": "["},
        {"Host": "evil.example@localhost"},
        {"Origin": "https://evil.example"},
        {"Origin": "http://["},
        {"Origin": "null"},
    ):
        status, found, content = server.request("POST", "/v1/chat/completions", {"messages": []}, headers)
        assert status == 403 and content["error"]["type"] == "permission_error"
        assert "access-control-allow-origin" not in found
    own = {"Origin": server.url, "Host": f"127.0.0.1:{server.port}"}
    assert server.request("POST", "/v1/chat/completions", {"messages": [user("a")], "max_tokens": 1}, own)[0] == 200
    status, headers, page = server.request("GET", "/")
    assert status == 200 and b"<title>MixKABRN</title>" in page and len(page) <= 100_000
    assert "default-src 'none'" in headers["content-security-policy"] and b"https://" not in page


def test_a_token_is_needed_where_others_can_ask(model: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    with start_server(model, "--host", "0.0.0.0", "--token-file", str(tmp_path / "token")) as server:
        assert "with the token" in server.shown and TOKEN not in server.shown
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"Authorization": "Bearer é"}):
            status, found, content = server.request("GET", "/v1/models", headers=header)
            assert status == 401 and found["www-authenticate"] == "Bearer"
            assert content["error"]["code"] == "invalid_api_key"
        assert server.request("GET", "/")[0] == server.request("GET", "/health")[0] == 200
        headers = {"Authorization": f"Bearer {TOKEN}", "Host": "name.of.this.machine"}
        assert server.request("GET", "/v1/models", headers=headers)[0] == 200


def start_answer(server: ServerProcess, **fields: Any) -> socket.socket:
    """Ask for a long answer, and return the connection."""
    body = json.dumps({"messages": [user("go on")], "stream": True, **SLOW, **fields}).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(stream: bool, server: ServerProcess) -> None:
    fields = {"stream": stream, "max_tokens": 1_000_000}
    with start_answer(server, **fields) as running, start_answer(server, **fields):
        if stream:
            assert running.recv(100).startswith(b"HTTP/1.1 200")
        wait_until(server, 1, 1)
    start = time.monotonic()
    wait_until(server, 0, 0)
    assert time.monotonic() - start < 3
    assert server.chat("Still there?")["choices"]


def test_a_full_queue_and_a_long_answer_are_refused(model: Path) -> None:
    options = ["--contexts", "1", "--queue", "1", "--timeout", "1.5", *LONG]
    with start_server(model, *options) as server:
        with start_answer(server, max_tokens=1_000_000) as first, start_answer(server) as second:
            first.recv(100)
            wait_until(server, 1, 1)
            status, headers, content = server.request("POST", "/v1/completions", {"prompt": "a"})
            assert status == 429 and int(headers["retry-after"]) >= 1
            assert content["error"]["type"] == "rate_limit_error"
            text = b""
            while piece := first.recv(1 << 16):
                text += piece
                if b"took too long" in text:
                    break
            assert b'"code": "timeout"' in text.replace(b'":"', b'": "')
            assert second.recv(12) in (b"HTTP/1.1 200", b"HTTP/1.1 504")
        wait_until(server, 0, 0)
        assert server.chat("Still there?")["choices"]


def test_a_slow_reader_keeps_nobody_waiting(server: ServerProcess) -> None:
    with start_answer(server) as slow:
        # The answer is written without anybody who reads it.
        assert slow.recv(12) == b"HTTP/1.1 200"
        assert server.chat("And me?")["choices"]
        text = b""
        while not text.endswith(b"0\r\n\r\n"):
            text += slow.recv(1 << 20)
        assert b"data: [DONE]" in text


def test_characters_are_whole_in_a_stream(server: ServerProcess) -> None:
    for seed in range(3):
        body = {"messages": [user("ééé 😀")], "stream": True, "temperature": 2, "top_k": 0, "seed": seed}
        status, _, content = server.request("POST", "/v1/chat/completions", {**body, "max_tokens": 300})
        assert status == 200
        # Each event is JSON in UTF-8 by itself.
        for event in content.split(b"\n\n")[:-2]:
            json.loads(event.removeprefix(b"data: ").decode())


def test_a_thousand_connections_are_answered(server: ServerProcess) -> None:
    async def ask() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await started.wait()
        answer = await reader.read(12)
        writer.close()
        return answer

    async def ask_all() -> list[bytes]:
        tasks = [asyncio.create_task(ask()) for _ in range(1000)]
        await asyncio.sleep(1)
        started.set()
        return await asyncio.gather(*tasks)

    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1200:
        pytest.skip(f"this machine allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    started = asyncio.Event()
    assert set(asyncio.run(asyncio.wait_for(ask_all(), 30))) == {b"HTTP/1.1 200"}
    assert server.chat("Still there?")["choices"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_the_middle_of_an_answer(number: int, model: Path) -> None:
    with start_server(model, *LONG) as server, start_answer(server, max_tokens=1_000_000) as connection:
        connection.recv(100)
        rest: list[bytes] = []
        reader = threading.Thread(target=lambda: rest.extend(iter(lambda: connection.recv(1 << 16), b"")))
        reader.start()
        start = time.monotonic()
        exit_code, shown = server.stop(number)
        assert (exit_code, shown) == (0, "stopped\n") and time.monotonic() - start < 4
        reader.join(10)
        assert b"the server is ending" in b"".join(rest)[-2000:]


def refuse(model: Path, *options: str) -> str:
    command = [sys.executable, "-m", "kabrn_dist", "serve", str(model), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done
    return done.stderr


def test_mistakes_at_the_start_are_one_line(server: ServerProcess, model: Path, tmp_path: Path) -> None:
    assert "is taken by python" in (taken := refuse(model, "--port", str(server.port))) and "--port" in taken
    assert "others can reach it; add --token-file" in refuse(model, "--host", "0.0.0.0")
    assert "has at least 16" in refuse(model, "--token", "short")
    (tmp_path / "bad.mkb").write_bytes(b"no model")
    assert "bad.mkb" in refuse(tmp_path / "bad.mkb", "--port", "0")
    template = pack_small_model(tmp_path / "t.mkb", template="{% if %}")
    assert "chat template is no Jinja" in refuse(template, "--port", "0")


def test_it_needs_no_torch_and_says_what_it_needs(model: Path) -> None:
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "tokenizers", "pydantic", "deepspeed", ABSENT}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
from kabrn_dist.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
    for absent, words in (
        ("", "is no address of this machine"),
        ("uvicorn", "pip install numpy starlette uvicorn jinja2"),
    ):
        options = ["--host", "192.0.2.1", "--token", TOKEN] if not absent else []
        command = [sys.executable, "-c", code.replace("ABSENT", repr(absent)), "serve", str(model), *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 2, done
        assert words in done.stderr and done.stderr.count("\n") == 1
