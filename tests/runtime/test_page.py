"""The page in headless Chromium: what a user sees, types and presses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from kabrn_dist.adapters.folder import write_adapter
from kabrn_dist.runtime.model_file import read_model_file
from tests.support.browser import CHROMIUM, Page, start_browser
from tests.support.native_adapters import draw_low_ranks
from tests.support.servers import ServerProcess, pack_small_model, start_server

pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"), pytest.mark.slow]

TOKEN = "a-token-of-the-tests-0123"
ALT = 1
LAST_TEXT = "document.querySelector('#turns > :last-child .text').textContent"
COMPLETE = "!document.querySelector('.busy') && document.querySelectorAll('.numbers').length"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_small_model(tmp_path_factory.mktemp("page") / "small.mkb")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[ServerProcess]:
    with start_server(model, "--max-tokens", "1000000") as server:
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with start_browser(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture
def page(browser: Page, server: ServerProcess) -> Iterator[Page]:
    browser.resize(1100, 800)
    browser.prefer("light")
    browser.open(server.url)
    browser.evaluate("localStorage.clear()")
    set_settings(browser, maxTokens=20, temperature=0)
    yield browser
    assert browser.errors == []


def set_settings(page: Page, **changes: object) -> None:
    """Change kept settings, and load the page anew."""
    page.evaluate(f"""localStorage.setItem("mixkabrn.settings", JSON.stringify(
        {{...JSON.parse(localStorage.getItem("mixkabrn.settings")), ...{json.dumps(changes)}}}))""")
    reload(page)


def reload(page: Page) -> None:
    page.evaluate("window.isOld = true")
    page.call("Page.reload")
    page.wait_for("!window.isOld && document.readyState === 'complete' && document.title === 'small'")


def say(page: Page, text: str, answers: int = 1) -> str:
    """Type and send a text, and return the answer."""
    page.evaluate("document.getElementById('input').focus()")
    page.type(text)
    page.press("Enter")
    page.wait_for(f"!document.querySelector('.busy') && document.querySelectorAll('.numbers').length === {answers}")
    return page.evaluate(LAST_TEXT)


def kept_turns(page: Page) -> list[dict[str, str]]:
    return json.loads(page.evaluate("localStorage.getItem('mixkabrn.turns')"))


def test_a_conversation_is_shown_counted_and_kept(page: Page, server: ServerProcess) -> None:
    answer = say(page, "Hello")
    assert answer == server.chat("Hello", max_tokens=20)["choices"][0]["message"]["content"]
    numbers = page.evaluate("document.querySelector('.numbers').textContent")
    assert numbers.startswith("20 tokens · ") and "tokens/s · first after " in numbers and "cut" in numbers
    second = say(page, "And then?", 2)
    assert second == server.chat("Hello", answer, "And then?", max_tokens=20)["choices"][0]["message"]["content"]
    assert page.evaluate("document.querySelector('#status').textContent") == "The answer is complete"
    reload(page)
    assert page.evaluate("[...document.querySelectorAll('.text')].map((node) => node.textContent)") == [
        *("Hello", answer, "And then?", second)
    ]


def test_a_long_answer_streams_and_stops(page: Page, server: ServerProcess) -> None:
    set_settings(page, maxTokens=1_000_000, temperature=1)
    page.evaluate("document.getElementById('input').focus()")
    page.type("Go on")
    page.press("Enter")
    page.wait_for(f"{LAST_TEXT}.length > 100 && !document.getElementById('stop').hidden")
    page.press("Escape")
    page.wait_for(COMPLETE)
    length = page.evaluate(f"{LAST_TEXT}.length")
    assert "stopped" in page.evaluate("document.querySelector('.numbers').textContent")
    page.wait_for("(await (await fetch('/health')).json()).running === 0")
    assert page.evaluate(f"{LAST_TEXT}.length") == length
    assert page.evaluate("document.getElementById('stop').hidden && !document.getElementById('send').hidden")


def test_a_turn_is_edited_and_answered_again(page: Page, server: ServerProcess) -> None:
    first = say(page, "Hello")
    say(page, "More", 2)
    page.evaluate("document.querySelector('.user .under button').click()")
    page.wait_for("document.activeElement.getAttribute('aria-label') === 'Edit the message'")
    page.evaluate("document.activeElement.select()")
    page.type("Another beginning")
    page.press("Enter")
    page.wait_for(f"{COMPLETE} === 1")
    other = page.evaluate(LAST_TEXT)
    assert [turn["content"] for turn in kept_turns(page)] == ["Another beginning", other] and other != first
    set_settings(page, temperature=2)
    page.press("r", ALT)
    page.wait_for(f"{COMPLETE} && {LAST_TEXT} !== {json.dumps(other)}")
    assert len(kept_turns(page)) == 2
    # Up from an empty line edits the last message, Escape leaves it.
    page.evaluate("document.getElementById('input').focus()")
    page.press("ArrowUp")
    page.wait_for("document.activeElement.value === 'Another beginning'")
    page.press("Escape")
    page.wait_for("document.activeElement.id === 'input'")


def test_texts_are_never_html(page: Page) -> None:
    text = "<img src=x onerror='window.bad=1'><script>window.bad=1</script>```\n<b>code</b>\n```"
    say(page, text)
    assert page.evaluate("window.bad") is None
    assert page.evaluate("document.querySelectorAll('#turns img, #turns script, #turns b').length") == 0
    assert "<img src=x" in page.evaluate("document.querySelector('.user .text').textContent")
    assert page.evaluate("document.querySelector('.user pre').textContent") == "<b>code</b>\n"


def test_text_from_right_to_left(page: Page) -> None:
    say(page, "مرحبا، كيف الحال؟")
    style = "getComputedStyle(document.querySelector('.user .plain'))"
    assert page.evaluate(f"{style}.direction") == "rtl"
    page.evaluate("document.getElementById('input').focus()")
    page.type("שלום")
    assert page.evaluate("getComputedStyle(document.getElementById('input')).direction") == "rtl"


def test_dark_and_light_follow_the_system_until_one_is_chosen(page: Page) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.prefer("dark")
    page.wait_for(f"{paper} !== '{light}'")
    page.evaluate("document.getElementById('theme').click()")
    assert page.evaluate(paper) == light
    reload(page)
    assert page.evaluate(paper) == light


def test_it_fits_a_phone(page: Page) -> None:
    page.resize(360, 640, phone=True)
    reload(page)
    say(page, "Hello " + "x" * 300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    sizes = page.evaluate("[...document.querySelectorAll('header button')].map((node) => node.offsetWidth)")
    assert min(sizes) >= 40
    page.evaluate("document.getElementById('open-settings').click()")
    assert page.evaluate("document.getElementById('settings').getBoundingClientRect().right") <= 360


def test_the_system_prompt_and_the_export(page: Page, server: ServerProcess) -> None:
    page.press("s", ALT)
    page.wait_for("document.querySelector('#settings[open]')")
    page.evaluate("document.getElementById('system').focus()")
    page.type("Be kind.")
    page.press("Escape")
    answer = say(page, "Hello")
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    body = {"messages": messages, "max_tokens": 20, "temperature": 0}
    content = server.request("POST", "/v1/chat/completions", body)[2]
    assert content["choices"][0]["message"]["content"] == answer
    page.evaluate("""URL.createObjectURL = (blob) => { window.exported = blob.text(); return "#"; };
        document.getElementById('export').click()""")
    exported = json.loads(page.evaluate("window.exported"))
    assert exported["model"] == "small" and exported["max_tokens"] == 20
    assert exported["messages"] == [*messages, {"role": "assistant", "content": answer}]
    page.press("n", ALT)
    page.wait_for("!document.getElementById('welcome').hidden")
    assert kept_turns(page) == []


def test_every_control_has_a_name_and_a_place_in_the_order_of_tabs(page: Page) -> None:
    say(page, "Hello")
    unnamed = """[...document.querySelectorAll('button, input, textarea')].filter((node) => !(node.textContent.trim()
        || node.getAttribute('aria-label') || node.labels?.length)).map((node) => node.outerHTML)"""
    assert page.evaluate(unnamed) == []
    page.evaluate("document.getElementById('new').focus()")
    for name in ("export", "import", "theme", "open-settings"):
        page.press("Tab")
        assert page.evaluate("document.activeElement.id") == name


def test_it_says_when_the_server_is_gone_and_goes_on_when_it_is_back(browser: Page, model: Path) -> None:
    with start_server(model) as server:
        browser.open(server.url)
        browser.evaluate("localStorage.clear()")
        reload(browser)
    browser.evaluate("document.getElementById('input').focus()")
    browser.type("Hello")
    browser.press("Enter")
    browser.wait_for("document.getElementById('notice-text').textContent.includes('cannot be reached')")
    with start_server(model, "--port", str(server.port)):
        browser.evaluate("document.getElementById('retry').click()")
        browser.wait_for(f"{COMPLETE} === 1 && document.getElementById('notice').hidden")
    browser.errors.clear()


def test_it_asks_for_the_token(browser: Page, model: Path) -> None:
    with start_server(model, "--token", TOKEN) as server:
        browser.open(server.url)
        for typed in ("wrong-token-of-the-tests", TOKEN):
            browser.wait_for("document.querySelector('#token-dialog[open]')")
            browser.evaluate("document.getElementById('token').focus()")
            browser.type(typed)
            browser.press("Enter")
            browser.wait_for(
                "!document.querySelector('#token-dialog[open]') || !document.getElementById('token').value"
            )
        browser.wait_for("document.title === 'small'")
        assert browser.evaluate("document.querySelector('#token-dialog[open]')") is None
        say(browser, "Hello")
    browser.errors.clear()


def test_a_new_conversation_can_be_undone_and_an_exported_one_imported(page: Page) -> None:
    say(page, "Hello")
    said = kept_turns(page)
    page.press("n", ALT)
    page.wait_for("!document.getElementById('undo').hidden")
    assert kept_turns(page) == []
    page.evaluate("document.getElementById('undo-button').click()")
    page.wait_for("document.querySelectorAll('.turn').length === 2 && document.getElementById('undo').hidden")
    assert kept_turns(page) == said
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "A"}]
    messages.append({"role": "assistant", "content": "B"})
    page.evaluate(f"importTurns(new File([{json.dumps(json.dumps({'messages': messages}))}], 'c.json'))")
    page.wait_for("document.querySelectorAll('.turn').length === 2 && !document.getElementById('undo').hidden")
    assert kept_turns(page) == messages[1:] and page.evaluate("document.getElementById('system').value") == "Be kind."
    for content in ("{", "{}", '{"messages": [{"role": 5}]}', "null"):
        page.evaluate(f"importTurns(new File([{json.dumps(content)}], 'bad.json'))")
        page.wait_for("document.getElementById('notice-text').textContent.includes('bad.json is no conversation')")
        assert kept_turns(page) == messages[1:]
        page.evaluate("complain('')")


def test_what_was_written_before_a_reload_is_kept(page: Page) -> None:
    set_settings(page, maxTokens=1_000_000, temperature=1)
    page.evaluate("document.getElementById('input').focus()")
    page.type("Go on")
    page.press("Enter")
    page.wait_for(f"{LAST_TEXT}.length > 50")
    reload(page)
    assert len(kept_turns(page)[1]["content"]) > 50
    assert "broken off" in page.evaluate("document.querySelector('.numbers').textContent")
    # A question without an answer can be asked again.
    page.evaluate("localStorage.setItem('mixkabrn.turns', JSON.stringify([{role: 'user', content: 'Hello'}]))")
    set_settings(page, maxTokens=5, temperature=0)
    assert page.evaluate("getComputedStyle(document.querySelector('.user .under')).opacity") == "1"
    page.evaluate("[...document.querySelectorAll('.user button')].find((node) => node.textContent === 'Again').click()")
    page.wait_for(f"{COMPLETE} === 1")


def test_a_question_after_a_failure_is_one_turn_with_the_one_before(page: Page) -> None:
    page.evaluate("localStorage.setItem('mixkabrn.turns', JSON.stringify([{role: 'user', content: 'Hello'}]))")
    reload(page)
    say(page, "Hello")
    assert [turn["content"] for turn in kept_turns(page)][:1] == ["Hello"] and len(kept_turns(page)) == 2


def test_words_are_marked_without_html(page: Page) -> None:
    say(page, "`a<b>` and **bold** but 2 ** 3 ** 4")
    assert page.evaluate("document.querySelector('.user .plain code').textContent") == "a<b>"
    assert page.evaluate("document.querySelector('.user .plain strong').textContent") == "bold"
    assert page.evaluate("document.querySelectorAll('.user .plain > *').length") == 2
    page.evaluate("document.getElementById('mono').click()")
    assert "mono" in page.evaluate("getComputedStyle(document.querySelector('.user .plain')).fontFamily").lower()


def test_a_text_is_continued(page: Page, server: ServerProcess) -> None:
    page.evaluate("document.querySelector('[data-mode=text]').click()")
    page.wait_for("document.body.classList.contains('continues')")
    first = say(page, "Once there was")
    body = {"prompt": "Once there was", "max_tokens": 20, "temperature": 0}
    assert server.request("POST", "/v1/completions", body)[2]["choices"][0]["text"] == first
    # An empty line goes on.
    page.press("Enter")
    page.wait_for(f"{COMPLETE} === 2")
    body["prompt"] += first
    assert server.request("POST", "/v1/completions", body)[2]["choices"][0]["text"] == page.evaluate(LAST_TEXT)


def test_an_adapter_is_chosen_and_its_name_stands_below_its_answers(
    page: Page, model: Path, server: ServerProcess
) -> None:
    assert page.evaluate("document.getElementById('model').hidden")
    adapter = model.parent / "poems"
    write_adapter(draw_low_ranks(read_model_file(model), size=1.0), adapter)
    with start_server(model, "--adapter", f"poems={adapter}") as other:
        page.open(other.url)
        page.evaluate("localStorage.clear()")
        set_settings(page, maxTokens=20, temperature=0)
        assert page.evaluate("[...document.getElementById('model').options].map((one) => one.value)") == [
            *("small", "poems")
        ]
        assert not page.evaluate("document.getElementById('model').hidden")
        say(page, "Hello")
        first = kept_turns(page)[1]["content"]
        page.evaluate("""document.getElementById('model').value = 'poems';
            document.getElementById('model').dispatchEvent(new Event('change'))""")
        page.press("r", ALT)
        page.wait_for(f"{COMPLETE} === 1 && document.querySelector('.numbers').textContent.startsWith('poems · ')")
        second = kept_turns(page)[1]["content"]
        expected = [other.chat("Hello", max_tokens=20, model=name) for name in ("small", "poems")]
        assert [first, second] == [
            answer["choices"][0]["message"]["content"] for answer in expected
        ] and first != second
        reload(page)
        assert page.evaluate("document.getElementById('model').value") == "poems"
        page.resize(360, 640, phone=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        # Room for some letters is left.
        assert page.evaluate("document.getElementById('model').offsetWidth") >= 60
    # A server that does not have it answers with its model.
    page.open(server.url)
    set_settings(page, model="poems", maxTokens=20, temperature=0)
    say(page, "Hello")
    assert kept_turns(page)[1]["content"] == first
