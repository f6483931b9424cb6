"""The responses that can be read again and gone on with: in memory, bounded in number, bytes, and time."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
from aiohttp import web
from msgspec.structs import replace

from peerllm.api.error_answers import FieldError
from peerllm.api.openai.responses.response_items import REFERENCE, ResponseItem
from peerllm.api.openai.responses.response_objects import ResponseObject

KEPT_S = 24 * 3600.0  # seconds that a response is kept
MAX_RESPONSES = 2048  # of all clients
MAX_OF_CLIENT = 512
MAX_BYTES = 128 << 20  # of all clients
MAX_BYTES_OF_CLIENT = 32 << 20
_OF = re.compile(r"[a-z]+_(?P<answer>[0-9a-f]{24})_i?\d+")  # an item's id names its response
_ITEMS = msgspec.json.Decoder(list[ResponseItem])
_TAKEN = ResponseItem()  # stands for an item that was referred to


class UnknownResponseError(FieldError):
    """It was never kept for this client, or is not any more."""

    http_status = 404


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """As JSON: `response` as it was told, `input` all items that it answers, those of earlier responses included."""

    client: str
    since: float
    response: bytes
    input: bytes

    @property
    def nbytes(self) -> int:
        return len(self.response) + len(self.input)

    def items(self) -> list[ResponseItem]:
        """What was said before it."""
        return _ITEMS.decode(self.input)

    def conversation(self) -> list[ResponseItem]:
        """What was said before it, and what it says."""
        output = msgspec.json.decode(self.response)["output"]
        return [*self.items(), *msgspec.convert(output, list[ResponseItem])]


class ResponseStore:
    """A client finds its own responses only. Where there are too many, the oldest go first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stored: dict[str, StoredResponse] = {}  # by id, the oldest first

    def keep(self, client: str, response: ResponseObject, said: Sequence[ResponseItem]) -> None:
        """One that is complete; one that was kept under its id before goes."""
        name = response["id"]
        answer = name.partition("_")[2]
        kept_items = [replace(one, id=one.id or f"in_{answer}_i{index}") for index, one in enumerate(said)]
        self._stored.pop(name, None)
        encoded = msgspec.json.encode(response), msgspec.json.encode(kept_items)
        self._stored[name] = StoredResponse(client, self._clock(), *encoded)
        self._bound(client)

    def find(self, client: str, name: str, param: str = "response_id") -> StoredResponse:
        """UnknownResponseError if it is not there."""
        self._expire()
        stored = self._stored.get(name)
        if stored is None or stored.client != client:
            code = "previous_response_not_found" if param == "previous_response_id" else "response_not_found"
            text = f"no response {name[:80]!r} is kept here for you (any more); send the whole conversation as input"
            raise UnknownResponseError(text, param, code)
        return stored

    def delete(self, client: str, name: str) -> None:
        self.find(client, name)
        del self._stored[name]

    def resolved(self, client: str, items: Sequence[ResponseItem]) -> list[ResponseItem]:
        """`items` with those that are only referred to, each once: so all are no larger than what is kept."""
        self._expire()
        found, told = list[ResponseItem](), dict[str, dict[str | None, ResponseItem]]()  # by response: its items
        for index, one in enumerate(items):
            if one.kind != REFERENCE:
                found.append(one)
                continue
            name, where = one.id or "", f"input[{index}]"
            of = _OF.fullmatch(name)
            response = f"resp_{of['answer']}" if of is not None else ""
            if response not in told:
                told[response] = self._items(client, response)
            if name not in told[response]:
                text = f"{where}: no item {name[:80]!r} is kept here for you (any more); send the item itself"
                raise UnknownResponseError(text, where, "item_not_found")
            item = told[response][name]
            if item is _TAKEN:
                raise FieldError(f"{where}: the item {name!r} is there already; name it once", where, "duplicate_item")
            found.append(item)
            told[response][name] = _TAKEN
        return found

    def _items(self, client: str, response: str) -> dict[str | None, ResponseItem]:
        """Of a response, by their ids."""
        stored = self._stored.get(response)
        if stored is None or stored.client != client:
            return {}
        return {item.id: item for item in reversed(stored.conversation())}

    def _bound(self, client: str) -> None:
        self._expire()
        own = [name for name, one in self._stored.items() if one.client == client]
        self._shrink(own, MAX_OF_CLIENT, MAX_BYTES_OF_CLIENT)
        self._shrink(list(self._stored), MAX_RESPONSES, MAX_BYTES)

    def _shrink(self, names: Sequence[str], most: int, most_bytes: int) -> None:
        nbytes = sum(self._stored[name].nbytes for name in names)
        for number, name in enumerate(names):
            if len(names) - number <= most and nbytes <= most_bytes:
                return
            nbytes -= self._stored.pop(name).nbytes

    def _expire(self) -> None:
        until = self._clock() - KEPT_S
        for name in [name for name, one in self._stored.items() if one.since <= until]:
            del self._stored[name]


RESPONSES: web.AppKey[ResponseStore] = web.AppKey("responses", ResponseStore)
