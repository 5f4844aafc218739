"""A headless Chromium that a test drives through the DevTools protocol, with Tornado's WebSocket client."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tornado.websocket import WebSocketClientConnection, websocket_connect

from demo_tasks.servers import ServerError

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)
#: A slow machine that runs other tests at the same time.
PATIENCE = 60.0


def browser_program() -> str:
    """Find a browser on PATH.

    Raises:
        ServerError: There is none. The message says what to install.
    """
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        raise ServerError("No Chromium was found: install it (Debian: apt-get install chromium).")
    return found


class Browser:
    """A browser with one page, and a profile of its own that is removed with it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._folder = tempfile.TemporaryDirectory(prefix="workerpools-browser-", ignore_cleanup_errors=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: WebSocketClientConnection | None = None
        self._number = 0
        self._events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _start(self) -> None:
        profile = Path(self._folder.name) / "profile"
        self._process = subprocess.Popen(
            [browser_program(), *_OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": self._folder.name},
            start_new_session=True,
        )
        file = profile / "DevToolsActivePort"
        self._wait(lambda: file.is_file() and len(file.read_text().splitlines()) == 2, "the browser to start")
        port, path = file.read_text().splitlines()
        url = f"ws://127.0.0.1:{port}{path}"
        self._socket = self._loop.run_until_complete(self._connect(url))
        target = self.send("Target.createTarget", {"url": "about:blank"}, session=None)["targetId"]
        attached = self.send("Target.attachToTarget", {"targetId": target, "flatten": True}, session=None)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    async def _connect(self, url: str) -> WebSocketClientConnection:
        # Screenshots are large.
        return await websocket_connect(url, max_message_size=64 * 1024 * 1024)

    async def _disconnect(self, connection: WebSocketClientConnection) -> None:
        # In its own event loop: the thread's current one is anybody's.
        connection.close()

    def close(self) -> None:
        """End the browser, with all its processes, and remove its profile."""
        if self._socket is not None:
            self._loop.run_until_complete(self._disconnect(self._socket))
        if self._process is not None:
            # Its processes are in one group, which nothing leaves before the end of the first.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()
        self._folder.cleanup()

    # The protocol.

    def send(self, method: str, parameters: dict[str, Any] | None = None, *, session: str | None = "") -> Any:
        """Call a method of the protocol and return its result; `AssertionError` with the browser's own if it fails."""
        return self._loop.run_until_complete(asyncio.wait_for(self._send(method, parameters, session), PATIENCE))

    async def _send(self, method: str, parameters: dict[str, Any] | None, session: str | None) -> Any:
        assert self._socket is not None
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters or {}}
        if session is not None:
            message["sessionId"] = session or self._session
        await self._socket.write_message(json.dumps(message))
        while True:
            text = await self._socket.read_message()
            assert text is not None, "the browser has ended"
            answer = json.loads(text)
            if answer.get("id") == message["id"]:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._events.append(answer)

    def events(self, method: str) -> list[dict[str, Any]]:
        """Return the parameters of the events of that name so far."""
        self.evaluate("0")
        return [event["params"] for event in self._events if event.get("method") == method]

    # What a person does.

    def size(self, width: int, height: int, *, phone: bool = False) -> None:
        """Give the page a size in pixels."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone},
        )

    def media(self, **features: str) -> None:
        """Have the user prefer something: `media(prefers_color_scheme="dark")`."""
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.send("Emulation.setEmulatedMedia", {"features": named})

    def log_in(self, credentials: str) -> None:
        """Send `user:password` with every request."""
        told = base64.b64encode(credentials.encode()).decode()
        self.send("Network.setExtraHTTPHeaders", {"headers": {"Authorization": f"Basic {told}"}})

    def open(self, url: str) -> None:
        """Go to a page, and wait until it is loaded."""
        self._events.clear()
        self.send("Page.navigate", {"url": "about:blank"})
        result = self.send("Page.navigate", {"url": url})
        assert "errorText" not in result, f"{url}: {result['errorText']}"
        # A page is not told the user and the password of its address.
        told = re.sub("(?<=//)[^/@]*@", "", url.partition("#")[0])
        # Of the page that was left, too, some time "complete" can be heard.
        self.until(f"location.href.startsWith({json.dumps(told)}) && document.readyState === 'complete'")

    def press(self, key: str, code: int) -> None:
        """Press and release a key."""
        known = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        text = {"text": "\r"} if key == "Enter" else {}
        self.send("Input.dispatchKeyEvent", {"type": "keyDown", **known, **text})
        self.send("Input.dispatchKeyEvent", {"type": "keyUp", **known})

    # What a person sees.

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, awaited; an exception in it is an `AssertionError`."""
        answer = self.send("Runtime.evaluate", {"expression": expression, "returnByValue": True, "awaitPromise": True})
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression: str, timeout: float = PATIENCE) -> Any:
        """Wait until an expression is true, and return its value."""

        def ask() -> Any:
            try:
                return self.evaluate(expression)
            except AssertionError as error:
                # Asked between two pages.
                if "context" in str(error):
                    return None
                raise

        return self._wait(ask, expression, timeout)

    def text(self, selector: str) -> str:
        """Return the text of an element as it is laid out; empty for a hidden one."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Write the page as a file of the kind that its name ends with: PNG, or WebP, which is smaller."""
        options: dict[str, Any] = {"format": path.suffix[1:]}
        if whole:
            box = self.send("Page.getLayoutMetrics")["cssContentSize"]
            options |= {"captureBeyondViewport": True, "clip": {**box, "scale": 1}}
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", options)["data"]))

    def problems(self) -> list[str]:
        """Return what went wrong in the page: exceptions, console errors, requests that failed."""
        thrown = [str(each["exceptionDetails"]) for each in self.events("Runtime.exceptionThrown")]
        logged = [each["entry"]["text"] for each in self.events("Log.entryAdded") if each["entry"]["level"] == "error"]
        return thrown + logged

    def requested(self) -> set[str]:
        """Return the addresses that were requested since the page was opened."""
        return {each["request"]["url"] for each in self.events("Network.requestWillBeSent")}

    def _wait(self, ask: Callable[[], Any], what: str, timeout: float = PATIENCE) -> Any:
        deadline = time.monotonic() + timeout
        while not (found := ask()):
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {timeout} s in vain: {what}")
            time.sleep(0.05)
        return found
