"""A client inside a namespace: streams answers as it is told on stdin, and prints what it hears and when, line by line.

`python -m tests.lab.stream_listener URL TOKEN`; stdin: {"id", "body", "headers"}; stdout: {"id", "at", ...}, `at` being
seconds of the machine's monotonic clock, which all processes share.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import aiohttp

from tests.clients import PATH

TOTAL_S = 900.0


def say(number: int, **what: Any) -> None:
    print(json.dumps({"id": number, "at": time.monotonic(), **what}), flush=True)


async def listen(session: aiohttp.ClientSession, order: dict[str, Any]) -> None:
    number = order["id"]
    try:
        async with session.post(PATH, json=order["body"], headers=order.get("headers")) as response:
            if response.status != 200:
                say(number, over=True, status=response.status, error=(await response.text())[:500])
                return
            finish, error = None, ""
            async for raw in response.content:
                line = raw.decode().strip()
                if line.startswith(":"):
                    say(number, comment=line)
                if not line.startswith("data: "):
                    continue
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    break
                event = json.loads(data)
                if "error" in event:
                    error = json.dumps(event["error"])
                    continue
                (choice,) = event["choices"]
                finish = choice["finish_reason"] or finish
                say(number, ids=choice.get("token_ids", []))
            say(number, over=True, status=200, finish=finish, error=error)
    except (aiohttp.ClientError, OSError, TimeoutError) as broken:
        say(number, over=True, status=0, error=f"{type(broken).__name__}: {broken}")


async def main(url: str, token: str) -> None:
    reader = asyncio.StreamReader(limit=16 << 20)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    timeout = aiohttp.ClientTimeout(total=TOTAL_S)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with (
        aiohttp.ClientSession(url, headers=headers, timeout=timeout, connector=connector) as session,
        asyncio.TaskGroup() as group,
    ):
        while line := await reader.readline():
            group.create_task(listen(session, json.loads(line)))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
