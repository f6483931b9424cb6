"""What a deployment is called, and where that name is understood."""

from __future__ import annotations

import asyncio

import pytest

from peerllm.daemon.decide.model_names import name_for
from peerllm.daemon.facade import RunOptions
from peerllm.errors import BadInputError, NotFoundError, RefusedError
from tests.daemon.house import quiet, view

BOTH = ("owner/small", "other/small")


@pytest.fixture
def house(houses):
    return houses([9, 9], **dict.fromkeys((*BOTH, "small"), 2))


@pytest.mark.parametrize(
    ("model", "taken", "name"),
    [
        ("builtin", (), "builtin"),
        ("Qwen/Qwen3-4B", (), "Qwen3-4B"),
        ("/home/me/models/SmolLM2 135M/", (), "SmolLM2 135M"),
        ("/", (), "/"),
        ("/home/me/Qwen3-4B-Q4_K_M.gguf", (), "Qwen3-4B-Q4_K_M"),
        ("/home/me/x.Q8_0-00001-of-00003.GGUF", (), "x.Q8_0"),
        ("Qwen/Qwen3-4B-GGUF:Q4_K_M", (), "Qwen3-4B-GGUF:Q4_K_M"),
        ("Qwen/Qwen3-4B-GGUF:sub/Qwen3-4B.gguf", (), "Qwen3-4B"),
        ("qwen3-4b:Q8_0", ("qwen3-4b:Q8_0",), "qwen3-4b:Q8_0-2"),
        (".gguf", (), ".gguf"),
        ("a/x", ("x",), "x-2"),
        ("a/x", ("x", "x-2", "x-4"), "x-3"),
    ],
)
def test_the_last_part_is_the_name_numbered_where_it_is_taken(model, taken, name):
    assert name_for(model, "", dict.fromkeys(taken, "laptop")) == name


def test_an_alias_is_taken_as_it_is_or_refused():
    assert name_for("a/x", "Home-1.5:b_c+d", {"x": "laptop"}) == "Home-1.5:b_c+d"
    assert name_for("a/x", "n" * 64, {}) == "n" * 64
    with pytest.raises(BadInputError, match="a model called home runs from laptop already"):
        name_for("a/x", "home", {"home": "laptop"})
    for wrong in ("a/b", "two words", "n" * 65, "-x", "new\n", "é"):
        with pytest.raises(BadInputError, match="is no name"):
            name_for("a/x", wrong, {})


async def test_every_request_understands_name_and_path(house):
    a = house["a"].coordinator
    assert await a.run(RunOptions("owner/small", name="home"), quiet) == "home"
    (served,) = a.served()
    assert (served.name, served.model) == ("home", "owner/small")
    for known in ("home", "owner/small"):
        assert await a.run(RunOptions(known), quiet) == "home"
        assert (await a.figures.preview(RunOptions(known), quiet))["scenario"]["model"]
        assert (await a.figures.scenario(known))["stages"]
        with pytest.raises(BadInputError, match="started on device-a; stop it there"):
            await house["b"].coordinator.stop(known)
    with pytest.raises(BadInputError, match="already runs as home with other options; `peerllm stop home` first"):
        await a.run(RunOptions("owner/small", name="other"), quiet)
    with pytest.raises(NotFoundError):
        await a.stop("small")
    await a.stop("home")
    assert not a.served()


async def test_names_are_unique_in_the_household(house):
    a, b = house["a"].coordinator, house["b"].coordinator
    assert await a.run(RunOptions("owner/small"), quiet) == "small"
    assert await b.run(RunOptions("other/small"), quiet) == "small-2"
    assert [one.name for one in (view(house["a"]), view(house["b"]))] == ["small", "small-2"]
    assert await a.run(RunOptions("other/small"), quiet) == "small-3", "its own names count too"
    with pytest.raises(BadInputError, match="called small runs from device-a"):
        await b.run(RunOptions("small", name="small"), quiet)
    await b.stop("other/small")
    assert [one.name for one in a.served()] == ["small", "small-3"], "only its own was stopped"


async def test_no_name_is_the_path_of_another_model(house):
    a, b = house["a"].coordinator, house["b"].coordinator
    await a.run(RunOptions("small", name="tiny"), quiet)
    with pytest.raises(BadInputError, match="called small runs from device-a"):
        await b.run(RunOptions("owner/small", name="small"), quiet)
    assert await a.run(RunOptions("owner/small"), quiet) == "small-2"
    await a.stop("small")
    assert [one.model for one in a.served()] == ["owner/small"]


async def test_a_remembered_name_stays_and_is_numbered_where_it_was_taken(house):
    await house["a"].coordinator.run(RunOptions("owner/small", name="home"), quiet)
    await house["a"].coordinator.close()
    await house["b"].coordinator.run(RunOptions("other/small", name="home"), quiet)
    again = house["a"].restarted()
    await again.start()
    await house.until(lambda: again.views()[0].state == "serving")
    assert [one.name for one in again.served()] == ["home-2"]
    await house["b"].coordinator.stop("home")
    await again.close()
    again = house["a"].restarted()
    await again.start()
    assert [one.name for one in again.served()] == ["home"], "free again"


async def test_what_is_done_until_it_serves_is_seen(house):
    """Downloading and loading: in words and as a share, on every device; the context once it is planned."""
    a = house["a"]
    house.to_download["owner/small"] = 1000
    house.download_gate.clear()
    running = asyncio.create_task(a.coordinator.run(RunOptions("owner/small", context=64), quiet))
    await house.until(lambda: a.coordinator.views() and "40%" in view(a).message)
    assert (view(a).state, view(a).progress, view(a).context) == ("planning", 0.4, 0)
    (served,) = a.coordinator.served()
    assert (served.model_dir, served.progress) == (None, 0.4)
    assert served.message == "downloading owner/small, 1.00 kB: 40%"
    a.engine.gate.clear()
    house.download_gate.set()
    await house.until(lambda: view(a).state == "loading")
    assert view(a).progress == 0.0 and "loading" in view(a).message and view(a).context == 64
    a.engine.gate.set()
    await running
    assert (view(a).message, view(a).progress, view(a).context) == ("", 1.0, 64)


async def test_what_was_downloaded_is_no_progress_of_the_next_plan(house):
    a, seen = house["a"], []
    house.to_download["owner/small"] = 1000
    a.engine.fail = RefusedError("not now")

    def told(line):
        seen.append((line.message, view(a).progress))
        if len([message for message, _ in seen if message.startswith("planning for")]) == 2:
            a.engine.fail = None

    await a.coordinator.run(RunOptions("owner/small"), told)
    downloads, plans = [
        [done for message, done in seen if message.startswith(what)] for what in ("downloading", "planning for")
    ]
    assert max(downloads) > 0 and plans == [0.0, 0.0]
