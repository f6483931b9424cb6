"""What a device does about lost coordinators: the real decider, whose waits are cut to nothing, among fakes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peerllm.daemon.control_messages import Answer, AnswerCopied, AnswerGrew, DeploymentView, Inherit, Vote
from peerllm.daemon.decide.succession import followed_deployment as when
from peerllm.daemon.decide.succession.succession_events import CoordinatedPlan
from peerllm.daemon.facade import Chunk, GenerateRequest, InheritedAnswer, RunOptions
from peerllm.daemon.successor import successor as module
from peerllm.daemon.successor.successor import Successor
from peerllm.errors import LinkError, NotFoundError, RefusedError, UnavailableError
from peerllm.types import Sampling, Stage

D, OPTIONS = "d" * 32, RunOptions("big", name="big")
PLAN = CoordinatedPlan(D, "a", ("a", "b", "c"), 5, serving=True)
EPOCH = PLAN.epoch + when.EPOCHS_OF_TERM
COPY = AnswerCopied(D, "one", (1, 2), 9, Sampling(), "me", "kept", (7,))


def view(coordinator: str = "a", devices: str = "abc", epoch: int = 5, **more: Any) -> DeploymentView:
    stages = tuple(Stage(device, 2 * number, 2 * number + 1) for number, device in enumerate(devices))
    return DeploymentView(**{
        "deployment": D, "model": "big", "state": "serving", "epoch": epoch, "coordinator": coordinator,
        "stages": stages, "stage_memory_bytes": (), **more,
    })  # fmt: skip


class Equipment:
    """Has what is asked for at once; notes what it is told."""

    def __init__(self, store: Any, models: Any, ask: Any, equipped: Any) -> None:
        self.equipped, self.calls = equipped, list[tuple[Any, ...]]()
        self.have = dict[str, Any]()

    def get(self, deployment: str) -> Any:
        return self.have.get(deployment)

    def follow(self, deployment: str, need: Any) -> None:
        if ("follow", deployment, need) not in self.calls:
            self.calls.append(("follow", deployment, need))

    def pause(self, deployment: str) -> None:
        self.calls.append(("pause", deployment))

    def forget(self, deployment: str) -> None:
        self.calls.append(("forget", deployment))

    def arrive(self, deployment: str) -> None:
        self.have[deployment] = SimpleNamespace(inheritance=SimpleNamespace(options=OPTIONS, created=7), at_hand="hand")
        self.equipped(deployment)

    async def close(self) -> None:
        pass


class Around:
    """The daemon's parts; `done` is what was asked of them, in order."""

    def __init__(self, data_dir: Path, me: str) -> None:
        self.done: list[tuple[Any, ...]] = []
        self.changed = asyncio.Event()
        self.others = {device: None for device in "abc" if device != me}
        self.votes: dict[str, Exception | None] = {}  # why a device refuses
        self.gate = asyncio.Event()  # what is given way ends when it is open
        self.feasible, self.sought = True, asyncio.Event()
        self.sought.set()
        self.took_part: dict[str, frozenset[str]] = {}
        self.own: tuple[DeploymentView, ...] = ()
        self.streaming: dict[str, bool] = {}
        self.settings = SimpleNamespace(data_dir=data_dir)
        self.digests = self.store = None
        self.home = SimpleNamespace(me=me, name=lambda d: f"device-{d}", outlines=SimpleNamespace(root=data_dir))
        self.network = self.coordinator = self.worker = self

    def note(self, *what: Any) -> None:
        self.done.append(what)
        self.changed.set()

    async def until(self, *what: Any) -> None:
        async with asyncio.timeout(10):
            while what not in self.done:
                self.changed.clear()
                await self.changed.wait()

    # the network
    def peers(self) -> dict[str, None]:
        return self.others

    def kept_busy(self, device: str, seconds: float) -> None: ...

    def tell(self, device: str, message: Any) -> None:
        self.note("tell", device, message)

    async def ask(self, device: str, question: Vote, timeout_s: float) -> Answer:
        self.note("ask", device, question.term)
        await asyncio.sleep(0)
        if (refusal := self.votes.get(device)) is not None:
            raise refusal
        return Answer(0)

    # the coordinator
    def views(self) -> tuple[DeploymentView, ...]:
        return self.own

    def told(self, device: str, holdings: Any) -> None:
        self.note("told", device, holdings)

    def take_over(self, *asked: Any) -> None:
        self.note("take over", *asked)

    def serve_anew(self, *asked: Any) -> str:
        self.note("serve anew", *asked)
        return "e" * 32

    async def could_serve(self, *asked: Any) -> bool:
        self.note("could serve", *asked)
        await self.sought.wait()
        return self.feasible

    def stay(self, deployment: str) -> None:
        self.note("stay", deployment)

    def drain(self, *asked: Any) -> None:
        self.note("drain", *asked)

    async def give_way(self, deployment: str) -> None:
        self.note("give way", deployment)
        await self.gate.wait()
        self.own = ()

    def left(self, deployment: str) -> Any:
        if not self.own:
            raise NotFoundError("no such deployment runs here")
        return OPTIONS, 7, SimpleNamespace(form="", inspected="inspected", model_dir=Path("/model"))

    # the worker
    def holdings(self) -> str:
        return "holdings"

    def obey(self, deployment: str, coordinator: str) -> None:
        if ("obey", deployment, coordinator) != next((one for one in self.done[::-1] if one[0] == "obey"), None):
            self.note("obey", deployment, coordinator)

    async def let_go(self, deployment: str) -> None:
        self.note("let go", deployment)


