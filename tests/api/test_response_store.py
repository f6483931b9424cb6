"""Responses that are kept: whose they are, and how many, how large and how long."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from peerllm.api.error_answers import FieldError
from peerllm.api.openai.responses import response_requests, response_store
from peerllm.api.openai.responses.response_items import ResponseItem
from peerllm.api.openai.responses.response_store import ResponseStore, StoredResponse, UnknownResponseError


def response(number: int, text: str = "x") -> dict[str, Any]:
    answer = f"{number:024x}"
    part = {"type": "output_text", "text": text, "annotations": []}
    item = {"id": f"msg_{answer}_0", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
    return {"id": f"resp_{answer}", "output": [item]}


def there(store: ResponseStore, client: str, most: int = 100) -> list[int]:
    found = []
    for number in range(most):
        try:
            store.find(client, response(number)["id"])
        except UnknownResponseError:
            continue
        found.append(number)
    return found


SAID = [ResponseItem(type="message", role="user", content="hi")]


def test_a_client_finds_its_own_only() -> None:
    store = ResponseStore()
    store.keep("a", response(1, "secret"), SAID)
    assert (there(store, "a"), there(store, "b")) == ([1], [])
    for ask in (store.find, store.delete):
        with pytest.raises(UnknownResponseError):
            ask("b", response(1)["id"])
    refer = [ResponseItem(type="item_reference", id=response(1)["output"][0]["id"])]
    with pytest.raises(UnknownResponseError):
        store.resolved("b", refer)
    assert store.resolved("a", refer)[0].role == "assistant"
    first = store.find("a", response(1)["id"]).items()[0]
    assert store.resolved("a", [ResponseItem(id=first.id, type="item_reference")]) == [first]
    store.delete("a", response(1)["id"])
    assert there(store, "a") == []


def test_the_oldest_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_store, "MAX_OF_CLIENT", 3)
    monkeypatch.setattr(response_store, "MAX_RESPONSES", 4)
    store = ResponseStore()
    for number in range(5):
        store.keep("a", response(number), SAID)
    assert there(store, "a") == [2, 3, 4]
    store.keep("a", response(2), SAID)  # told again: it is the latest
    store.keep("a", response(5), SAID)
    assert there(store, "a") == [2, 4, 5]
    for number in (6, 7):
        store.keep("b", response(number), SAID)
    assert (there(store, "a"), there(store, "b")) == ([2, 5], [6, 7])


def test_bytes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_store, "MAX_BYTES_OF_CLIENT", 5000)
    monkeypatch.setattr(response_store, "MAX_BYTES", 7000)
    store = ResponseStore()
    for number in range(5):
        store.keep("a", response(number, "x" * 1500), SAID)
    assert there(store, "a") == [3, 4]
    store.keep("b", response(5, "x" * 3000), SAID)
    assert (there(store, "a"), there(store, "b")) == ([3, 4], [5])
    store.keep("b", response(6), [ResponseItem(role="user", content="y" * 6000)])
    assert there(store, "b") == [], "one that is larger than all is not kept"


def test_they_go_after_a_day() -> None:
    now = 0.0
    store = ResponseStore(lambda: now)
    store.keep("a", response(1), SAID)
    now = response_store.KEPT_S - 1
    store.keep("a", response(2), SAID)
    assert there(store, "a") == [1, 2]
    now += 2
    refer = [ResponseItem(type="item_reference", id=response(1)["output"][0]["id"])]
    with pytest.raises(UnknownResponseError):
        store.resolved("a", refer)
    assert there(store, "a") == [2]


def test_each_response_is_read_once_for_all_that_is_referred_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one request keeps the loop busy for minutes, or becomes many times what is kept."""
    store, read, conversation = ResponseStore(), list[str](), StoredResponse.conversation

    def counted(one: StoredResponse) -> list[ResponseItem]:
        read.append(one.client)
        return conversation(one)

    monkeypatch.setattr(StoredResponse, "conversation", counted)
    store.keep("a", response(1), SAID * 9)
    names = [one.id for one in store.find("a", response(1)["id"]).items()]
    refer = [ResponseItem(type="item_reference", id=name) for name in names]
    assert [one.id for one in store.resolved("a", refer)] == names and read == ["a"]
    with pytest.raises(FieldError, match=r"input\[9\]: the item .* is there already"):
        store.resolved("a", [*refer, refer[4]])


def test_what_the_system_says_is_joined_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one, a body of 8 MiB takes seconds of the loop."""
    joined = list[str]()

    def counted(one: Any, **more: Any) -> Any:
        joined.extend(more.values())
        return replace(one, **more)

    monkeypatch.setattr(response_requests, "replace", counted)
    said = [ResponseItem(role="system", content=text) for text in "abcd"]
    body = response_requests.ResponseBody(model="m", input=[*said, *SAID, said[0]], instructions="i")
    messages = body.generation().messages
    texts = ["\n\n".join("iabcd"), "hi", "a"]
    assert [one.content for one in messages] == texts and joined == texts[:1]
