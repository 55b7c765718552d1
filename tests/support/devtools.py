"""A small client for Chromium's DevTools protocol: JSON messages over two pipes, each ended by a zero byte."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 60.0  # seconds to wait for an answer on a busy machine
# the browser reads its file descriptor 3 and writes its 4
LAUNCH = "import os, sys; os.dup2({0}, 3); os.dup2({1}, 4); os.execv(sys.argv[1], sys.argv[1:])"
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35, "Tab": 9}
SHIFT = 8


def find() -> str | None:
    """Return the path of an installed browser, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """A headless browser with one page; `events` collects every event it sends."""

    def __init__(self, path: str, profile: Path) -> None:
        # from 10 on, so that neither is among those that LAUNCH makes
        theirs, ours = (tuple(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in ends) for ends in self._pipes())
        self._write, self._read = ours
        command = [path, "--headless", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--disable-gpu"]
        command += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--no-pings"]
        command += ["--force-device-scale-factor=1", "--window-size=1400,1000"]
        command += ["--no-sandbox"]  # root and most containers have none, and it opens nothing but our own page
        with open(profile / "stderr", "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", LAUNCH.format(*theirs), *command], pass_fds=theirs, stdout=log, stderr=log
            )
        for fd in theirs:
            os.close(fd)
        self.events: list[dict[str, Any]] = []
        self._buffer = b""
        self._number = 0
        self._session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    @staticmethod
    def _pipes() -> tuple[tuple[int, int], tuple[int, int]]:
        to_read, to_write = os.pipe()
        from_read, from_write = os.pipe()
        return (to_read, from_write), (to_write, from_read)

    def close(self) -> None:
        """Close the pipes, which ends the browser."""
        self._session = ""
        try:
            self.call("Browser.close")
        finally:
            os.close(self._read)
            os.close(self._write)
            self._process.wait(PATIENCE)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result. Raises RuntimeError for an error, TimeoutError for no answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"the browser has not answered for {PATIENCE:.0f} s")
            part = os.read(self._read, 2**20)
            if not part:
                raise RuntimeError(f"the browser ended with exit code {self._process.wait(PATIENCE)}")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def open(self, path: Path, fragment: str = "") -> None:
        """Load a file, at a fragment such as #here, and wait until its scripts have run."""
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri() + fragment)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive())

    def evaluate(self, expression: str) -> Any:
        """Return the JSON value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def text(self, selector: str) -> str:
        """Return an element's text."""
        found = self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")
        assert isinstance(found, str)
        return found

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Return an element's left, top, width and height in the window."""
        code = f"(({{x, y, width, height}}) => [x, y, width, height])(document.querySelector({json.dumps(selector)})"
        left, top, width, height = self.evaluate(code + ".getBoundingClientRect())")
        return left, top, width, height

    def press(self, key: str, shift: bool = False) -> None:
        """Press and release a key."""
        code = KEYS.get(key, ord(key[0].upper()))
        letter = {} if key in KEYS else {"text": key}
        for kind in ("keyDown" if letter else "rawKeyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                windowsVirtualKeyCode=code,
                modifiers=SHIFT if shift else 0,
                **(letter if kind == "keyDown" else {}),
            )

    def point(self, left: float, top: float, *, click: bool = False) -> None:
        """Move the mouse there and click."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=left, y=top)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.call("Input.dispatchMouseEvent", type=kind, x=left, y=top, button="left", clickCount=1)

    def tap(self, left: float, top: float) -> None:
        """Touch the screen there with one finger."""
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": left, "y": top}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        self.evaluate("new Promise((done) => setTimeout(done, 50))")

    def resize(self, width: int, height: int, phone: bool = False) -> None:
        """Change the size of what is seen; a phone has a touch screen."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)

    def fits(self) -> bool:
        """Whether nothing on the page is wider than the screen."""
        found = self.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
        assert isinstance(found, bool)
        return found

    def prefer(self, scheme: str) -> None:
        """Set the preferred colour scheme, dark or light."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self) -> bytes:
        """Return a screenshot as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", optimizeForSpeed=True)["data"])


def pixels(png: bytes) -> NDArray[np.uint8]:
    """Return the colours [height, width, 3 or 4] of a PNG from Chromium: 8 bits a channel, not interlaced."""
    place, header, content = 8, b"", b""
    while place < len(png):
        length, kind = struct.unpack_from(">I4s", png, place)
        part = png[place + 8 : place + 8 + length]
        header = part if kind == b"IHDR" else header
        content += part if kind == b"IDAT" else b""
        place += length + 12
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    assert (depth, interlaced) == (8, 0)
    channels = {2: 3, 6: 4}[colour]
    rows = np.frombuffer(zlib.decompress(content), np.uint8).reshape(height, 1 + width * channels)
    image = np.zeros((height, width * channels), np.uint8)
    above = np.zeros(width * channels, np.uint8)
    for number, row in enumerate(rows):
        above = image[number] = unfiltered(row[0], row[1:], above, channels)
    return image.reshape(height, width, channels)


def unfiltered(kind: int, row: NDArray[np.uint8], above: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """Undo one of PNG's five filters, which subtract neighbouring bytes, on a row."""
    if kind == 0:
        return row
    if kind == 2:
        return row + above
    if kind == 1:
        return np.add.accumulate(row.reshape(-1, channels), axis=0, dtype=np.uint8).reshape(-1)
    found = [0] * channels + [0] * len(row)
    up = [0] * channels + above.tolist()
    for place, value in enumerate(row.tolist(), channels):
        a, b, c = found[place - channels], up[place], up[place - channels]
        near = (a + b) // 2 if kind == 3 else min((a, b, c), key=lambda one: abs(a + b - c - one))
        found[place] = (value + near) % 256
    return np.array(found[channels:], np.uint8)