@pytest.fixture
async def make(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "Equipment", Equipment)
    for name in ("GONE_S", "SILENT_S", "TURN_S", "ANEW_S"):
        monkeypatch.setattr(when, name, 0.0)
    made: list[Successor] = []

    def follower(me: str = "b", devices: str = "abc", equipped: bool = True) -> tuple[Successor, Around, Equipment]:
        around = Around(tmp_path, me)
        one = Successor(around)
        made.append(one)
        for other in set(devices) - {me}:
            one.presence(other, "online")
        if me != "a":
            one.told("a", [view(devices=devices)])
            if equipped:
                one._equipment.arrive(D)
        return one, around, one._equipment

    yield follower
    for one in made:
        await one.close()


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def names(around: Around) -> list[str]:
    return [one[0] for one in around.done if one[0] not in ("obey", "told")]


async def test_with_votes_it_takes_over_what_is_loaded_and_the_answers(make):
    one, around, _ = make()
    answers: list[InheritedAnswer] = []
    one.handler = answers.append
    one.hear("a", COPY)
    one.hear("a", AnswerGrew(D, "one", 1, (8,)))
    one.hear("c", AnswerGrew(D, "one", 2, (9,)))  # whom it does not obey
    one.presence("a", "gone")
    await around.until("take over", OPTIONS, "hand", D, EPOCH, 7)
    assert ("ask", "c", 1) in around.done
    assert ("ask", "a", 1) not in around.done
    assert around.done.index(("told", "b", "holdings")) < around.done.index(("take over", OPTIONS, "hand", D, EPOCH, 7))
    assert around.done.index(("obey", D, "b")) < around.done.index(("take over", OPTIONS, "hand", D, EPOCH, 7))
    assert [(answer.deployment, list(answer.ids)) for answer in answers] == [(D, [7, 8])]


@pytest.mark.parametrize("refusal", [RefusedError("it hears its coordinator"), LinkError("no answer")])
async def test_without_votes_it_asks_again_and_takes_nothing_over(make, monkeypatch, refusal):
    monkeypatch.setattr(when, "VOTE_S", 0.01)
    one, around, _ = make()
    around.votes["c"] = refusal
    one.presence("a", "gone")
    await around.until("ask", "c", 2)
    assert "take over" not in names(around)
    around.votes.clear()
    async with asyncio.timeout(10):
        while "take over" not in names(around):
            around.changed.clear()
            await around.changed.wait()


async def test_where_the_others_cannot_hold_the_model_a_silent_coordinator_is_waited_for(make):
    one, around, _ = make()
    around.feasible = False
    one.presence("a", "silent")
    await around.until("could serve", OPTIONS, "hand", D)
    await turns()
    one.presence("a", "online")
    await turns()
    assert names(around) == ["could serve"]
    around.feasible = True
    one.presence("a", "silent")
    await around.until("take over", OPTIONS, "hand", D, EPOCH, 7)


async def test_a_coordinator_that_is_back_before_it_is_known_whether_they_can_is_not_followed(make):
    one, around, _ = make()
    around.sought.clear()
    one.presence("a", "silent")
    await around.until("could serve", OPTIONS, "hand", D)
    one.presence("a", "online")
    around.sought.set()
    await turns()
    assert names(around) == ["could serve"]


