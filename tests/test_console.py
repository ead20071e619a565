"""What a person sees of a long task."""

import io

import pytest
from rich.console import Console

from pixcell import console as module
from pixcell.console import duration_text, progress


@pytest.fixture
def screen(monkeypatch):
    """A terminal of 80 columns, or a log file; returns what was written."""

    def open_screen(is_terminal):
        file = io.StringIO()
        monkeypatch.setattr(
            module, "console", Console(file=file, force_terminal=is_terminal, width=80, highlight=False)
        )
        return file

    return open_screen


def test_a_note_has_a_line_of_its_own_and_is_not_cut_off_by_the_bar(screen):
    file = screen(is_terminal=True)
    note = "loss 0.9427, gradient 0.31, lr 5e-05, 65.0 images/s, MFU 41.2%"
    with progress("train nano", 1600) as advance:
        advance(20, note=note)
    assert note in file.getvalue()


def test_a_note_of_two_lines_is_one_where_nobody_watches(screen, monkeypatch):
    clock = iter([0.0, 40.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock, 41.0))
    file = screen(is_terminal=False)
    with progress("train nano", 1600) as advance:
        advance(20, note="loss 0.9427\nloss from clean to noise: 2 1")
    assert "(loss 0.9427, loss from clean to noise: 2 1)" in file.getvalue().replace("\n", "")
    file = screen(is_terminal=True)
    with progress("train nano", 1600) as advance:
        advance(20, note="loss 0.9427\nloss from clean to noise: 2 1")
    lines = [line for line in file.getvalue().splitlines() if "clean to noise: 2 1" in line]
    assert lines
    assert not any("0.9427" in line for line in lines)


def test_a_bar_that_goes_on_begins_where_the_task_stands(screen):
    file = screen(is_terminal=True)
    with progress("train nano", 1600, done=1200) as advance:
        advance(1)
    assert "1201/1600" in file.getvalue()


def test_what_an_earlier_start_did_is_not_counted_as_speed(screen, monkeypatch):
    clock = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock, 40.0))
    file = screen(is_terminal=False)
    with progress("train nano", 1600, done=1200) as advance:
        advance(40)
    assert file.getvalue() == "train nano: 1240/1600, 2.0/s, 3 min left\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.9, "59 s"),
        (600, "10 min"),
        (7260, "2 h 1 min"),
        (1e6, "11 d 13 h"),
        (float("nan"), "unknown time"),
    ],
)
def test_times_are_told_in_two_units_at_most(seconds, text):
    assert duration_text(seconds) == text
