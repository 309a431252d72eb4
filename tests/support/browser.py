"""A headless Chromium in tests, over its DevTools protocol, without any driver."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """A tab. Its methods wait for what they do.

    Attributes:
        errors: what the page's console has shown as an error.
    """

    def __init__(self, address: str) -> None:
        self.errors: list[str] = []
        self._address = address
        self._loop = asyncio.new_event_loop()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._run(self._connect())
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._run(self._call(method, parameters))

    def evaluate(self, expression: str) -> Any:
        """The value of an expression, or of what it promises."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 15) -> None:
        """Wait until an expression is true."""
        until = f"Date.now() + {seconds * 1000}"
        code = f"""(async () => {{ const end = {until}; for (;;) {{ const value = {expression};
            if (value || Date.now() > end) return Boolean(value);
            await new Promise((next) => setTimeout(next, 20)); }} }})()"""
        assert self.evaluate(code), f"{expression} did not become true; {self.errors}"

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def resize(self, width: int, height: int, phone: bool = False, scale: float = 1) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)

    def prefer(self, scheme: str) -> None:
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0) -> None:
        """Press a key; modifiers: 1 Alt, 2 Control, 8 Shift."""
        codes = {"Enter": 13, "Escape": 27, "ArrowUp": 38, "Tab": 9}
        code = key if len(key) > 1 else f"Key{key.upper()}"
        number = codes.get(key, ord(key[0].upper()))
        common = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": modifiers}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        self._run(self._session.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(40)

    async def _connect(self) -> None:
        self._session = aiohttp.ClientSession()
        self._socket = await self._session.ws_connect(self._address, max_msg_size=0)
        self._reader = asyncio.create_task(self._read())

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        number = len(self._waiting)
        self._waiting[number] = self._loop.create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        answer = await self._waiting[number]
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    async def _read(self) -> None:
        async for message in self._socket:
            content = json.loads(message.data)
            if "id" in content:
                self._waiting[content["id"]].set_result(content)
            elif content["method"] == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(content["params"]))
            elif content["method"] == "Log.entryAdded" and content["params"]["entry"]["level"] == "error":
                self.errors.append(content["params"]["entry"]["text"])


@contextlib.contextmanager
def start_browser(folder: Path) -> Iterator[Page]:
    """Start Chromium with a profile in `folder`, and yield its only tab."""
    assert CHROMIUM is not None
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    options += ["--remote-debugging-port=0", f"--user-data-dir={folder}", "--hide-scrollbars", "about:blank"]
    process = subprocess.Popen([CHROMIUM, *options], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    page = None
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "DevTools listening on" in line)
        # What else it says must not fill the pipe.
        threading.Thread(target=lambda: [None for _ in process.stderr], daemon=True).start()
        address = line.split("DevTools listening on ")[1].strip()
        page = Page(_find_tab(address))
        yield page
    finally:
        if page is not None:
            page.close()
        process.terminate()
        process.wait(10)


def _find_tab(address: str) -> str:
    async def ask() -> str:
        host = address.split("/")[2]
        async with aiohttp.ClientSession() as session, session.get(f"http://{host}/json") as response:
            return next(tab for tab in await response.json() if tab["type"] == "page")["webSocketDebuggerUrl"]

    return asyncio.run(ask())