async def test_of_two_the_survivor_lets_go_and_serves_anew_with_the_answers(make):
    one, around, _ = make(devices="ab")
    answers: list[InheritedAnswer] = []
    one.handler = answers.append
    one.hear("a", COPY)
    one.presence("a", "gone")
    await around.until("serve anew", OPTIONS, "hand", D, 7, ("a", "b"))
    await turns()
    assert names(around) == ["could serve", "let go", "serve anew"]
    assert [answer.deployment for answer in answers] == ["e" * 32]


async def test_a_vote_is_obeyed_at_once(make):
    one, around, _ = make("c")
    with pytest.raises(RefusedError, match="its coordinator is heard here"):
        await one.answer("b", Vote(PLAN, 1))
    assert ("obey", D, "b") not in around.done
    around.sought.clear()
    one.presence("a", "silent")
    assert await one.answer("b", Vote(PLAN, 1)) == Answer(0)
    assert around.done[-1] == ("obey", D, "b")


async def test_it_goes_on_when_whom_it_drains_for_has_let_go(make):
    one, around, _ = make("a")
    around.own, around.streaming = (view(),), {D: True}
    one.look()
    one.told("b", [view("b", epoch=EPOCH)])
    one.told("c", [], {D: "b"})
    assert ("drain", D, "device-b") in around.done
    one.told("b", [])
    assert around.done[-1] == ("drain", D, "")
    around.streaming = {D: False}
    one.look()
    await turns()
    assert "give way" not in names(around)


async def test_it_drains_and_gives_way_when_its_answers_have_ended(make):
    one, around, _ = make("a")
    around.own, around.streaming = (view(),), {D: True}
    one.look()
    one.told("b", [view("b", epoch=EPOCH)])
    one.told("c", [], {D: "b"})
    assert ("drain", D, "device-b") in around.done
    await turns()
    assert "let go" not in names(around)
    around.streaming = {D: False}
    one.look()
    await around.until("give way", D)
    one.look()
    one.told("b", [view("b", epoch=EPOCH)])
    await turns()
    assert names(around) == ["drain", "let go", "give way"], "once, what is loaded first"
    assert around.done.index(("obey", D, "b")) < around.done.index(("let go", D))
    around.gate.set()
    await turns()
    around.own = (view(epoch=EPOCH + 9),)  # a person starts it again
    around.streaming = {}
    one.look()
    assert around.done[-1] == ("obey", D, "a")


async def test_what_was_begun_anew_stays_where_the_other_does_not_serve(make):
    one, around, _ = make()
    one.presence("a", "silent")
    around.own = (view("b", devices="b", deployment="e" * 32, succeeds=D),)
    one.look()
    one.presence("a", "online")
    one.told("a", [view(state="waiting")])
    assert ("stay", "e" * 32) in around.done


@pytest.mark.parametrize(("me", "to", "own", "other"), [
    ("a", "b", {}, {"epoch": EPOCH}),
    ("b", "a", {"deployment": "e" * 32, "succeeds": D, "devices": "b"}, {}),
])  # fmt: skip
async def test_what_breaks_off_where_it_gives_way_is_left_to_the_one_that_goes_on(make, me, to, own, other):
    one, around, _ = make(me)
    one.presence(to, "silent")
    around.own = (view(me, **own),)
    around.streaming = {around.own[0].deployment: True}
    one.look()
    request = GenerateRequest(around.own[0].deployment, (1, 2), 9, Sampling(), client="me", kept="kept")

    async def broken():
        yield Chunk((7,))
        one.presence(to, "online")
        one.told(to, [view(to, **other)])
        one.told("c", [], {D: to})
        raise UnavailableError("the other serves it now")

    with pytest.raises(UnavailableError):
        async for _ in one.copies.copied(request, broken()):
            pass
    (told,) = [what[2] for what in around.done if what[:2] == ("tell", to)]
    assert (told.deployment, told.prompt, told.ids, told.kept) == (D, (1, 2), (7,), "kept")


async def test_answers_are_taken_from_a_device_that_had_a_part_and_gives_way(make):
    one, around, _ = make()
    answers: list[InheritedAnswer] = []
    one.handler = answers.append
    one.presence("a", "gone")
    await around.until("take over", OPTIONS, "hand", D, EPOCH, 7)
    one.hear("x", COPY)
    one.hear("a", AnswerGrew(D, "one", 0, (7,)))
    assert answers == []
    one.hear("a", COPY)
    assert [(answer.deployment, list(answer.ids)) for answer in answers] == [(D, [7])]


