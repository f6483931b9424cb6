"""The page in a real browser, over a scripted household."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from peerllm.api.server import ApiServer
from peerllm.api.token import load_or_create_token
from peerllm.errors import EngineError
from tests.api.fake import WEIGHTS, FakeHousehold, deployment, make_model_dir
from tests.web.browser import ENTER, Browser, available, browser

pytestmark = [pytest.mark.lab, pytest.mark.skipif(not available(), reason="no chromium with chromedriver")]
EVIL = '<img src=x onerror="window.hit=1"><script>window.hit=1</script>'
ANSWERED = "return !document.querySelector('.writing') && document.querySelectorAll('.stats').length == {}"


@pytest.fixture
async def household(tmp_path: Path) -> FakeHousehold:
    one = FakeHousehold(make_model_dir(tmp_path / "model"))
    for device in one.devices:
        device["state"] = "online"
    return one


@pytest.fixture
async def server(household: FakeHousehold, tmp_path: Path) -> AsyncIterator[ApiServer]:
    one = ApiServer(household, "127.0.0.1", 0, tmp_path / "data", in_process=True)
    await one.start()
    yield one
    await one.close()


@pytest.fixture
async def page(server: ApiServer) -> AsyncIterator[Browser]:
    """Open, with the household drawn; at the end the console must hold no complaint (content policy included)."""
    async with browser() as one:
        await one.open(server.url)
        await one.until("return document.querySelectorAll('#devices li').length == 3", "three devices")
        yield one
        complaints = [line for line in await one.complaints() if "Failed to load resource" not in line]
        assert complaints == []


async def test_a_question_is_typed_and_the_answer_streams_in(page: Browser, household: FakeHousehold) -> None:
    household.gate = asyncio.Event()
    await page.type("#prompt", "hi" + ENTER)
    await page.until("return document.querySelector('.message.user')?.innerText == 'hi'", "the question")
    await page.until("return !document.querySelector('#stop').hidden", "the stop button")
    household.gate.set()
    await page.until(ANSWERED.format(1), "the answer")
    assert await page.text(".message.assistant .text") == household.reply
    assert "tokens/s" in await page.text(".stats")
    await page.type("#prompt", "again" + ENTER)
    await page.until(ANSWERED.format(2), "the second answer")
    prompt = household.tokenizer.decode(list(household.requests[-1].prompt), skip_special_tokens=False)
    assert prompt.count(household.reply) == 1, "the conversation is sent along"
    await page.click("#new")
    await page.until(
        "return !document.querySelector('.message') && !document.querySelector('#welcome').hidden", "a new start"
    )


async def test_stop_cancels_the_sequence(page: Browser, household: FakeHousehold) -> None:
    household.endless, household.pace_s = True, 0.005
    await page.type("#prompt", "hi" + ENTER)
    await page.until("return document.querySelector('.text')?.innerText.length > 20", "some of the answer")
    await page.click("#stop")
    await asyncio.wait_for(household.closed.wait(), 15)
    await page.until(ANSWERED.format(1), "the end")
    assert "stopped" in await page.text(".stats")


async def test_the_examples_ask(page: Browser, household: FakeHousehold) -> None:
    assert await page.run("return document.querySelectorAll('.examples button').length") == 4
    assert "often wrong" in await page.text("#welcome")
    await page.click(".examples button")
    await page.until(ANSWERED.format(1), "the answer")


async def test_devices_and_layers_are_shown(page: Browser, household: FakeHousehold) -> None:
    assert await page.run("return [...document.querySelectorAll('.layers div')].map((one) => one.innerText)") == [
        "0–4",
        "5–9",
        "10–13",
    ]
    names = await page.run("return [...document.querySelectorAll('#devices .name')].map((one) => one.innerText)")
    assert names == ["laptop", "mini-pc", "jetson"]
    assert "12 MB used of 20 MB lent" in await page.text("#devices")
    assert "context 1,024 tokens" in await page.text("#deployments")
    household.devices[0]["promised_bytes"] = 7_000_000
    household.touch()
    await page.until("return document.querySelector('#devices').innerText.includes('7.0 MB used of 20 MB')", "its use")
    bars = "return [...document.querySelectorAll('#devices .bar i')].map((one) => one.style.width)"
    assert await page.run(bars) == ["35%", "60%", "60%"]
    assert f"weights: {WEIGHTS}" in await page.text("#deployments")
    assert "int8" not in await page.text("#deployments")
    household.deployments[0]["plan"]["activations"] = ["exact", "int8"]
    household.touch()
    await page.until("return document.querySelector('#deployments').innerText.includes('as int8 to jetson')", "int8")


async def test_what_a_model_or_a_device_says_stays_text(page: Browser, household: FakeHousehold) -> None:
    household.reply = EVIL
    household.devices[1]["name"] = EVIL
    household.deployments[0]["plan"]["stages"][1]["device"] = EVIL
    household.deployments[0].update(model=EVIL, reason=EVIL, coordinator=EVIL, weights=EVIL)
    household.served = [household.model, replace(household.model, name=EVIL, state="waiting", reason=EVIL)]
    household.touch()
    await page.until("return document.querySelector('#deployments').innerText.includes('<img')", "the names")
    await page.type("#prompt", EVIL + ENTER)
    await page.until(ANSWERED.format(1), "the answer")
    assert await page.text(".message.assistant .text") == EVIL
    assert await page.text(".message.user") == EVIL
    assert await page.run("return window.hit ?? 0") == 0
    assert await page.run("return document.querySelectorAll('main img, main script').length") == 0


async def test_an_error_midway_is_told(page: Browser, household: FakeHousehold) -> None:
    household.error_midway = EngineError("the engine on jetson died")
    await page.type("#prompt", "hi" + ENTER)
    await page.until("return document.querySelector('.message .error')", "the error")
    assert "the engine on jetson died" in await page.text(".message .error")
    assert await page.text(".message.assistant .text") == "Hell"


async def test_the_queue_and_a_lost_device_are_told(page: Browser, household: FakeHousehold) -> None:
    household.gate, household.queued = asyncio.Event(), [2]
    await page.type("#prompt", "hi" + ENTER)
    await page.until(
        "return document.querySelector('.waiting')?.innerText.includes('place 2')", "the place in the queue"
    )
    household.gate.set()
    household.devices[2]["state"] = "offline"
    household.served = [replace(household.model, state="waiting", reason="jetson is gone")]
    household.deployments[0].update(state="waiting", reason="jetson is gone")
    household.touch()
    await page.until("return document.querySelector('#banner').innerText.includes('jetson is gone')", "the banner")
    await page.until("return document.querySelectorAll('.away').length == 1", "the lost device")
    assert await page.run("return document.querySelector('#send').disabled")


async def test_an_answer_that_waits_says_why_until_it_goes_on(page: Browser, household: FakeHousehold) -> None:
    household.middle = asyncio.Event()
    gone = "mini-pc is gone; laptop and jetson take over its layers"
    cursor = "return getComputedStyle(document.querySelector('.writing .text'), '::after').content"
    await page.type("#prompt", "hi" + ENTER)
    await page.until("return document.querySelector('.text')?.innerText == 'Hell'", "some of the answer")
    assert await page.text(".waiting") == "" and await page.run("return document.body.classList.contains('busy')")
    assert await page.run(cursor) != "none"
    household.devices[1]["state"] = "offline"
    household.served = [replace(household.model, state="loading", message=gone, progress=0.5)]
    household.deployments[0].update(state="loading", message=gone, progress=0.5)
    household.touch()
    await page.until(f"return document.querySelector('.waiting').innerText == '{gone} (50%) …'", "why")
    assert await page.run("return document.querySelector('.text').innerText") == "Hell"
    assert await page.run(cursor) == "none", "no cursor that only stands still"
    assert not await page.run("return document.body.classList.contains('busy')"), "no light runs over the layers"
    await page.until("return document.querySelector('#deployments').innerText.includes('take over')", "the same words")
    assert gone in await page.text("#banner")
    waits = "waiting for mini-pc to come back: 8 MB are missing"
    household.served = [replace(household.model, state="waiting", reason=waits)]
    household.touch()
    await page.until(f"return document.querySelector('#banner').innerText == 'builtin is {waits}'", "the banner")
    await page.until(f"return document.querySelector('.waiting').innerText == '{waits} …'", "what it waits for")
    household.devices[1]["state"] = "online"
    household.served = [household.model]
    household.touch()
    await page.until("return document.querySelector('.waiting').innerText == ''", "nothing to wait for")
    household.middle.set()
    await page.until(ANSWERED.format(1), "the answer")
    assert await page.text(".message.assistant .text") == household.reply
    assert await page.run("return document.querySelectorAll('.waiting, .held').length") == 0


async def test_a_note_goes_away_with_the_next_token(page: Browser, household: FakeHousehold) -> None:
    household.middle = asyncio.Event()
    await page.type("#prompt", "hi" + ENTER)
    await page.until("return document.querySelector('.text')?.innerText == 'Hell'", "some of the answer")
    household.served = [replace(household.model, message="computing again what mini-pc held")]
    await page.until("return document.querySelector('.held .waiting')?.innerText.startsWith('computing')", "the note")
    household.pace_s, household.endless = 0.05, False
    household.middle.set()
    await page.until("return document.querySelector('.writing .text')?.innerText.length > 5", "the next tokens")
    assert await page.run("return document.querySelectorAll('.held').length") == 0
    assert await page.text(".waiting") == ""
    await page.until(ANSWERED.format(1), "the answer")


async def test_an_error_or_a_stop_ends_the_waiting(page: Browser, household: FakeHousehold) -> None:
    household.middle = asyncio.Event()
    household.served = [replace(household.model, message="nothing is heard of jetson, answers wait")]
    await page.type("#prompt", "hi" + ENTER)
    await page.until("return document.querySelector('.held .waiting')?.innerText.includes('jetson')", "the note")
    await page.click("#stop")
    await page.until(ANSWERED.format(1), "the end")
    assert await page.run("return document.querySelectorAll('.waiting, .held').length") == 0
    household.served, household.middle = [household.model], None
    await page.type("#prompt", "again" + ENTER)
    await page.until("return document.body.classList.contains('busy') || !document.querySelector('.writing')", "light")
    await page.until(ANSWERED.format(2), "the second answer")


async def test_invite_shows_the_code(page: Browser) -> None:
    await page.click("#invite")
    await page.until("return document.querySelector('.code')?.innerText == 'K7-4PQ9MX'", "the code")


async def test_the_built_in_model_is_started_from_the_page(
    page: Browser, household: FakeHousehold, server: ApiServer
) -> None:
    model, deployments = household.model, household.deployments
    household.served, household.deployments = [], []
    household.touch()
    await page.until(
        "return document.querySelector('#welcome button')?.innerText.startsWith('Start')", "the start button"
    )
    household.run_gate = asyncio.Event()
    await page.click("#welcome button")
    await page.until("return document.querySelector('#notices').innerText.includes('planning over 3')", "the progress")
    household.served, household.deployments = [model], deployments
    household.run_gate.set()
    household.touch()
    await page.until("return document.querySelector('#notices').hidden", "the end of the progress")
    await page.until("return document.querySelectorAll('.examples button:enabled').length == 4", "the examples")
    assert [one.model for one in household.runs] == ["builtin"]


async def test_a_run_that_fails_says_why_until_it_is_dismissed(page: Browser) -> None:
    await page.click("#load summary")
    await page.type("#run-model", "huge" + ENTER)
    await page.until(
        "return document.querySelector('#notices .error')?.innerText.includes('4.0 GB more')", "the reason"
    )
    await page.click("#notices button")
    await page.until("return document.querySelector('#notices').hidden", "nothing to tell")


async def test_several_models_can_be_started_and_each_tells_how_far_it_is(
    page: Browser, household: FakeHousehold
) -> None:
    household.run_gate = asyncio.Event()
    await page.click("#load summary")
    titles = "return [...document.querySelectorAll('#notices h2')].map((one) => one.innerText)"
    await page.type("#run-model", "org/one" + ENTER)
    await page.until("return document.querySelectorAll('#notices h2').length == 1", "the first")
    await page.run("document.querySelector('#run-model').value = ''")
    await page.type("#run-model", "two" + ENTER)
    await page.until("return document.querySelectorAll('#notices h2').length == 2", "the second")
    await page.type("#run-model", ENTER)
    await page.until(
        "return document.querySelector('#notices').innerText.includes('two is being started already')", "so"
    )
    assert await page.run(titles) == ["Starting org/one", "two is being started already"]
    assert [one.model for one in household.runs] == ["org/one", "two"]
    household.served = [household.model, replace(household.model, name="one", model="org/one")]
    household.run_gate.set()
    await page.until("return document.querySelector('#notices').hidden", "both run")


async def test_a_model_that_was_started_is_chosen_by_its_name(page: Browser, household: FakeHousehold) -> None:
    household.served = [household.model, replace(household.model, name="one", model="org/one")]
    await page.click("#load summary")
    await page.type("#run-model", "org/one" + ENTER)
    await page.until("return document.querySelector('#model').value == 'one'", "the choice")
    await page.until("return document.querySelector('#notices').hidden", "the end of the progress")


async def test_what_changes_is_changed_in_place(page: Browser, household: FakeHousehold) -> None:
    """The same elements stay, so a click that began before a change ends on them, and focus is kept."""
    await page.run(
        "window.kept = ['#deployments button', '#devices li:last-child', '.layers', '.examples button', 'option']"
        ".map((one) => [one, document.querySelector(one)]); document.querySelector('#deployments button').focus()"
    )
    household.deployments[0].update(
        reason="a reason that stands above the button", measured={"tokens_per_second": 99.0}
    )
    household.deployments.insert(0, deployment("another", "loading") | {"id": "e" * 32})
    household.devices[2]["state"] = "offline"
    household.devices.insert(1, household.devices.pop(2))
    household.served = [replace(household.model, name="a", model="a"), household.model]
    household.touch()
    await page.until("return document.querySelector('#deployments').innerText.includes('measured 99')", "the change")
    await page.until("return document.querySelectorAll('option').length == 2", "the second model")
    assert await page.run("return document.querySelectorAll('#deployments section').length") == 2
    assert await page.run("return window.kept.filter(([, one]) => !one.isConnected).map(([name]) => name)") == []
    assert await page.run("return document.activeElement == window.kept[0][1]")
    assert await page.run("return window.kept[1][1].className") == "away"
    assert await page.run("return document.querySelector('#model').value") == "builtin", "the choice stays"
    household.deployments[1].update(reason="", weights="")
    household.touch()
    await page.until("return !document.querySelector('#deployments').innerText.includes('a reason')", "no reason")
    assert await page.run("return document.activeElement == window.kept[0][1]")
    await page.run("window.kept[0][1].click()")
    await page.until("return document.querySelector('#notices').hidden", "no error")
    assert household.calls == [("stop", "builtin")]


async def test_a_download_is_seen(page: Browser, household: FakeHousehold) -> None:
    household.deployments[0].update(
        name="big", model="org/big", state="planning", progress=0.42, message="downloading org/big: 42%", plan={}
    )
    household.touch()
    await page.until(
        "return document.querySelector('#deployments').innerText.includes('downloading org/big: 42%')", "it"
    )
    assert await page.run("return document.querySelector('#deployments .bar i').style.width") == "42%"
    assert await page.run("return document.querySelector('#deployments h2').innerText") == "big"


async def test_one_may_ask_while_the_model_is_loaded(page: Browser, household: FakeHousehold) -> None:
    household.served = [replace(household.model, state="planning", model_dir=None)]
    household.touch()
    await page.until("return document.querySelector('#banner').innerText.includes('You can ask now')", "the banner")
    await page.type("#prompt", "hi" + ENTER)
    await page.until("return document.querySelector('.waiting')?.innerText == 'planning …'", "what it waits for")
    household.served = [replace(household.model, state="loading", message="loading on laptop", progress=0.5)]
    household.touch()
    await page.until("return document.querySelector('.waiting')?.innerText == 'loading on laptop (50%) …'", "progress")
    household.served = [household.model]
    household.touch()
    await page.until(ANSWERED.format(1), "the answer")
    assert await page.text(".message.assistant .text") == household.reply


async def test_a_device_has_one_colour_on_every_page(page: Browser, household: FakeHousehold) -> None:
    """By its id, whatever the order in which a page's device lists them; no two alike."""
    colours = (
        "return Object.fromEntries([...document.querySelectorAll('#devices li')]"
        ".map((one) => [one.querySelector('.name').innerText, one.style.getPropertyValue('--device')]))"
    )
    household.devices[2]["id"] = "08" * 32  # its first choice is that of "00" * 32
    household.devices.reverse()
    household.touch()
    await page.until("return document.querySelector('#devices .name').innerText == 'jetson'", "the other order")
    seen = await page.run(colours)
    assert seen == {"laptop": "var(--d0)", "jetson": "var(--d1)", "mini-pc": "var(--d2)"}
    household.devices.reverse()
    household.touch()
    await page.until("return document.querySelector('#devices .name').innerText == 'laptop'", "the first order")
    assert await page.run(colours) == seen


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
async def test_nothing_is_wider_than_the_screen(page: Browser, household: FakeHousehold, width: int) -> None:
    household.reply = "x" * 120
    household.devices[1]["name"] = "a-device-with-a-very-long-name-that-nobody-would-type-by-hand"
    household.touch()
    await page.look(width, 800)
    await page.type("#prompt", "y" * 60 + ENTER)
    await page.until(ANSWERED.format(1), "the answer")
    assert await page.run("return document.documentElement.scrollWidth") <= width
    if width < 800:
        await page.click("#toggle")
        await page.until(
            "return getComputedStyle(document.querySelector('#household')).visibility == 'visible'", "the panel"
        )
        assert await page.run("return document.querySelector('#household').scrollWidth") <= width


