"""Progress with the time left, to a file and to a terminal."""

import sys

from gtc_dist import progress
from gtc_dist.progress import TimeLeft, duration


class Clock:
    """In place of `time`."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


def shares(monkeypatch, capsys, is_terminal: bool) -> str:
    """What is printed of ten calls, 4 seconds apart."""
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    shown = TimeLeft("lists of 10 users")
    for done in range(11):
        shown(done / 10)
        clock.now += 4
    return capsys.readouterr().err


def test_a_file_gets_a_line_about_every_ten_seconds(monkeypatch, capsys):
    lines = shares(monkeypatch, capsys, is_terminal=False).splitlines()
    assert lines == [
        "lists of 10 users: 30.0% done after 12s, 28s left",
        "lists of 10 users: 60.0% done after 24s, 16s left",
        "lists of 10 users: 90.0% done after 36s, 4s left",
        "lists of 10 users: 100.0% done after 40s",
    ]


def test_a_terminal_gets_one_line_that_is_drawn_again(monkeypatch, capsys):
    shown = shares(monkeypatch, capsys, is_terminal=True)
    assert shown.count("\n") == 1
    assert shown.endswith("\n")
    drawn = shown.rstrip("\n").split("\r")[1:]
    assert len(drawn) == 10
    assert len({len(line) for line in drawn}) == 1  # nothing of a longer line is left
    assert drawn[4].strip() == "lists of 10 users: 50.0% done after 20s, 20s left"


def test_a_short_step_says_nothing(monkeypatch, capsys):
    monkeypatch.setattr(progress, "time", Clock())
    shown = TimeLeft("lists")
    shown(0.5)
    shown(1.0)
    assert capsys.readouterr().err == ""


def test_durations():
    assert [duration(seconds) for seconds in (0.4, 61, 7325)] == ["0s", "1m01s", "2h02m"]
