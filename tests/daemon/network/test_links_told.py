"""Link tables: what each device says of its own links becomes figures for pairs, and nobody spoils another's."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from peerllm.cli.look import links_text
from peerllm.codec import decode, encode
from peerllm.daemon.control_messages import Control, LinkSeen, LinkTable
from peerllm.daemon.decide.device_profiles import Candidate, link_profiles
from peerllm.daemon.network.speed.link_tables import SILENT_S, STALE_S, UNKNOWN_FRAME_MS, LinkFigure, LinkTables, news
from peerllm.daemon.status.status import link_entries
from peerllm.types import LinkProfile
from tests.daemon.house import hello

ME, BERT, CLEO, STRANGER = (letter * 64 for letter in "abcd")
NOW = 1000.0


def tables() -> LinkTables:
    made = LinkTables(ME)
    made.keep_only({BERT, CLEO})
    return made


def row(device: str, **known: float | bool) -> LinkSeen:
    return LinkSeen(device, **known)  # type: ignore[arg-type]


def test_every_ordered_pair_comes_from_its_own_ends() -> None:
    ours = tables()
    bert, cleo = (1.0, 0.5), (3.0, 0.25)
    ours.hear(BERT, LinkTable((row(CLEO, rtt_ms=1.0, mbps=80.0, hop_ms=0.5, frame_mbps=90.0),), 0.1), NOW)
    ours.hear(CLEO, LinkTable((row(BERT, rtt_ms=3.0, mbps=40.0, hop_ms=0.25, frame_mbps=60.0),), 0.2), NOW)
    found = ours.figures({}, NOW + 5)
    assert found.keys() == {(BERT, CLEO), (CLEO, BERT)}
    there, back = found[BERT, CLEO], found[CLEO, BERT]
    assert (there.rtt_ms, there.mbps) == (bert[0], 40.0), "bytes to cleo: what cleo saw arrive, not what bert did"
    assert there.hop_ms == pytest.approx(bert[1] + 0.2), "and cleo's own hand-over"
    assert (back.rtt_ms, back.mbps) == (cleo[0], 60.0) and back.hop_ms == pytest.approx(cleo[1] + 0.1)
    assert there.source == "measured" and there.age_s == pytest.approx(5.0)
    assert there.profile.latency_ms == there.hop_ms and there.profile.mbps == 40.0


def test_own_links_are_told_and_used() -> None:
    ours = tables()
    incoming, outgoing = ours.incoming(BERT), ours.outgoing(BERT)
    assert incoming is not None and outgoing is not None and ours.incoming(STRANGER) is None
    incoming.probed(50.0, NOW)
    outgoing.echoed([(1000, 0.001)], NOW)
    outgoing.framed(1000, 0.001, NOW + 1)
    mine = ours.mine({CLEO: 4.0}, NOW + 10)
    assert {one.device for one in mine.links} == {BERT, CLEO}
    assert decode(encode(mine, Control), Control) == mine
    other = LinkTables(BERT)
    other.keep_only({ME, CLEO})
    assert other.hear(ME, mine, 5.0)
    assert other.figures({}, 5.0)[BERT, ME].mbps == pytest.approx(50.0)
    figure = ours.figures({BERT: 2.0}, NOW + 10)[BERT, ME]
    assert figure.mbps == pytest.approx(50.0) and figure.rtt_ms == 2.0
    assert figure.hop_ms == pytest.approx(1.0), "the way back takes as long"
    assert figure.source == "traffic" and (ME, CLEO) not in ours.figures({CLEO: 4.0}, NOW + 10), "no rate is known"


def test_a_wire_without_timed_frames_is_half_a_round_trip_and_a_guess() -> None:
    ours = tables()
    ours.hear(BERT, LinkTable((row(CLEO, rtt_ms=3.0, mbps=40.0),)), NOW)
    figure = ours.figures({}, NOW)[CLEO, BERT]
    assert figure.hop_ms is None and figure.profile.latency_ms == pytest.approx(1.5 + UNKNOWN_FRAME_MS)


def test_nothing_is_taken_of_links_the_sender_is_no_end_of_or_of_strangers() -> None:
    ours = tables()
    good = row(ME, rtt_ms=1.0, mbps=10.0)
    assert not ours.hear(STRANGER, LinkTable((good,)), NOW)
    assert not ours.hear(BERT, LinkTable((replace(good, device=STRANGER), replace(good, device=BERT))), NOW)
    assert ours.figures({}, NOW) == {}
    ours.hear(CLEO, LinkTable((row(ME, rtt_ms=1.0, mbps=10.0),)), NOW)
    ours.hear(BERT, LinkTable((row(ME, rtt_ms=1.0, mbps=1e-3), row(CLEO, rtt_ms=6e4, mbps=1e-3))), NOW)
    assert ours.figures({}, NOW)[ME, CLEO].mbps == 10.0, "what bert says cannot reach a link between two others"


@pytest.mark.parametrize(
    "lie",
    [
        {"mbps": 0.0},
        {"mbps": -1.0},
        {"mbps": 1e300},
        {"mbps": math.inf},
        {"frame_mbps": math.nan},
        {"rtt_ms": 0.0},
        {"rtt_ms": 1e9},
        {"hop_ms": -5.0},
        {"hop_ms": math.nan},
        {"mbps_age_s": -1e9},
        {"hop_age_s": math.inf},
    ],
)
def test_impossible_rows_are_dropped_alone(lie: dict[str, float]) -> None:
    ours = tables()
    lying = replace(row(ME, rtt_ms=1.0, mbps=10.0, hop_ms=0.1, frame_mbps=10.0), **lie)
    assert ours.hear(BERT, LinkTable((lying, row(CLEO, rtt_ms=1.0, mbps=20.0)), math.nan), NOW)
    found = ours.figures({}, NOW)
    assert (
        found.keys()
        == {
            (CLEO, BERT),
        }
        and found[CLEO, BERT].mbps == 20.0
    )


def test_a_flood_of_rows_is_bounded_and_the_first_of_a_device_counts() -> None:
    ours = tables()
    rows = tuple(row(f"{number:064x}", rtt_ms=1.0, mbps=1.0) for number in range(1000))
    assert not ours.hear(BERT, LinkTable((*rows, row(ME, rtt_ms=1.0, mbps=9.0))), NOW)
    assert ours.hear(BERT, LinkTable((row(ME, rtt_ms=1.0, mbps=9.0), row(ME, rtt_ms=1.0, mbps=5.0))), NOW)
    assert ours.figures({}, NOW)[ME, BERT].mbps == 9.0
    assert not ours.hear(BERT, LinkTable(()), NOW)
    assert ours.figures({}, NOW) == {}, "a table replaces the one before"


def test_figures_age_out() -> None:
    ours = tables()
    estimate = ours.incoming(BERT)
    assert estimate is not None
    estimate.probed(10.0, NOW)
    assert (BERT, ME) in ours.figures({BERT: 1.0}, NOW + STALE_S - 1)
    assert ours.figures({BERT: 1.0}, NOW + STALE_S) == {}
    ours.hear(BERT, LinkTable((row(CLEO, rtt_ms=1.0, mbps=10.0),)), NOW)
    assert (CLEO, BERT) in ours.figures({}, NOW + SILENT_S - 1) and ours.figures({}, NOW + SILENT_S) == {}
    ours.hear(BERT, LinkTable((row(CLEO, rtt_ms=1.0, mbps=10.0, mbps_age_s=STALE_S - 10),)), NOW)
    assert ours.figures({}, NOW + 11) == {}, "it was old when it was told"


def test_whoever_leaves_is_forgotten() -> None:
    ours = tables()
    ours.hear(BERT, LinkTable((row(CLEO, rtt_ms=1.0, mbps=10.0),)), NOW)
    ours.keep_only({CLEO})
    ours.keep_only({BERT, CLEO})
    assert ours.figures({}, NOW) == {} and ours.incoming(BERT) is not None
    ours.hear(BERT, LinkTable((row(CLEO, rtt_ms=1.0, mbps=10.0),)), NOW)
    ours.forget(BERT)
    assert ours.figures({}, NOW) == {}


def test_only_news_are_told() -> None:
    told = LinkTable((row(BERT, rtt_ms=1.0, mbps=100.0, hop_ms=0.1),), 0.05)
    assert news(told, None) and not news(LinkTable(()), None) and not news(told, told)

    def changed(**values: float | None) -> bool:
        return news(LinkTable((replace(told.links[0], **values),), 0.05), told)

    assert not changed(mbps=115.0) and changed(mbps=125.0) and changed(mbps=None)
    assert not changed(rtt_ms=1.15) and changed(rtt_ms=1.3)
    assert not changed(hop_ms=0.14), "a large share of very little is no news"
    assert changed(hop_ms=0.2) and changed(frame_mbps=5.0) and not changed(mbps_age_s=500.0)
    assert news(LinkTable(()), told) and news(LinkTable((*told.links, row(CLEO, rtt_ms=1.0))), told)


def test_plans_go_by_what_was_measured_and_guess_the_rest() -> None:
    hops = {BERT: LinkProfile(0.4, 90.0), CLEO: LinkProfile(7.0, 30.0)}
    lent = 1000
    household = {
        ME: Candidate(ME, hello("me", lent), lent, 0.0, None, hops=hops),
        BERT: Candidate(BERT, hello("bert", lent), lent, 1.0, 50.0, hops={ME: LinkProfile(0.5, 80.0)}),
        CLEO: Candidate(CLEO, hello("cleo", lent), lent, 4.0, 20.0, hops={BERT: LinkProfile(0.1, 900.0)}),
    }
    links = link_profiles(household, ME)
    assert links[ME, BERT] == LinkProfile(0.4, 90.0) and links[BERT, ME] == LinkProfile(0.5, 80.0)
    assert links[CLEO, BERT] == LinkProfile(0.1, 900.0), "between two others, as they measured it"
    assert links[CLEO, ME] == LinkProfile(4.0 / 2 + UNKNOWN_FRAME_MS, 20.0), "not measured by frames"
    assert links[BERT, CLEO] == LinkProfile(7.0, 30.0), "guessed: as slow as the slower of their ways to the source"

    figure = LinkFigure(1.0, 90.0, 0.4, "traffic", 3.0)
    names = {ME: "me", BERT: "bert", CLEO: "cleo"}
    entries = link_entries({(ME, BERT): figure}, {pair: links[pair] for pair in links}, names.__getitem__)
    assert [(one["from"], one["to"]) for one in entries] == sorted((names[a], names[b]) for a, b in links)
    found = {(one["from"], one["to"]): one for one in entries}
    assert found["me", "bert"] == {
        "from": "me",
        "to": "bert",
        "rtt_ms": 1.0,
        "mbps": 90.0,
        "hop_ms": 0.4,
        "source": "traffic",
        "age_s": 3.0,
    }
    guess = found["bert", "cleo"]
    assert (guess["source"], guess["rtt_ms"], guess["age_s"], guess["hop_ms"]) == ("guessed", None, None, 7.0)
    text = links_text({"links": entries})
    assert "0.40 ms" in text and text.count("guessed") == 5 and links_text({"links": []}) == ""
    assert "and 10 more" in links_text({"links": entries[:1] * 40})
