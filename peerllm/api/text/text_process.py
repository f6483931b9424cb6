"""A child process for templates and tokenizers, as the daemon sees it: started when needed, ended when idle."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
from pathlib import Path
from typing import Any

import orjson

import peerllm
from peerllm.api.text.text_child import LENGTH_BYTES, MAX_MESSAGE_BYTES, framed, memory_text, too_much
from peerllm.errors import BadInputError, UnavailableError

MEMORY_BYTES = 3 << 29  # of data that the process may hold: three times what the largest tokenizers in use take
PREPARE_S = 10.0  # seconds that one question may take once the process works at it ...
OPEN_S = 60.0  # ... or read a tokenizer
CLOSE_S = 1.0  # from the closed pipe to SIGKILL
_SECRET = re.compile(r"TOKEN$|KEY$|SECRET|PASSWORD|CREDENTIAL")  # variables that foreign code has no use for
_ROOT = str(Path(peerllm.__file__).resolve().parent.parent)


class TextProcess:
    """Questions one after another (text_child.TextWork); one that takes too much ends the process and gets an error."""

    def __init__(self, idle_s: float) -> None:
        self._idle_s = idle_s
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._opened: set[str] = set()  # directories that the process has read
        self._rest: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[Any]] = set()  # questions, and the ends of processes that left
        self._closed = False

    @property
    def pid(self) -> int | None:
        """None while there is no process."""
        return self._process.pid if self._process is not None else None

    async def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """The answer; BadInputError if the process exceeds its memory or its time over it."""
        await self._turn.acquire()  # who hangs up before its turn leaves nothing behind
        # A client that hangs up must not leave half a message in the pipe: what was begun is brought to its end.
        task = asyncio.create_task(self._ask(question), name="api: ask the text process")
        self._tasks.add(task)
        task.add_done_callback(self._done)
        task.add_done_callback(lambda _: self._turn.release())
        return await asyncio.shield(task)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # read, also where nobody waits any more

    async def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        if self._closed:
            raise UnavailableError("this device is shutting down")
        if self._rest is not None:
            self._rest.cancel()
        if self._process is None or self._process.returncode is not None:
            await self._start()
        opening = {"model_dir": question["model_dir"]}
        if opening != question and question["model_dir"] not in self._opened:
            await self._within(OPEN_S, opening)
        answer = await self._within(PREPARE_S if opening != question else OPEN_S, question)
        self._opened.add(question["model_dir"])
        self._rest = asyncio.get_running_loop().call_later(self._idle_s, self._leave)
        return answer

    async def _within(self, seconds: float, question: dict[str, Any]) -> dict[str, Any]:
        try:
            async with asyncio.timeout(seconds):
                return await self._exchange(framed(question))
        except TimeoutError as error:
            await self._end()
            raise BadInputError(too_much(question, f"longer than {seconds:g} s")) from error
        except (asyncio.IncompleteReadError, OSError) as error:
            await self._end()
            raise BadInputError(too_much(question, memory_text(MEMORY_BYTES))) from error
        except BaseException:
            await self._end()
            raise

    async def _exchange(self, question: bytes) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(question)
        await process.stdin.drain()
        size = int.from_bytes(await process.stdout.readexactly(LENGTH_BYTES), "big")
        if size > MAX_MESSAGE_BYTES:
            raise OSError(f"a message of {size} bytes")
        answer: dict[str, Any] = orjson.loads(await process.stdout.readexactly(size))
        return answer

    async def _start(self) -> None:
        path = os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH"))))
        around = {name: value for name, value in os.environ.items() if not _SECRET.search(name)}
        # One arena: what a large prompt took goes back to the system, and threads reserve no memory within the limit.
        fixed = {"PYTHONSAFEPATH": "1", "TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "1"}
        self._opened.clear()
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "peerllm.api.text.text_child", str(MEMORY_BYTES)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,  # a traceback could hold what somebody typed
            env={**around, "PYTHONPATH": path, **fixed},
        )

    def _leave(self) -> None:
        """Idle for long enough: the pipe's end ends the process, the next question starts another."""
        self._rest = None
        if not self._turn.locked() and self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            leaving, self._process = self._process, None
            task = asyncio.create_task(self._gone(leaving), name="api: text process ends")
            self._tasks.add(task)
            task.add_done_callback(self._done)

    @staticmethod
    async def _gone(process: asyncio.subprocess.Process) -> None:
        try:
            async with asyncio.timeout(CLOSE_S):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def close(self) -> None:
        """End the process, whatever it does. May be called twice."""
        self._closed = True
        if self._rest is not None:
            self._rest.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._end()
