"""What a run prints while it goes on: lines that fit 80 columns on a terminal, and a line a minute with the time in a log."""

from __future__ import annotations

import io
import re

import pytest

from tltrain.core.output import console as consoles
from tltrain.core.output.console import Console, Terminal, brief, one_plan


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.s = 1000.0

    def __call__(self) -> float:
        return self.s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(consoles, "clock", clock)
    return clock


def opened(terminal: bool, width: int = 80) -> tuple[Console, io.StringIO]:
    console, file = Console(enabled=True), io.StringIO()
    console.rich = Terminal(file=file, highlight=False, soft_wrap=True, force_terminal=terminal, width=width, color_system=None)
    return console, file


def lines_of(file: io.StringIO) -> list[str]:
    return [re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]+", file.getvalue())]


def test_the_progress_of_a_long_run_fits_80_columns(clock: Clock) -> None:
    console, file = opened(terminal=True)
    console.expect({"head": 7200.0}, hide_top5=False)
    console.open_stage("head", 11_000, 12_345)
    for _ in range(100):
        clock.s += 30
        console.step()
    console.figures(1.2343, 4686.4)
    assert console.bar is not None
    console.bar.refresh()
    console.close_stage()
    shown = lines_of(file)
    assert max(map(len, shown)) <= 80
    bar = next(line for line in reversed(shown) if "img/s" in line)
    assert "11100/12345" in bar
    assert "loss 1.234 4,686 img/s" in bar
    seconds = 30 * 1245
    assert f"{brief(seconds)} left, run {brief(seconds + 7200)}" in bar


def test_a_log_has_a_line_a_minute_with_the_time(clock: Clock) -> None:
    console, file = opened(terminal=False)
    console.expect({"head": 600.0}, hide_top5=False)
    console.open_stage("head", 0, 400)
    for _ in range(200):
        clock.s += 1
        console.step()
    shown = [line for line in lines_of(file) if line]
    assert len(shown) == 3
    assert re.fullmatch(r"\d\d:\d\d:\d\d      head  step 60/400  5:40 left, run 15:40", shown[0])


def test_what_comes_before_the_first_step_is_said_as_it_begins_and_each_minute(clock: Clock) -> None:
    console, file = opened(terminal=False)
    with console.doing("reading the images of folder:photos"):
        assert re.fullmatch(r"\d\d:\d\d:\d\d  reading the images of folder:photos\n", file.getvalue())
    for shard in range(130):
        console.busy(f"cache   head: shard {shard}")
        clock.s += 1
    console.busy(None)
    assert [line.split("shard ")[-1] for line in lines_of(file) if "shard" in line] == ["60", "120"]
    quiet, file = opened(terminal=False)
    with quiet.doing("reading", log=False):
        pass
    assert file.getvalue() == ""


def test_a_status_line_is_cut_and_goes_away_when_its_work_fails() -> None:
    console, file = opened(terminal=True)
    with pytest.raises(RuntimeError), console.doing("reading the images of folder:" + "x" * 200):
        raise RuntimeError
    assert console.status is None
    assert max(map(len, lines_of(file))) <= 80


ROW = {"stage": "head", "epoch": 1.25, "top1": 0.86, "top5": 1.0, "f1_macro": 0.8612, "loss": 0.34081, "best": True}


@pytest.mark.parametrize("hide", [True, False])
def test_an_evaluation_is_one_line_of_80_columns(hide: bool) -> None:
    console, file = opened(terminal=True)
    console.expect({}, hide_top5=hide)
    console.evaluation(ROW, 100)
    [line] = [line for line in lines_of(file) if line]
    assert len(line) <= 80
    assert line.startswith("    head  epoch   1.2/100")
    assert ("top-5" in line) is not hide
    assert line.endswith("best")
    log, file = opened(terminal=False)
    log.evaluation(ROW, 100)
    assert re.match(r"\d\d:\d\d:\d\d      head  epoch   1.2/100", file.getvalue())


@pytest.mark.parametrize(("epoch", "of", "said"), [(0.024, 0.024, "0.02/0.02"), (133.25, 133.33, "133.2/133.3"), (5.0, 5.0, "5.0/5")])
def test_an_epoch_is_never_beyond_the_last(epoch: float, of: float, said: str) -> None:
    console, file = opened(terminal=True)
    console.evaluation(ROW | {"epoch": epoch}, of)
    assert re.search(rf"epoch +{said} ", file.getvalue())


def test_the_other_processes_print_nothing(clock: Clock) -> None:
    console, file = opened(terminal=False)
    console.enabled = False
    console.open_stage("head", 0, 10)
    with console.doing("reading"):
        clock.s += 100
        console.step()
        console.busy("more")
        console.evaluation(ROW, 3)
    assert file.getvalue() == ""


def test_folds_print_one_plan_and_what_follows_its_own() -> None:
    console, file = opened(terminal=False)
    with one_plan():
        with one_plan():  # a race before the first fold
            console.show_plan("plan of the race")
            console.show_plan("plan of its second fold")
        console.show_plan("plan of fold 0")
        with one_plan():
            console.show_plan("plan of the second race")
        console.show_plan("plan of fold 1")
    console.show_plan("plan of another run")
    assert file.getvalue().split("\n") == ["plan of the race", "plan of fold 0", "plan of another run", ""]
