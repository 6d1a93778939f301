"""The guard's arithmetic: windows, rungs, trials, and what survives a restart."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from app.errors import SettingsError, StartError
from app.guard.guard import sampled
from app.guard.levels import LIMIT, Comparison, Levels, Switch
from app.guard.state import FILE, Level, State, read_state, write_state
from app.settings import GuardSettings, load_settings

GOOD, BAD = Comparison(True, 0.01), Comparison(False, 3.0)


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """Levels with a clock and a record of what switched."""

    def __init__(self, **settings: Any) -> None:
        self.clock = Clock()
        self.switches: list[Switch] = []
        given = {"least": 4, "window": 8, "floor": 0.75, "ladder": (0.1, 0.25), "recover_after_s": 100} | settings
        self.levels = Levels(GuardSettings(**given), State(model="m"), switched=self.switches.append, clock=self.clock)

    def compare(self, *found: Comparison, name: str = "c", asked: float = 0.05) -> None:
        """Comparisons of answers asked for now, blended as the guard wants and at ``asked`` at least."""
        for one in found:
            used = max(asked, self.ratio(name))
            self.levels.note([name], one, used=used, asked_at=self.clock())

    def ratio(self, name: str = "c", *, trials: bool = True) -> float:
        return self.levels.least([name], trials=trials)[0]

    def level(self, name: str = "c") -> Level:
        return self.levels.state.collections[name]


def test_fewer_comparisons_than_the_least_decide_nothing() -> None:
    bench = Bench()
    bench.compare(BAD, BAD, BAD)
    assert bench.ratio() == 0.0
    bench.compare(BAD)
    assert bench.ratio() == 0.1


def test_agreement_at_the_floor_is_good_enough_and_below_it_is_not() -> None:
    bench = Bench()
    bench.compare(GOOD, BAD, GOOD, GOOD)  # 3 of 4
    assert bench.ratio() == 0.0
    bench.compare(BAD)  # 3 of 5
    assert bench.ratio() == 0.1
    assert bench.levels.least(["c"], trials=True)[1] == "agreement 0.60 below 0.75"


def test_the_window_holds_the_last_comparisons_and_no_others() -> None:
    draw = random.Random(3)
    for _ in range(50):
        least, window = sorted(draw.choices(range(1, 12), k=2))
        bench = Bench(least=least, window=window, floor=0.6, ladder=())
        told: list[bool] = []
        for _ in range(60):
            agree = draw.random() < 0.75
            told.append(agree)
            recent = told[-window:]
            fails = len(recent) >= least and sum(recent) / len(recent) < 0.6
            bench.compare(Comparison(agree))
            assert bench.ratio() == (1.0 if fails else 0.0), told
            if fails:
                break


def test_each_failure_goes_one_rung_above_what_was_used_and_at_last_to_full_prefill() -> None:
    bench = Bench()
    for ratio in (0.1, 0.25, 1.0):
        bench.compare(*[BAD] * 4)
        assert bench.ratio() == ratio
        assert bench.level().recent == ""
    assert [(s.before, s.after, s.direction) for s in bench.switches] == [
        (0.0, 0.1, "up"), (0.1, 0.25, "up"), (0.25, 1.0, "up"),
    ]  # fmt: skip


@pytest.mark.parametrize(("asked", "rungs"), [(0.0, [0.1, 0.25]), (0.1, [0.25, 1.0]), (0.2, [0.25, 1.0]), (0.5, [1.0])])
def test_rungs_at_or_below_the_ratio_that_failed_are_not_tried(asked: float, rungs: list[float]) -> None:
    bench = Bench()
    for ratio in rungs:
        bench.compare(*[BAD] * 4, asked=asked)
        assert bench.ratio() == ratio


def test_after_its_time_one_step_back_is_tried_with_a_fresh_window() -> None:
    bench = Bench()
    bench.compare(*[BAD] * 8)
    assert bench.ratio() == 0.25
    bench.compare(GOOD, GOOD, BAD)
    bench.clock.now += 99
    assert bench.ratio() == 0.25
    bench.clock.now += 1
    assert bench.ratio(trials=False) == 0.25
    assert bench.ratio() == 0.1
    assert bench.level().recent == ""
    bench.clock.now += 100
    assert bench.ratio() == 0.0
    assert bench.levels.least(["c"], trials=True) == (0.0, "")
    assert [s.direction for s in bench.switches] == ["up", "up", "down", "down"]


def test_every_relapse_doubles_the_wait_until_a_trial_holds_for_a_whole_window() -> None:
    bench = Bench(ladder=())
    bench.compare(*[BAD] * 4)
    for wait in (100, 200, 400, 800, 1600, 3200, 3200):
        bench.clock.now += wait - 1
        assert bench.ratio() == 1.0
        bench.clock.now += 1
        assert bench.ratio() == 0.0
        bench.compare(*[BAD] * 4)
        assert bench.ratio() == 1.0
    bench.clock.now += 3200
    assert bench.ratio() == 0.0
    bench.compare(*[GOOD] * 8)
    bench.compare(*[BAD] * 3)  # 5 of the last 8: fails again, but not as a relapse
    assert bench.ratio() == 1.0
    bench.clock.now += 100
    assert bench.ratio() == 0.0


def test_no_time_brings_it_back_if_the_setting_says_never() -> None:
    bench = Bench(recover_after_s=0)
    bench.compare(*[BAD] * 4)
    bench.clock.now += 1e9
    assert bench.ratio() == 0.1


def test_a_clock_that_is_put_back_delays_a_trial_by_no_more_than_its_wait() -> None:
    bench = Bench()
    bench.compare(*[BAD] * 4)
    bench.clock.now -= 1e6
    assert bench.ratio() == 0.1
    bench.clock.now += 100
    assert bench.ratio() == 0.0


def test_answers_from_before_a_switch_say_nothing_about_the_ratio_after_it() -> None:
    bench = Bench()
    early = bench.clock()
    bench.clock.now += 1
    bench.compare(*[BAD] * 4)
    bench.levels.note(["c"], BAD, used=0.05, asked_at=early)
    assert (bench.ratio(), bench.level().recent) == (0.1, "")
    bench.clock.now += 100
    assert bench.ratio() == 0.0  # on trial
    bench.levels.note(["c"], GOOD, used=0.1, asked_at=bench.clock() - 1)
    assert bench.level().recent == ""


def test_a_prompt_of_several_collections_has_the_highest_level_and_counts_for_those_it_would_suit() -> None:
    bench = Bench()
    bench.compare(*[BAD] * 8, name="bad")
    bench.compare(*[GOOD] * 8, name="good")
    assert bench.levels.least(["good", "bad", "new"], trials=True) == (0.25, "agreement 0.00 below 0.75")
    assert bench.levels.least(["good", "new"], trials=True) == (0.0, "")
    assert bench.levels.least([], trials=True) == (0.0, "")
    bench.levels.note(["good", "new"], BAD, used=0.25, asked_at=bench.clock())
    assert (bench.level("good").recent, bench.level("new").recent) == ("11111110", "0")
    bench.levels.note(["good", "bad"], BAD, used=0.25, asked_at=bench.clock())  # the bad one's ratio
    assert (bench.level("good").recent, bench.level("bad").recent) == ("11111110", "0")
    bench.levels.note(["good", "bad"], GOOD, used=0.4, asked_at=bench.clock())  # what both would have had
    assert (bench.level("good").recent, bench.level("bad").recent) == ("11111101", "01")


def test_many_collections_are_forgotten_but_never_one_that_failed() -> None:
    bench = Bench()
    bench.compare(*[BAD] * 4, name="failed")
    for i in range(LIMIT + 50):
        bench.compare(GOOD, name=f"c{i}")
    known = bench.levels.state.collections
    assert len(known) == LIMIT
    assert "failed" in known
    assert f"c{LIMIT + 49}" in known
    assert "c0" not in known


def test_the_sample_is_the_same_for_the_same_name_and_of_the_size_that_was_asked_for() -> None:
    names = [f"chatcmpl-{i}" for i in range(20_000)]
    chosen = {share: [n for n in names if sampled(n, share)] for share in (0.0, 0.02, 0.5, 1.0)}
    assert (chosen[0.0], chosen[1.0]) == ([], names)
    assert 320 < len(chosen[0.02]) < 480  # four standard deviations
    assert set(chosen[0.02]) < set(chosen[0.5])


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    bench = Bench()
    bench.compare(*[BAD] * 4, GOOD, BAD)
    write_state(tmp_path, bench.levels.state.model_dump_json(indent=1))
    assert read_state(tmp_path) == bench.levels.state
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[: len(text) // 2], "EOF"),
        (lambda _: "", "EOF"),
        (lambda _: "[]", "be an object"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "format: .*1"),
        (lambda text: text.replace('"ratio": 0.1', '"ratio": 1.5'), r"collections\.c\.ratio"),
        (lambda text: text.replace('"ratio": 0.1', '"ratio": "0.1"'), r"collections\.c\.ratio"),
        (lambda text: text.replace('"recent": ""', '"recent": "012"'), r"collections\.c\.recent"),
        (lambda text: text.replace('"why"', '"because"'), r"collections\.c\.because"),
        (lambda text: text.replace('"model"', '"modell"'), "model"),
    ],
)
def test_a_damaged_state_is_refused_by_name(tmp_path: Path, damage: Any, said: str) -> None:
    bench = Bench()
    bench.compare(*[BAD] * 4)
    text = bench.levels.state.model_dump_json(indent=1)
    changed = damage(text)
    assert changed != text
    (tmp_path / FILE).write_text(changed)
    with pytest.raises(StartError, match=rf"(?s){FILE} is not the guard's state: .*{said}.*remove it"):
        read_state(tmp_path)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_state(tmp_path, State(model="old").model_dump_json())

    def no_room(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_room)
    with pytest.raises(OSError, match="No space"):
        write_state(tmp_path, State(model="new").model_dump_json())
    assert json.loads((tmp_path / FILE).read_text())["model"] == "old"
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize(
    ("guard", "said"),
    [
        ({"sahre": 0.1}, "did you mean guard.share"),
        ({"share": 1.5}, "guard.share: .*1.5"),
        ({"least": 10, "window": 5}, "guard: least is 10, more than the window of 5"),
        ({"ladder": [0.25, 0.1]}, "must rise"),
        ({"ladder": [0.1, 0.1]}, "must rise"),
        ({"ladder": [0.1, 1.0]}, "less than 1"),
        ({"max_kl": 0}, "guard.max_kl"),
    ],
)
def test_settings_that_make_no_sense_are_refused(guard: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        load_settings(guard=guard)
