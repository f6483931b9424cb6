"""Numbers as a person reads them, and the note below an answer that waits."""

from __future__ import annotations

import contextlib
import re
from typing import IO, Any, cast

import pytest

from peerllm.cli.terminal import PassingNote, human_ms, human_rate

WIDTH, HEIGHT = 20, 4


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 ms"),
        (0.004, "0 ms"),
        (0.42, "0.42 ms"),
        (0.5, "0.5 ms"),
        (0.994, "0.99 ms"),
        (0.996, "1.0 ms"),
        (7.12, "7.1 ms"),
        (9.96, "10 ms"),
        (58.3, "58 ms"),
        (999.4, "999 ms"),
        (999.6, "1.0 s"),
        (5140, "5.1 s"),
        (43_210, "43 s"),
        (599_000, "599 s"),
        (600_000, "10 min"),
        (90_000_000, "1,500 min"),
    ],
)
def test_times(value: float, text: str) -> None:
    assert human_ms(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123, "0.12"), (8.712, "8.71"), (9.96, "10.0"), (17.94, "17.9"), (99.96, "100"), (12_345.6, "12,346")],
)
def test_rates(value: float, text: str) -> None:
    assert human_rate(value) == text


class Screen:
    """As much of a VT100 as a note and text need."""

    def __init__(self) -> None:
        self.rows = [" " * WIDTH for _ in range(HEIGHT)]
        self.row = self.column = 0
        self.saved = (0, 0)

    def isatty(self) -> bool:
        return True

    def flush(self) -> None:
        pass

    def write(self, text: str) -> None:
        for one in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|\x1b.|.|\n", text):
            match one:
                case "\x1bD" | "\n":
                    self.column = self.column if one == "\x1bD" else 0
                    self.down()
                case "\x1bM":
                    assert self.row, "reverse scrolling is not meant to happen"
                    self.row -= 1
                case "\x1b7":
                    self.saved = (self.row, self.column)
                case "\x1b8":
                    self.row, self.column = self.saved
                case "\r":
                    self.column = 0
                case "\x1b[K":
                    self.put(" " * (WIDTH - self.column))
                case _ if re.fullmatch(r"\x1b\[\d*m", one):
                    pass
                case _:
                    assert one.isprintable(), repr(one)
                    if self.column == WIDTH:
                        self.column = 0
                        self.down()
                    self.put(one)
                    self.column += 1

    def put(self, text: str) -> None:
        row = self.rows[self.row]
        self.rows[self.row] = row[: self.column] + text + row[self.column + len(text) :]

    def down(self) -> None:
        if self.row == HEIGHT - 1:
            self.rows = [*self.rows[1:], " " * WIDTH]
        else:
            self.row += 1

    def text(self) -> str:
        return "\n".join(row.rstrip() for row in self.rows).strip("\n")


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    return Screen()


def shown_on(screen: Screen) -> contextlib.AbstractContextManager[Any]:
    """Whatever is printed."""
    return contextlib.redirect_stdout(cast("IO[str]", screen))


@pytest.mark.parametrize("lines", range(HEIGHT + 1))
def test_a_note_stands_below_the_answer_and_leaves_no_trace(screen: Screen, lines: int) -> None:
    before = (["line"] * lines + ["once upon"])[-HEIGHT + 1 :]
    with shown_on(screen):
        note = PassingNote()
        print("line\n" * lines + "once upon", end="")
        for words in ("mini-pc is gone", "jetson loads (5%)", "the laptop waits for the mini-pc"):
            note.show(words)
            assert screen.text() == "\n".join([*before, words[: WIDTH - 1]])
        note.show("")
        print(" a time,\nthere", end="")
    assert screen.text().splitlines() == [*before[:-1], "once upon a time,", "there"][-HEIGHT:]


def test_an_answer_that_wraps_goes_over_the_place_of_the_note(screen: Screen) -> None:
    with shown_on(screen):
        note = PassingNote()
        print("x" * (WIDTH - 2), end="")
        note.show("mini-pc is gone")
        note.show("")
        print("yyyy", end="")
    assert screen.text() == "x" * (WIDTH - 2) + "yy\nyy"


def test_a_note_cannot_steer_the_terminal(screen: Screen) -> None:
    with shown_on(screen):
        PassingNote().show("a\x1b[2Jb\r\nc")
    assert screen.text() == "a[2Jb c"


def test_where_nothing_can_be_erased_notes_are_lines_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    note = PassingNote()
    for words in ("", "queued 2", "loading (5%)", "loading (7%)", "loading (7%)", "", "", "mini-pc is gone", ""):
        note.show(words)
    assert capsys.readouterr() == ("", "queued 2\nloading (5%)\nmini-pc is gone\n")


def test_a_terminal_without_a_cursor_gets_lines(
    screen: Screen, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with shown_on(screen):
        PassingNote().show("mini-pc is gone")
    assert (screen.text(), capsys.readouterr().err) == ("", "mini-pc is gone\n")
