"""A real Chromium without a window, spoken to over a pipe in the DevTools protocol: no driver, no port, no network.

with Chromium() as page:
    page.open(Path("report.html"), width=390, height=844)
    page.run("document.title")
"""

from __future__ import annotations

import base64
import json
import os
import selectors
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--no-pings",
    "--disable-extensions", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--mute-audio", "--remote-debugging-pipe",
]  # fmt: skip
TIMEOUT = 60.0  # seconds for one answer: a machine that is busy with other tests starts a browser slowly


class Chromium:
    """One page. `events`: what the browser has told, in order, as {"method": ..., "params": ...}."""

    def __init__(self) -> None:
        assert CHROMIUM
        self.events: list[dict[str, Any]] = []
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        self._number, self._rest, self._session = 0, b"", None
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # Chromium reads commands from its file 3 and writes answers to its file 4.
        script = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'
        words = ["bash", "-c", script, "bash", str(to_read), str(to_write), CHROMIUM, *FLAGS]
        self._log = Path(self._profile, "log")
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [*words, f"--user-data-dir={self._profile}", "about:blank"],
                pass_fds=(to_read, to_write),
                stdout=log,
                stderr=log,
            )
        os.close(to_read)
        os.close(to_write)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._read, selectors.EVENT_READ)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol and its result. RuntimeError where the browser refuses it or says nothing."""
        self._number += 1
        told = {"id": self._number, "method": method, "params": params}
        if self._session:
            told["sessionId"] = self._session
        os.write(self._write, json.dumps(told).encode() + b"\0")
        until = time.monotonic() + TIMEOUT
        while True:
            message = self._message(until)
            if message.get("id") == self._number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return dict(message["result"])

    def _message(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = b""
            if self._selector.select(max(0.0, until - time.monotonic())):
                part = os.read(self._read, 1 << 20)
            if not part:
                raise RuntimeError(f"Chromium says nothing; its last words: {self._log.read_bytes()[-2000:]!r}")
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message

    def wait_for(self, method: str, since: int) -> dict[str, Any]:
        """The first event of that name after the first `since` ones."""
        until = time.monotonic() + TIMEOUT
        while True:
            found = [event for event in self.events[since:] if event["method"] == method]
            if found:
                return found[0]
            self._message(until)

    def open(self, path: Path, width: int, height: int, dark: bool = False, scale: float = 1.0) -> None:
        """Load a local file in a window of that size, in CSS pixels, and wait until it is all there."""
        mobile = width < 600
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": mobile}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        since = len(self.events)
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait_for("Page.loadEventFired", since)
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited where it is a promise."""
        told = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in told:
            raise RuntimeError(str(told["exceptionDetails"]))
        return told["result"].get("value")

    def move_mouse(self, x: float, y: float) -> None:
        """Move the pointer to a place in the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def tap(self, x: float, y: float) -> None:
        """Touch a place in the window with a finger, and let go."""
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def press(self, key: str) -> None:
        """Press and let go a key that writes nothing: `ArrowLeft`, `Home`."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def picture(self, path: Path) -> None:
        """A PNG of the window."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