async def test_beyond_loopback_the_link_with_the_token_signs_in(household: FakeHousehold, tmp_path: Path) -> None:
    server = ApiServer(household, "0.0.0.0", 0, tmp_path / "open", in_process=True)
    await server.start()
    async with browser() as page:
        await page.open(f"{server.url}/?token={load_or_create_token(tmp_path / 'open')}")
        await page.until("return document.querySelectorAll('#devices li').length == 3", "three devices")
        assert "token" not in await page.run("return location.href")
        await page.type("#prompt", "hi" + ENTER)
        await page.until(ANSWERED.format(1), "the answer")
    await server.close()


async def test_an_element_takes_over_all_that_a_fresh_one_has(page: Browser) -> None:
    """Attributes that are gone, handlers, style, text; children that are gone, reordered or of another kind."""
    found = await page.run("""return import('/static/dom.js').then(({ make, update }) => {
      const box = make('div', {});
      const clicks = [];
      const draw = (number, disabled, title) => update(box,
        make('button', { key: 'b', disabled, ...(title && { title }), vars: { width: `${number}px` },
                         onclick: () => clicks.push(number) }, `text ${number}`),
        number === 1 && make('p', {}, 'gone'), number === 1 && make('p', {}, 'gone too'),
        number === 1 ? make('i', {}, 'kind') : make('b', {}, 'kind'));
      draw(1, true, 'one');
      const button = box.firstChild;
      draw(2, false, '');
      button.click();
      return [button === box.firstChild, box.innerHTML, clicks];
    })""")
    assert found == [True, '<button data-key="b" style="width: 2px;">text 2</button><b>kind</b>', [2]]
