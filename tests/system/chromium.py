"""A headless Chromium that tests drive over its DevTools protocol: JSON with a zero byte behind each message, over two
pipes (https://chromedevtools.github.io/devtools-protocol/)."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

DEADLINE_S: Final = 30.0
_OWN_FDS: Final = 10  # from here on, out of the way of the two that Chromium reads and writes
# Chromium reads descriptor 3 and writes 4, whatever the numbers are here.
_PLACE: Final = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
_ARGUMENTS: Final = (
    *("--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-extensions", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--disable-breakpad", "--hide-scrollbars", "--force-color-profile=srgb"),
)


class Chromium:
    """The process, which pages of their own share: starting it takes a second."""

    def __init__(self, path: str, profile: Path) -> None:
        ours_in, theirs_out = _pipe()
        theirs_in, ours_out = _pipe()
        self._read, self._write = ours_in, ours_out
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-c", _PLACE, str(theirs_in), str(theirs_out)),
                *(path, *_ARGUMENTS, f"--user-data-dir={profile}", "about:blank"),
            ],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._heard = b""
        self._last_id = 0
        self._events: dict[str, list[tuple[str, dict[str, Any]]]] = {}  # by their session

    def call(self, method: str, parameters: dict[str, Any], session: str = "") -> dict[str, Any]:
        """A command's result; what happens meanwhile is kept."""
        self._last_id = number = self._last_id + 1
        message = {"id": number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        while True:
            told = self._next()
            if told.get("id") == number:
                assert "error" not in told, f"{method}: {told['error']}"
                result: dict[str, Any] = told["result"]
                return result
            if "method" in told:
                self.events(told.get("sessionId", "")).append((told["method"], told.get("params", {})))

    def events(self, session: str) -> list[tuple[str, dict[str, Any]]]:
        """What has come, in order, as (method, parameters)."""
        return self._events.setdefault(session, [])

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + DEADLINE_S
        while b"\0" not in self._heard:
            ready, _, _ = select.select([self._read], [], [], max(0.0, until - time.monotonic()))
            assert ready, "the browser says nothing"
            data = os.read(self._read, 1 << 20)
            assert data, "the browser has ended"
            self._heard += data
        message, _, self._heard = self._heard.partition(b"\0")
        told: dict[str, Any] = json.loads(message)
        return told

    def close(self) -> None:
        try:
            self.call("Browser.close", {})
            self.process.wait(DEADLINE_S)
        finally:
            self.process.kill()
            self.process.wait(DEADLINE_S)
            os.close(self._read)
            os.close(self._write)


class Browser:
    """One page, with a cache and a store of its own, as if nobody had used its browser before."""

    def __init__(self, chromium: Chromium) -> None:
        self._chromium = chromium
        self._context = chromium.call("Target.createBrowserContext", {})["browserContextId"]
        about = {"url": "about:blank", "browserContextId": self._context}
        target = chromium.call("Target.createTarget", about)["targetId"]
        attached = chromium.call("Target.attachToTarget", {"targetId": target, "flatten": True})
        self._session: str = attached["sessionId"]
        self.events = chromium.events(self._session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._chromium.call(method, parameters, self._session)

    def close(self) -> None:
        self._chromium.call("Target.disposeBrowserContext", {"browserContextId": self._context})

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'", "the page")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, when it is a promise once that is kept."""
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, f"{expression}: {told['exceptionDetails']}"
        return told["result"].get("value")

    def until(self, condition: str, what: str, deadline_s: float = DEADLINE_S * 2 / 3) -> Any:
        """What a JavaScript expression is once it is true; it is looked at after each change of the page."""
        value = self.evaluate(
            f"""new Promise((done) => {{
              const look = () => {{
                let value = null;
                try {{ value = ({condition}); }} catch (error) {{ value = null; }}
                if (value) {{ watch.disconnect(); clearTimeout(late); done(value instanceof Node ? true : value); }}
              }};
              const watch = new MutationObserver(look);
              const late = setTimeout(() => {{ watch.disconnect(); done(null); }}, {deadline_s * 1000});
              watch.observe(document, {{ subtree: true, childList: true, attributes: true, characterData: true }});
              addEventListener("load", look);
              look();
            }})"""
        )
        assert value, f"waited in vain for {what}; the page says: {self.evaluate('document.body.innerText')}"
        return value

    def size(self, width: int, height: int, scale: float = 1.0) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )

    def dark(self, dark: bool) -> None:
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def press(self, key: str, code: int, modifiers: int = 0) -> None:
        """A key, as a user presses it. ``code``: its virtual key code; ``modifiers``: 2 is Ctrl."""
        about = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": "\r"} if key == "Enter" else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def picture(self, whole: bool = False) -> bytes:
        """A PNG of what is seen, or of the whole page."""
        told = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(told["data"])

    def requests(self) -> list[str]:
        """The addresses of all that the pages have asked for."""
        return [about["request"]["url"] for method, about in self.events if method == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """What a developer would see in red in the console."""
        found = []
        for method, about in self.events:
            if method == "Runtime.exceptionThrown":
                found.append(json.dumps(about["exceptionDetails"]))
            elif method == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
                found.append(json.dumps(about["args"]))
            elif method == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
                found.append(json.dumps(about["entry"]))
        return found


def _pipe() -> tuple[int, int]:
    """Where to read and where to write, with numbers that are not in Chromium's way."""
    ends = os.pipe()
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, _OWN_FDS) for end in ends]
    for end in ends:
        os.close(end)
    return moved[0], moved[1]
