"""Progress: plain lines without a terminal, one bar that fits in one, nothing when quiet; rates that are honest."""

import io
import re
import time
from contextlib import suppress

import pytest
from rich.console import Console

from poolshare.search import progress
from poolshare.search.progress import advance_loss, progress_bar, rate_text, time_text


class Clock:
    """A clock that goes only when told to."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def written(steps, clock, total=100, **console):
    """What a bar writes when so many seconds pass before each of the (seconds, done) steps."""
    file = io.StringIO()
    with progress_bar(Console(file=file, width=80, **console), "training", total, "steps") as advance:
        for seconds, done in steps:
            clock.now += seconds
            advance(done, "loss 0.5")
    return file.getvalue()


def test_lines_tell_share_rate_and_time_left(clock):
    lines = written([(0, 0), (5, 10), (6, 22), (1, 24), (39, 80), (11, 100)], clock).splitlines()
    assert lines == [
        "training: 22%, 2 steps/s, about 39 s left, loss 0.5",  # 5 s was too early, 12 s too soon after
        "training: 80%, 1.57 steps/s, about 13 s left, loss 0.5",
        "training: 100%, done in 62 s, 1.61 steps/s, loss 0.5",
    ]


def test_continued_work_does_not_count_what_was_done_before(clock):
    lines = written([(0, 900), (20, 910)], clock, total=1000).splitlines()
    assert lines == ["training: 91%, 2 s per step, about 3.0 min left, loss 0.5"]


def test_a_training_that_is_continued_shows_no_loss_before_its_first_step():
    notes = []
    for at in ((900, None), (901, 0.1234)):
        advance_loss(lambda done, note="": notes.append((done, note)), *at)
    assert notes == [(900, ""), (901, "loss 0.123")]


def test_long_work_writes_fewer_lines(clock):
    lines = written([(10, done) for done in range(8640)], clock, total=8640).splitlines()
    assert 20 < len(lines) < 200


def test_work_that_is_done_in_one_call_says_so(clock):
    assert written([(3, 100)], clock) == "training: 100%, done in 3 s, 33.3 steps/s, loss 0.5\n"


def test_work_is_done_once_however_often_its_total_is_reached(clock):
    assert written([(0, 0), (4, 100), (1, 100)], clock) == "training: 100%, done in 5 s, 20 steps/s, loss 0.5\n"


def test_work_beyond_its_forecast_is_not_called_done(clock):
    lines = written([(0, 150), (20, 170), (20, 190)], clock).splitlines()
    assert lines == [
        "training: longer than forecast, 1 steps/s, loss 0.5",
        "training: longer than forecast, 1 steps/s, loss 0.5",
        "training: 100%, done in 40 s, 1 steps/s, loss 0.5",
    ]


def test_work_that_failed_is_not_called_done(clock):
    file = io.StringIO()
    with suppress(ValueError), progress_bar(Console(file=file), "x", 1, "steps") as advance:
        advance(1)
        raise ValueError("broken")
    assert file.getvalue() == ""


def test_no_line_holds_markup_or_escape_codes(clock):
    file = io.StringIO()
    with progress_bar(Console(file=file, width=80), "[red]x[/red]", 1, "steps") as advance:
        advance(1, "[bold]note[/bold]")
    assert "[red]x[/red]: 100%" in file.getvalue()
    assert "[bold]note[/bold]" in file.getvalue()
    assert "\x1b" not in file.getvalue()


def test_the_total_may_become_known_on_the_way(clock):
    lines = written([(0, 0)], clock, total=1)
    file = io.StringIO()
    with progress_bar(Console(file=file, width=80), "checking images", 1, "images") as advance:
        advance(0, total=400)
        clock.now += 20
        advance(100, total=400)
    assert lines == ""
    assert file.getvalue() == "checking images: 25%, 5 images/s, about 60 s left\n"


def test_quiet_says_nothing(clock):
    assert written([(20, 10), (20, 100)], clock, quiet=True) == ""
    assert written([(20, 10), (20, 100)], clock, quiet=True, force_terminal=True) == ""


@pytest.mark.parametrize("continued", [0, 900])
def test_a_terminal_shows_one_line_with_bar_share_and_note(continued):
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system=None)
    with progress_bar(console, "training the [supernet]", 1000, "steps") as advance:
        for done in range(continued, 1001, (1000 - continued) // 10):
            advance(done, "loss 0.123")
            time.sleep(0.05)  # the bar is drawn ten times a second
    last = re.sub(r"\x1b\[[?0-9]*[a-zA-Z]", "", file.getvalue()).strip().split("\r")[-1]
    assert "training the [supernet]" in last
    assert "100%" in last
    assert "loss 0.123" in last
    assert re.search(r"[\d,]+/s, \d s", last)
    assert " s left" in file.getvalue()
    assert len(last) <= 80
    assert "\n" not in last


def test_rates_and_times_in_words():
    assert [rate_text(value, "steps") for value in (1234.5, 12.34, 1, 0.25, 0.001)] == [
        "1,234 steps/s", "12.3 steps/s", "1 steps/s", "4 s per step", "1,000 s per step",
    ]  # fmt: skip
    assert rate_text(0.5, "batches") == "2 s per batch"
    times = {0.4: "0 s", 99: "99 s", 100: "1.7 min", 596: "9.9 min", 598: "10 min", 5969: "99 min", 7200: "2.0 h"}
    assert {seconds: time_text(seconds) for seconds in times} == times
