"""How long an engine that died is waited with."""

from __future__ import annotations

from peerllm.daemon.engine_link.restart_backoff import HEALTHY_S, RESTART_FIRST_S, RESTART_MOST_S, RestartBackoff


class Engines:
    """Engines that are started one after the other, on a clock of their own."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.backoff = RestartBackoff(lambda: self.now)

    def dies(self, after_s: float = 1.0, working: bool = False) -> float:
        self.backoff.started()
        if working:
            self.backoff.working()
        self.now += after_s
        pause_s = self.backoff.pause_s()
        self.now += pause_s
        return pause_s


def test_engines_that_die_at_once_are_started_ever_more_slowly() -> None:
    engines = Engines()
    pauses = [engines.dies() for _ in range(20)]
    assert pauses[:4] == [RESTART_FIRST_S, 2 * RESTART_FIRST_S, 4 * RESTART_FIRST_S, 8 * RESTART_FIRST_S]
    assert pauses == sorted(pauses) and pauses[-1] == RESTART_MOST_S


def test_an_engine_that_was_working_starts_at_once_however_often_it_is_killed() -> None:
    engines = Engines()
    for _ in range(3):
        engines.dies()
    assert [engines.dies(after_s=2.0, working=True) for _ in range(10)] == [0.0] * 10
    assert [engines.dies(), engines.dies()] == [RESTART_FIRST_S, 2 * RESTART_FIRST_S], "it is told of each anew"


def test_after_one_that_lived_for_long_the_pauses_begin_anew() -> None:
    engines = Engines()
    for _ in range(3):
        engines.dies()
    assert engines.dies(after_s=HEALTHY_S - 0.1) == 8 * RESTART_FIRST_S
    assert engines.dies(after_s=HEALTHY_S) == RESTART_FIRST_S
    assert engines.dies() == 2 * RESTART_FIRST_S
