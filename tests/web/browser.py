"""Just enough of WebDriver (over its plain HTTP) to drive a headless Chromium."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import re
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

START_S = 60.0  # seconds for the driver and the browser to start
WAIT_S = 15.0  # seconds for something to appear on the page
POLL_S = 0.05
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # WebDriver's key of an element reference
ENTER = "\ue007"


def available() -> bool:
    return bool(shutil.which("chromedriver") and (shutil.which("chromium") or shutil.which("google-chrome")))


class Browser:
    """One session of the driver."""

    def __init__(self, http: aiohttp.ClientSession, session: str) -> None:
        self._http, self._session = http, session

    async def call(self, method: str, path: str, **body: Any) -> Any:
        """A WebDriver command; AssertionError with the driver's message if it fails."""
        async with self._http.request(
            method, f"/session/{self._session}{path}", json=body or ({} if method == "POST" else None)
        ) as response:
            value = (await response.json())["value"]
            assert response.status == 200, f"{path}: {value}"
            return value

    async def open(self, url: str) -> None:
        await self.call("POST", "/url", url=url)

    async def run(self, script: str, *args: Any) -> Any:
        """The value that a piece of JavaScript returns."""
        return await self.call("POST", "/execute/sync", script=script, args=list(args))

    async def text(self, selector: str) -> str:
        return str(await self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    async def _element(self, selector: str) -> str:
        found = await self.call("POST", "/element", using="css selector", value=selector)
        return str(found[_ELEMENT])

    async def click(self, selector: str) -> None:
        await self.call("POST", f"/element/{await self._element(selector)}/click")

    async def type(self, selector: str, text: str) -> None:
        await self.call("POST", f"/element/{await self._element(selector)}/value", text=text)

    async def until(self, script: str, what: str) -> Any:
        """Waits until a script returns something true."""
        deadline = asyncio.get_running_loop().time() + WAIT_S
        while True:
            value = await self.run(script)
            if value:
                return value
            if asyncio.get_running_loop().time() > deadline:
                raise AssertionError(f"not within {WAIT_S} s: {what}\n{await self.text('body')}")
            await asyncio.sleep(POLL_S)  # the page is another process: there is no event to wait for

    async def cdp(self, command: str, **params: Any) -> Any:
        return await self.call("POST", "/goog/cdp/execute", cmd=command, params=params)

    async def look(self, width: int, height: int, dark: bool = False, scale: float = 1) -> None:
        """Size of the window, and whether the person prefers dark."""
        await self.cdp(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        await self.cdp(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )

    async def screenshot(self, path: Path) -> None:
        image = base64.b64decode(await self.call("GET", "/screenshot"))
        await asyncio.to_thread(path.write_bytes, image)

    async def complaints(self) -> list[str]:
        """What the browser's console said that is an error (policy violations too)."""
        entries = await self.call("POST", "/se/log", type="browser")
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]


@contextlib.asynccontextmanager
async def browser() -> AsyncIterator[Browser]:
    """A fresh Chromium, ended with the block."""
    driver = await asyncio.create_subprocess_exec(
        "chromedriver", "--port=0", stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    try:
        assert driver.stdout is not None
        port = ""
        async with asyncio.timeout(START_S):
            while not port:
                line = (await driver.stdout.readline()).decode()
                assert line, "chromedriver ended before it was ready"
                found = re.search(r"started successfully on port (\d+)", line)
                port = found[1] if found else ""
        timeout = aiohttp.ClientTimeout(total=START_S)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", timeout=timeout) as http:
            arguments = [
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--window-size=1280,900",
                "--disable-background-networking",
                "--no-first-run",
            ]
            options = {"args": arguments}
            wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            async with http.post("/session", json={"capabilities": {"alwaysMatch": wanted}}) as response:
                value = (await response.json())["value"]
                assert response.status == 200, value
            one = Browser(http, value["sessionId"])
            try:
                yield one
            finally:
                with contextlib.suppress(TimeoutError, AssertionError):
                    await asyncio.wait_for(one.call("DELETE", ""), WAIT_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)  # the browser is of the driver's process group
        await driver.wait()
