"""What the guard keeps and shows: its file, routes, metrics, commands."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from app.cli import app as command
from app.diagnosis import diagnose
from app.errors import StartError
from app.guard.state import FILE, Level, State, read_state, write_state
from app.metrics import Metrics
from store import StoreConfig, open_store

from .conftest import OpenKit, make_settings
from .guarded import GUARD, UNFAITHFUL, ask, gauge, guarded_kit


async def test_a_restart_keeps_the_level_and_the_window(open_kit: OpenKit, tmp_path: Path) -> None:
    store = tmp_path / "kv"
    first = await guarded_kit(open_kit, UNFAITHFUL, store=open_store(StoreConfig(path=store)))
    await ask(first)
    await first.service.close()
    second = await open_kit(faithful_ratio=UNFAITHFUL, guard=GUARD, store=open_store(StoreConfig(path=store)))
    assert (await ask(second))[1]["why"] is None  # the second of two comparisons
    assert "ratio raised to 0.3" in (await ask(second))[1]["why"]
    await second.service.close()
    third = await open_kit(faithful_ratio=UNFAITHFUL, guard=GUARD, store=open_store(StoreConfig(path=store)))
    assert gauge(third, "level") == 0.3
    assert "ratio raised to 0.3" in (await ask(third))[1]["why"]


async def test_levels_of_another_model_are_forgotten_and_a_damaged_file_stops_the_start(
    open_kit: OpenKit, tmp_path: Path
) -> None:
    state = State(model="another", collections={"default": Level(ratio=1.0, since=1e9, why="agreement 0")})
    write_state(tmp_path, state.model_dump_json())
    kit = await guarded_kit(open_kit, 0.0)
    assert (await ask(kit))[1]["mode"] == "blend"
    await kit.service.close()
    (tmp_path / FILE).write_text("{")
    with pytest.raises(StartError, match=FILE):
        await open_kit()


async def test_a_state_that_cannot_be_written_is_logged_and_still_holds(
    open_kit: OpenKit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_room(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    kit = await guarded_kit(open_kit, UNFAITHFUL)
    monkeypatch.setattr("app.guard.guard.write_state", no_room)
    for _ in range(3):
        _, cache = await ask(kit)
    assert "ratio raised to 0.3" in cache["why"]
    assert "No space left on device" in caplog.text


async def test_an_operator_sees_and_resets_a_level_over_http(open_kit: OpenKit, tmp_path: Path) -> None:
    kit = await guarded_kit(open_kit, UNFAITHFUL)
    assert (await kit.client.get("/guard")).json()["data"] == []
    for _ in range(3):
        await ask(kit)
    [level] = (await kit.client.get("/guard")).json()["data"]
    assert (level["collection"], level["least_ratio"], level["comparisons"]) == ("default", 0.3, 1)
    assert (level["agreement"], level["why"]) == (0.0, "agreement 0.00 below 0.9")
    assert level["kl"] > 1
    assert level["since"] == pytest.approx(time.time(), abs=60)
    unknown = await kit.client.delete("/guard/nowhere")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "collection_not_found")
    assert (await kit.client.delete("/guard/default")).status_code == 200
    assert (await ask(kit))[1]["why"] is None
    kept = read_state(tmp_path)
    assert kept is not None
    assert kept.collections["default"].ratio == 0.0


async def test_metrics_are_exposed(open_kit: OpenKit) -> None:
    kit = await guarded_kit(open_kit, UNFAITHFUL)
    for _ in range(3):
        await ask(kit)
    text = (await kit.client.get("/metrics")).text
    for line in (
        'ragblend_guard_comparisons_total{chosen_by="server",result="differ"} 3.0',
        'ragblend_guard_comparisons_total{chosen_by="client",result="failed"} 0.0',
        'ragblend_guard_agreement{collection="default"} 0.0',
        'ragblend_guard_level{collection="default"} 0.3',
        'ragblend_guard_switches_total{collection="default",direction="up"} 1.0',
    ):
        assert line in text
    assert 'ragblend_guard_kl{collection="default"}' in text


def test_clients_that_make_collections_make_no_more_than_a_hundred_series() -> None:
    metrics = Metrics()
    figures: dict[str, tuple[float | None, float | None, float]] = {f"c{i}": (0.9, 0.1, 0.0) for i in range(150)}
    figures |= {"c120": (0.5, 0.3, 0.25), "c121": (None, None, 1.0)}
    metrics.show_guard(figures)
    for name in figures:
        metrics.guard_switched(name, "up")
    value = metrics.registry.get_sample_value
    text = metrics.text()
    assert text.count("ragblend_guard_level{") == text.count("ragblend_guard_switches_total{") == 101
    other = {"collection": "other"}
    worst = [value(f"ragblend_guard_{name}", other) for name in ("agreement", "kl", "level")]
    assert worst == [0.5, 0.3, 1.0]
    assert value("ragblend_guard_switches_total", other | {"direction": "up"}) == 50
    metrics.show_guard({})
    assert "ragblend_guard_level{" not in metrics.text()


def test_the_command_line_lists_and_resets_what_a_stopped_server_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAGBLEND_PORT", "9")  # the discard port: nothing listens
    levels = {
        "bad": Level(ratio=1.0, since=1e9, why="agreement 0.10 below 0.9"),
        "good": Level(recent="1101", kl=[0.5]),
        "half": Level(ratio=0.25, since=1e9, why="agreement 0.80 below 0.9"),
    }
    write_state(tmp_path, State(model="m", collections=levels).model_dump_json())

    def run(*args: str) -> Any:
        return CliRunner().invoke(command, ["guard", *args, "--data-dir", str(tmp_path)])

    table = run("ls").stdout
    assert "| bad | full prefill | agreement 0.10 below 0.9 | 2001-09-09 01:46 |" in table
    assert "| good | as asked |  |  | 0.75 | 0.500 | 4 |" in table
    assert "| half | 0.25 |" in table
    listed = json.loads(run("ls", "--json").stdout)["collections"]
    assert [(c["collection"], c["least_ratio"]) for c in listed] == [("bad", 1.0), ("good", 0.0), ("half", 0.25)]
    assert "bad is served as asked again" in run("reset", "bad").stdout
    kept = read_state(tmp_path)
    assert kept is not None
    assert kept.collections == {name: levels[name] for name in ("good", "half")}
    again = run("reset", "bad")
    assert again.exit_code == 1
    assert "'bad'" in again.stderr


def test_the_doctor_tells_of_collections_that_are_recomputed_more(tmp_path: Path) -> None:
    def guard() -> tuple[str, str]:
        return next((c.state, c.detail) for c in diagnose(make_settings(tmp_path)) if c.name == "guard")

    assert guard() == ("ok", "every collection is served as asked")
    state = State(model="m", collections={"bad": Level(ratio=1.0), "good": Level(recent="1")})
    write_state(tmp_path, state.model_dump_json())
    assert guard() == ("warn", "recomputed more than asked for: bad")
    (tmp_path / FILE).write_text("no")
    state_now, detail = guard()
    assert state_now == "fail"
    assert FILE in detail
