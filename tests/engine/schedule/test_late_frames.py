"""What comes late from an epoch that a sequence has left changes nothing; what is lost is computed again, no more.

Each test is a short story told frame by frame, where the random histories (test_epochs_random.py) come seldom.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from peerllm.engine import base
from peerllm.engine.messages import CarryState, Hop, Submit, Tokens
from peerllm.engine.schedule import running_sequence
from peerllm.engine.schedule.source_feed import MOST_PATIENCE_S
from peerllm.engine.schedule.state_export import StateExport
from peerllm.engine.wire.parcels import Opened
from peerllm.types import Sampling
from tests.engine.fakes import DEPLOYMENT
from tests.engine.schedule.adding_devices import World, expected
from tests.engine.state.test_reuse_random import SLACK

Wires = Sequence[tuple[int, int]]  # each by its epoch and the stage that sends
CUT = [(0, 1), (1, 3), (0, 4)]  # (device, last layer): the second device holds layers 2 and 3
ELSEWHERE = [(0, 1), (2, 3), (0, 4)]
PROMPT = [1, 2, 3, 1, 0, 2, 2, 3, 1, 1]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "ROLLBACK_TOKENS", SLACK)
    monkeypatch.setattr(running_sequence, "TAIL", 2)
    monkeypatch.setattr(running_sequence, "LEAST_BEFORE_SNAPSHOT", 2)


class Story:
    """One household in its first epoch."""

    def __init__(self, kind: str = "full", cut: list[tuple[int, int]] = CUT) -> None:
        self.world = World(kind, 2)
        self.world.load(cut)

    def asks(self, number: int, prompt: Sequence[int] = PROMPT, count: int = 8) -> None:
        order = Submit(DEPLOYMENT, number, tuple(prompt), count, (), Sampling(), "anna")
        self.world.devices[0].deployment.submit(order)

    def told(self, number: int) -> list[Tokens]:
        return [one for one in self.world.told if isinstance(one, Tokens) and one.sequence == number]

    def said(self, number: int) -> list[int]:
        return [token for told in self.told(number) for token in told.ids]

    def all_but(self, held: Wires = (), until: int = 99, number: int = 1) -> None:
        """Everything goes on, but for frames on `held` wires, until the sequence has said so many tokens."""
        moved = True
        while moved and len(self.said(number)) < until:
            moved = False
            for key, wire in self.world.wires.items():
                if wire.frames and key not in held:
                    self.world.deliver(key)
                    moved = True
            moved = any([self.world.compute(home) for home in range(len(self.world.devices))]) or moved

    def frames(self, wire: tuple[int, int]) -> int:
        return len(self.world.wires[wire].frames)

    def plan(self, cut: list[tuple[int, int]]) -> None:
        """Another epoch, loaded beside the others, in which sequences are fed from now on."""
        self.world.load(cut)
        self.world.switch(self.world.epoch)

    def carries(self, home: int, to: int, layer: int, stage: int) -> None:
        """What a device keeps in a layer goes to a stage of the last epoch."""
        epoch, there = self.world.epoch, Hop(str(to) * 64, (), 1, stage)
        export = StateExport(CarryState(1, DEPLOYMENT, epoch - 1, layer, layer, epoch, there))
        while parts := export.turn(self.world.devices[home].deployment):
            for carried in parts:
                self.world.devices[to].deployment.state_came(epoch, stage, carried)

    def waits_long(self) -> None:
        """What has not come back from the epoch that is left is given up."""
        self.world.devices[0].deployment.feed._old_at -= MOST_PATIENCE_S + 1
        self.world.devices[0].deployment.hurry()

    def dropped(self, home: int) -> int:
        return self.world.devices[home].counts.dropped_frames

    def replayed(self) -> int:
        return sum(device.counts.replayed_tokens for device in self.world.devices)

    def is_over(self, number: int, prompt: Sequence[int] = PROMPT, count: int = 8) -> None:
        """With the tokens that an undisturbed sequence says."""
        assert self.said(number) == expected(self.world.kind, prompt, count)
        assert self.told(number)[-1].finish == "length"


def test_an_open_of_an_epoch_that_was_left_comes_after_that_of_the_next() -> None:
    story = Story()
    story.asks(1)
    assert story.frames((1, 0)) == 1
    story.plan(CUT)
    story.waits_long()
    story.all_but(held=[(1, 0), (2, 1)])
    assert story.frames((2, 1)) > 1, "the second device has computed in the new epoch"
    story.world.deliver((1, 0))
    assert story.dropped(1) == 1
    story.all_but()
    story.is_over(1)


def test_an_open_comes_late_for_a_slot_that_another_sequence_has_by_now() -> None:
    story = Story()
    story.asks(1)
    story.world.devices[0].deployment.cancel(1)
    story.plan(CUT)
    story.waits_long()
    story.asks(2)
    story.all_but(held=[(1, 0)], until=3, number=2)
    story.world.deliver((1, 0))
    assert story.dropped(1) == 1
    story.all_but(number=2)
    story.is_over(2)


def test_a_step_of_an_epoch_that_was_left_comes_before_that_of_the_next() -> None:
    story = Story()
    story.asks(1)
    story.all_but(until=3)
    story.all_but(held=[(1, 0)])
    assert story.frames((1, 0)) == 1, "a step"
    story.plan(CUT)
    story.waits_long()
    story.world.deliver((2, 0))
    story.world.deliver((1, 0))
    assert story.dropped(1) == 1
    story.all_but()
    story.is_over(1)


def test_a_token_of_an_epoch_that_was_left_comes_before_that_of_the_next() -> None:
    story = Story(cut=[(0, 1), (1, 4)])
    story.asks(1)
    story.all_but(until=3)
    story.all_but(held=[(1, 1)])
    assert story.frames((1, 1)) == 1
    story.plan([(0, 1), (1, 4)])
    story.waits_long()
    story.world.deliver((1, 1))
    assert story.dropped(0) == 1 and len(story.said(1)) == 3
    story.all_but()
    story.is_over(1)


@pytest.mark.parametrize("newest_ends", [False, True])
def test_what_stages_lack_is_known_when_their_epoch_was_left_again(newest_ends: bool) -> None:
    story = Story()
    story.asks(1)
    story.all_but(until=3)
    story.plan(ELSEWHERE)
    story.all_but(held=[(2, 1)])
    assert story.frames((2, 1)) >= 1, "its OPEN, which says that the third device lacks all"
    story.plan(CUT)
    if newest_ends:
        for device in story.world.devices:
            if 3 in device.deployment.rings:
                device.deployment.unload(3, only=True)
        for stage in (0, 1):
            del story.world.wires[3, stage]
    story.all_but(held=[] if newest_ends else [(3, 0)])
    if newest_ends:
        story.world.switch(2)
    story.all_but()
    story.is_over(1)
    assert not story.world.devices[0].deployment.feed._switches


def test_layers_that_are_computed_again_keep_the_snapshot_again() -> None:
    """A later turn that goes back to the end of the first prompt computes only what is new."""
    story = Story("recurrent")
    story.asks(1)
    story.all_but(until=2)
    story.plan(ELSEWHERE)
    story.all_but()
    story.is_over(1)
    assert (replayed := story.replayed()) > 0
    another = [*PROMPT[:9], 0, 0, 1]
    story.asks(2, another, 4)
    story.all_but(number=2)
    story.is_over(2, another, 4)
    assert story.told(2)[0].reused == len(PROMPT) - 2 and story.replayed() == replayed


def test_layers_that_are_computed_again_keep_a_snapshot_that_was_there_before() -> None:
    """One that an earlier turn had left in the slot."""
    story = Story("recurrent")
    story.asks(1, count=5)
    story.all_but()
    second, third = [*PROMPT[:8], 3, 3, 1], [*PROMPT[:8], 2, 0, 3]
    story.asks(2, second, 5)
    story.all_but(until=2, number=2)
    assert story.told(2)[0].reused == 8
    story.plan(ELSEWHERE)
    story.all_but(number=2)
    story.is_over(2, second, 5)
    assert (replayed := story.replayed()) > 0
    story.asks(3, third, 4)
    story.all_but(number=3)
    story.is_over(3, third, 4)
    assert story.told(3)[0].reused == 8 and story.replayed() == replayed


def test_a_turn_that_is_cancelled_early_leaves_the_snapshot_that_it_began_with() -> None:
    story = Story("recurrent")
    story.asks(1, count=5)
    story.all_but()
    story.asks(2, [*PROMPT[:8], *PROMPT, *PROMPT, *PROMPT[1:]], 3)
    story.world.devices[0].deployment.cancel(2)
    story.all_but()
    third = [*PROMPT[:8], 2, 0, 3]
    story.asks(3, third, 4)
    story.all_but(number=3)
    story.is_over(3, third, 4)
    assert story.told(3)[0].reused == 8


def test_what_an_earlier_turn_left_elsewhere_is_no_part_of_one_that_parted_from_it() -> None:
    """The second device still has the first turn, of which the second turn shares only the beginning."""
    story, second = Story(), [*PROMPT[:8], 3, 3, 1]
    story.asks(1, count=5)
    story.all_but()
    story.plan(ELSEWHERE)
    story.asks(2, second)
    story.all_but(until=3, number=2)
    assert story.told(2)[0].reused == 8
    story.plan(CUT)
    story.all_but(number=2)
    story.is_over(2, second)


def test_a_prompt_that_is_under_way_is_fed_no_further_until_it_changes_its_epoch() -> None:
    story, prompt = Story(), [*PROMPT, *PROMPT, *PROMPT]
    story.asks(1, prompt, 5)
    story.plan(CUT)
    story.all_but()
    story.is_over(1, prompt, 5)
    assert not any(story.dropped(home) for home in range(3))


def test_what_was_under_way_when_links_broke_does_not_count_when_they_stand_again() -> None:
    story = Story(cut=[(0, 1), (1, 4)])
    story.asks(1)
    story.all_but(until=3)
    story.all_but(held=[(1, 1)])
    assert story.frames((1, 1)) == 1, "a token"
    late = story.world.wires[1, 1]
    story.world.devices[0].deployment.rings[1].lost("1" * 64, None, "cut")
    story.world.devices[0].deployment.linked(1, {0: story.world.wires[1, 0]})
    story.world.deliver((1, 1))
    assert not late.frames and story.dropped(0) == 1 and len(story.said(1)) == 3
    story.all_but()
    story.is_over(1)


def test_nobody_of_an_epoch_that_was_left_says_what_stages_of_the_next_lack() -> None:
    story = Story()
    story.asks(1)
    story.all_but(until=3)
    story.plan(CUT)
    story.waits_long()
    source = story.world.devices[0].deployment
    number = source.feed.sequences._running[1].attempt
    source.rings[1].give(3, Opened(1, 0, Sampling(), attempt=number, lacking=3))
    story.all_but()
    story.is_over(1)
    assert not story.replayed()


def test_a_step_that_waits_for_a_batch_changes_its_epoch_at_once() -> None:
    story = Story()
    story.asks(1)
    story.asks(2, PROMPT[1:])
    story.all_but(until=1, number=2)
    assert story.world.devices[0].deployment.feed._turns.waits(2), "the other's step is under way"
    story.plan(CUT)
    assert story.world.devices[0].deployment.feed.sequences.epoch_of(2) == 2
    story.all_but()
    story.is_over(1)
    story.is_over(2, PROMPT[1:])


def test_what_was_cancelled_in_an_epoch_that_broke_counts_as_under_way_no_more() -> None:
    story = Story()
    story.asks(1, [*PROMPT, *PROMPT, *PROMPT])
    story.world.devices[0].deployment.cancel(1)
    story.world.break_wire((1, 0))
    story.plan(CUT)
    story.asks(2)
    story.all_but(number=2)
    story.is_over(2)


def test_sequences_of_an_epoch_that_breaks_after_it_was_left_go_on_at_once() -> None:
    story = Story()
    story.asks(1)
    story.all_but(until=3)
    story.plan(CUT)
    story.all_but(held=[(1, 0), (1, 1)])
    story.world.break_wire((1, 0))
    story.all_but()
    story.is_over(1)


def test_windows_that_cannot_go_back_to_what_another_stage_still_has_compute_all_again() -> None:
    """The second device had the sequence some epochs ago; the windows before its layers have slid since."""
    story = Story("window")
    story.asks(1, count=14)
    story.all_but(until=2)
    story.plan(ELSEWHERE)
    story.all_but(until=8)
    before = story.world.devices[1].counts.replayed_tokens
    story.plan(CUT)
    story.all_but()
    story.is_over(1, count=14)
    assert story.world.devices[1].counts.replayed_tokens - before >= len(PROMPT) + 8


@pytest.mark.parametrize("under_way", [False, True])
def test_recurrent_layers_that_are_cut_anew_and_moved_go_on_from_their_snapshot(under_way: bool) -> None:
    """Layer 2 is loaded anew where it was, 3 and 4 come from two devices to a third."""
    story, prompt = Story("recurrent", [(0, 1), (1, 3), (2, 4)]), [*PROMPT, *PROMPT[:6]]
    story.asks(1, prompt)
    story.all_but(until=3)
    story.all_but(held=[(1, 1)])
    story.world.load([(0, 1), (1, 2), (3, 4)])
    story.carries(1, 3, 3, 2)
    story.carries(2, 3, 4, 2)
    if not under_way:
        story.all_but(until=4)
    story.world.switch(2)
    story.waits_long()
    story.all_but()
    story.is_over(1, prompt)
    snapshot, computed = len(prompt) - 2, len(prompt) + (2 if under_way else 3)
    again = [device.counts.replayed_tokens for device in story.world.devices]
    assert again == [computed - snapshot, computed - snapshot, 0, computed - snapshot]


def test_recurrent_layers_that_are_only_cut_anew_compute_nothing_again() -> None:
    story = Story("recurrent")
    story.asks(1)
    story.all_but(until=3)
    story.plan([(0, 1), (1, 2), (1, 3), (0, 4)])
    story.all_but()
    story.is_over(1)
    assert not story.replayed()


@pytest.mark.parametrize("said", [0, 3])
def test_in_a_stage_whose_middle_layer_was_lost_the_layers_after_it_wait(said: int) -> None:
    """What comes behind an OPEN comes before the source knows what is lacking: a step, or chunks of a prompt."""
    story = Story(cut=[(0, 1), (1, 2), (0, 3), (2, 4)])
    story.asks(1, PROMPT, 4)
    story.all_but()
    second = [*PROMPT, *story.said(1), *PROMPT]
    if said:
        story.asks(2, second)
        story.all_but(until=said, number=2)
    story.plan([(0, 3), (2, 4)])
    if not said:
        story.asks(2, second)
    story.all_but(number=2)
    story.is_over(2, second)
    assert story.told(2)[0].reused == len(PROMPT) + 3


def test_layers_after_the_last_that_was_lost_compute_nothing_again() -> None:
    story = Story(cut=[(0, 0), (1, 1), (2, 3), (3, 4)])
    story.asks(1)
    story.all_but(until=3)
    story.plan([(0, 0), (2, 1), (2, 3), (3, 4)])
    story.all_but()
    story.is_over(1)
    again = [device.counts.replayed_tokens for device in story.world.devices]
    assert again[0] == again[2] >= len(PROMPT) + 2 and again[1] == again[3] == 0