async def test_after_a_restart_it_gives_way_to_who_had_a_part_before(make):
    one, around, _ = make("a")
    around.own, around.took_part = (view(devices="", state="planning", epoch=1005),), {D: frozenset("abc")}
    one.look()
    one.told("x", [view("x", epoch=EPOCH + 1)])
    assert names(around) == []
    one.told("c", [view("c", epoch=EPOCH)])
    one.told("b", [], {D: "c"})
    assert ("drain", D, "device-c") in around.done


async def test_only_a_coordinators_own_word_counts(make):
    one, around, _ = make("c")
    one.told("b", [view("x"), view("a", epoch=9)])
    assert ("obey", D, "x") not in around.done
    one.told("b", [])
    one.presence("a", "gone")
    await around.until("take over", OPTIONS, "hand", D, EPOCH, 7)


async def test_what_its_coordinator_stopped_is_neither_followed_nor_kept(make):
    one, around, equipment = make()
    one.told("a", [])
    assert ("forget", D) in equipment.calls
    one.presence("a", "gone")
    await turns()
    assert names(around) == []


async def test_it_has_ready_what_only_the_coordinator_holds_while_that_is_there(make):
    one, _, equipment = make(equipped=False)
    assert equipment.calls == [("follow", D, ("a", frozenset({2, 3, 4, 5})))]
    one.told("a", [view(devices="ab", epoch=6)])
    assert equipment.calls[-1] == ("follow", D, ("a", frozenset({2, 3})))
    one.told("a", [view(state="waiting", stages=(), epoch=7)])
    assert len(equipment.calls) == 2, "what is not planned now keeps its devices"
    one.presence("a", "silent")
    assert equipment.calls[-1] == ("pause", D)
    one.presence("a", "online")
    one.told("a", [view(devices="xyab")])
    assert equipment.calls[-1] == ("pause", D), f"only {module.FOLLOWERS} follow"


async def test_a_device_that_lends_nothing_does_not_follow(make):
    one, around, equipment = make()
    one.lends(False)
    one.presence("a", "gone")
    equipment.equipped(D)
    await turns()
    assert names(around) == []
    one.lends(True)
    await around.until("take over", OPTIONS, "hand", D, EPOCH, 7)


async def test_it_leaves_what_it_has_to_devices_of_the_plan_alone(make, monkeypatch):
    async def leave(home, digests, place, inheritance, model_dir, busy):
        assert (place.name, inheritance.options, model_dir) == (D, OPTIONS, Path("/model"))
        return ("files",)

    monkeypatch.setattr(module, "leave", leave)
    one, around, _ = make("a")
    with pytest.raises(RefusedError, match="only a device of its plan"):
        await one.answer("b", Inherit(D))
    around.own = (view(),)
    one.look()
    with pytest.raises(RefusedError, match="only a device of its plan"):
        await one.answer("x", Inherit(D))
    assert (await one.answer("c", Inherit(D))).inherited == ("files",)
    assert not one.goes_on(D)
    await one.answer("c", Inherit(D, complete=True))
    await one.answer("b", Inherit(D, complete=True))
    assert one._successor(D) == "b", "the first in the plan's order"
    one.presence("b", "silent")
    assert one._successor(D) == "c"
    one.presence("c", "gone")
    assert not one.goes_on(D)


async def test_one_that_starts_waits_until_the_others_have_spoken(make, monkeypatch):
    monkeypatch.setattr(module, "RETURN_S", 20.0)
    one, _, _ = make("c", equipped=False)
    waiting = asyncio.ensure_future(one.others_heard())
    await turns()
    assert not waiting.done()
    one.told("b", [])
    async with asyncio.timeout(10):
        await waiting


async def test_but_not_for_long(make, monkeypatch):
    monkeypatch.setattr(module, "RETURN_S", 0.01)
    one, _, _ = make("c", equipped=False)
    async with asyncio.timeout(10):
        await one.others_heard()


async def test_closing_ends_what_is_being_asked(make):
    one, around, _ = make()
    around.sought.clear()
    one.presence("a", "silent")
    await around.until("could serve", OPTIONS, "hand", D)
    await one.close()
    await one.close()
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "seek service"]
