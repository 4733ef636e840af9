"""Chromium without a window, and the page of examples/browser in it, as a person uses it."""

from __future__ import annotations

import base64
import json
import os
import queue
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

WAIT = 300  # seconds; other work may slow the machine down


class Browser:
    """Chromium without a window, told what to do through a pipe (the DevTools protocol)."""

    def __init__(self, program: str, folder: Path) -> None:
        for name in ("in", "out"):
            os.mkfifo(folder / name)
        switches = (
            "headless",
            "no-sandbox",
            "disable-gpu",
            "no-first-run",
            "disable-background-networking",
            "disable-component-update",
            "disable-dev-shm-usage",
            "remote-debugging-pipe",
            f"user-data-dir={folder / 'profile'}",
            # There is no other server in its world.
            "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        )
        # Chromium reads its descriptor 3 and writes to 4.
        self.process = subprocess.Popen(
            ["sh", "-c", 'exec "$@" 3<"$0/in" 4>"$0/out"', str(folder), program,
             *(f"--{switch}" for switch in switches)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.writer = (folder / "in").open("wb", buffering=0)
        self.reader = (folder / "out").open("rb")
        self.messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()
        self.calls = 0

    def _listen(self) -> None:
        rest = b""
        while part := self.reader.read1(1 << 16):
            *whole, rest = (rest + part).split(b"\0")
            for message in whole:
                self.messages.put(json.loads(message))
        self.messages.put(None)

    def call(self, method: str, *, events: list[Any], session: str = "", **params: Any) -> Any:
        """Call a method and wait; what else is told meanwhile is appended to `events`."""
        self.calls += 1
        request = {"id": self.calls, "method": method, "params": params}
        self.writer.write(
            json.dumps(request | ({"sessionId": session} if session else {})).encode() + b"\0"
        )
        while True:
            message = self.messages.get(timeout=WAIT)
            assert message is not None, "Chromium ended"
            if message.get("id") == self.calls:
                assert "error" not in message, message
                return message["result"]
            events.append(message)

    def close(self) -> None:
        self.call("Browser.close", events=[])
        self.process.wait(WAIT)
        self.thread.join(WAIT)
        self.reader.close()
        self.writer.close()


class Page:
    """One tab with the page in it."""

    def __init__(self, browser: Browser, address: str, *, width: int = 1200) -> None:
        self.browser = browser
        self.events: list[dict[str, Any]] = []
        self.session = ""
        self.target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=self.target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "DOM"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.call("Page.navigate", url=address)
        self.until(
            "document.readyState === 'complete' && document.getElementById('status').dataset.state"
        )

    def call(self, method: str, **params: Any) -> Any:
        return self.browser.call(method, events=self.events, session=self.session, **params)

    def js(self, code: str) -> Any:
        """The value of an expression, in which `await` may stand and `view` is the page's state."""
        module = "const { view } = await import('/app.js');"
        found = self.call(
            "Runtime.evaluate",
            expression=f"(async () => {{ {module} return ({code}); }})()",
            awaitPromise=True,
            returnByValue=True,
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, code: str) -> Any:
        """Wait for an expression to hold."""
        end = time.monotonic() + WAIT
        while time.monotonic() < end:
            if found := self.js(code):
                return found
            time.sleep(0.05)
        pytest.fail(f"never: {code}; the page says {self.text('body')}")

    def text(self, selector: str) -> str:
        return self.js(f"document.querySelector({selector!r}).innerText")

    def choose(self, path: Path, selector: str = "#photo-file") -> None:
        """What a person does in the dialogue for a photo, or for a model's folder."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def ready(self) -> None:
        self.until("view.encoded && document.getElementById('status').dataset.state === 'ready'")

    def problem(self) -> str:
        self.until("!document.getElementById('problem').hidden")
        return self.text("#problem")

    def mouse(self, kind: str, x: float, y: float, **params: Any) -> None:
        """`x`, `y` in pixels of the photo."""
        place = self.js(
            "(() => { const at = document.getElementById('canvas').getBoundingClientRect();"
            f" const [h, w] = view.photo.size; return [at.left + at.width * {x + 0.5} / w,"
            f" at.top + at.height * {y + 0.5} / h]; }})()"
        )
        self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], **params)

    def click(self, x: int, y: int, button: str = "left", modifiers: int = 0) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            self.mouse(kind, x, y, button=button, clickCount=1, modifiers=modifiers)

    def drag(self, box: tuple[int, int, int, int]) -> None:
        self.mouse("mousePressed", *box[:2], button="left", clickCount=1)
        self.mouse("mouseMoved", *box[2:], button="left", buttons=1)
        self.mouse("mouseReleased", *box[2:], button="left", clickCount=1)

    def key(self, name: str, code: int, modifiers: int = 0) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=name,
                windowsVirtualKeyCode=code,
                modifiers=modifiers,
            )

    def prompts(self) -> list[dict[str, Any]]:
        return self.js("view.prompts")

    def mask(self) -> np.ndarray:
        """The mask of the prompts that are on the page."""
        self.ready()
        return self.array("view.mask", np.uint8).reshape(self.js("view.photo.size")) > 0

    def array(self, code: str, kind: type) -> np.ndarray:
        """A typed array of the page."""
        packed = self.js(
            "await new Promise((done) => { const reader = new FileReader();"
            " reader.onload = () => done(reader.result.split(',')[1] ?? '');"
            f" reader.readAsDataURL(new Blob([{code}])); }})"
        )
        return np.frombuffer(base64.b64decode(packed), kind)

    def close(self) -> None:
        """Close the tab; nothing may have gone wrong in it without being told."""
        self.call("Target.closeTarget", targetId=self.target)
        assert [e["params"] for e in self.events if e["method"] == "Runtime.exceptionThrown"] == []
