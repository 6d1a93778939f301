"""The guard at work: answers that differ from full prefill's are noticed, and then no longer served."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from app.chat import stream
from app.cli import app as command
from app.diagnosis import diagnose
from app.errors import StartError
from app.guard.state import FILE, Level, State, read_state, write_state
from app.guard.watch import PRIORITY, Seen, Watch, compare
from app.metrics import Metrics
from app.schema.chat import ChatRequest
from app.server import create_app
from app.service import Service
from blend.errors import EngineError
from blend.types import BlendOptions, BlendStats, Delta, Prompt, Request, Sampling, Segment, TokenLogprob
from retriever.embed import HashEmbedder
from store import open_store
from tests.blend.tiny import sentence, write_model
from tests.certificates import passing

from .conftest import Kit, OpenKit, make_settings
from .test_chat import ANSWER, events

GUARD = {"share": 1, "least": 2, "window": 4, "ladder": [0.3]}
UNFAITHFUL = 2.0  # no blend recomputes that much


async def guarded_kit(open_kit: OpenKit, faithful_ratio: float, **settings: Any) -> Kit:
    """A service that compares every answer of ``DOCUMENTS``."""
    guard = GUARD | settings.pop("guard", {})
    kit = await open_kit(faithful_ratio=faithful_ratio, guard=guard, **settings)
    assert (await kit.ingest())["state"] == "precomputed"
    return kit


async def ask(kit: Kit, **body: Any) -> tuple[str, dict[str, Any]]:
    """The answer and ``rag.cache`` of one request, once the guard has dealt with it."""
    answer = await kit.chat(**body)
    assert answer.status_code == 200, answer.text
    await kit.service.guard.settled()
    found = answer.json()
    return found["choices"][0]["message"]["content"], found["rag"]["cache"]


def count(kit: Kit, result: str, chosen_by: str = "server") -> float:
    labels = {"result": result, "chosen_by": chosen_by}
    value = kit.service.metrics.registry.get_sample_value("ragblend_guard_comparisons_total", labels)
    assert value is not None
    return value


def counts(kit: Kit) -> dict[str, float]:
    """All results that were counted, whoever chose."""
    found = {r: count(kit, r) + count(kit, r, "client") for r in ("agree", "differ", "failed", "dropped")}
    return {result: n for result, n in found.items() if n}


def gauge(kit: Kit, name: str, collection: str = "default") -> float | None:
    return kit.service.metrics.registry.get_sample_value(f"ragblend_guard_{name}", {"collection": collection})


class Spy:
    """Keeps every request that reaches the engine; ``guard`` may do something before the guard's own are answered."""

    def __init__(self, kit: Kit, monkeypatch: pytest.MonkeyPatch, guard: Callable[[], Any] | None = None) -> None:
        self.requests: list[Request] = []
        self._generate, self._guard = kit.engine.generate, guard
        monkeypatch.setattr(kit.engine, "generate", self)

    async def __call__(self, request: Request) -> AsyncIterator[Delta]:
        self.requests.append(request)
        if request.id.endswith("-guard") and self._guard is not None:
            await self._guard()
        async with aclosing(self._generate(request)) as deltas:  # type: ignore[type-var]
            async for delta in deltas:
                yield delta

    @property
    def own(self) -> list[Request]:
        return [r for r in self.requests if r.id.endswith("-guard")]


async def test_answers_that_differ_raise_the_ratio_step_by_step_and_then_are_prefilled_in_full(
    open_kit: OpenKit, caplog: pytest.LogCaptureFixture
) -> None:
    kit = await guarded_kit(open_kit, UNFAITHFUL)
    seen = [await ask(kit) for _ in range(6)]
    assert [text for text, _ in seen] == [ANSWER[::-1]] * 4 + [ANSWER] * 2
    assert [cache["mode"] for _, cache in seen] == ["blend"] * 4 + ["full"] * 2
    shares = [cache["recomputed"] / cache["tokens"] for _, cache in seen[:4]]
    assert shares == pytest.approx([0.1, 0.1, 0.3, 0.3], abs=0.02)
    assert [cache["why"] for _, cache in seen] == [
        *[None] * 2,
        *["guard: agreement 0.00 below 0.9, ratio raised to 0.3"] * 2,
        *["guard: agreement 0.00 below 0.9, full prefill"] * 2,
    ]
    assert counts(kit) == {"differ": 4}  # a full prefill is its own truth
    assert [gauge(kit, name) for name in ("agreement", "level")] == [None, 1.0]
    said = [r.message for r in caplog.records if r.name.startswith("app.guard")]
    assert len(said) == 2
    assert "ratio raised to 0.3" in said[0]
    assert "full prefill" in said[1]
    assert not [line for line in said if "Mara" in line or "born" in line]


async def test_it_stops_at_the_ratio_at_which_answers_agree(open_kit: OpenKit) -> None:
    kit = await guarded_kit(open_kit, 0.2)
    for _ in range(12):
        text, cache = await ask(kit)
    assert (text, cache["mode"]) == (ANSWER, "blend")
    assert "ratio raised to 0.3" in cache["why"]
    assert counts(kit) == {"differ": 2, "agree": 10}
    assert (gauge(kit, "agreement"), gauge(kit, "kl"), gauge(kit, "level")) == (1.0, 0.0, 0.3)


async def test_good_answers_change_nothing(open_kit: OpenKit) -> None:
    kit = await guarded_kit(open_kit, 0.0)
    for _ in range(6):
        _, cache = await ask(kit)
        assert cache["why"] is None
    assert counts(kit) == {"agree": 6}
    assert gauge(kit, "level") == 0.0


async def test_nothing_is_compared_at_share_0_and_every_blended_answer_at_share_1(
    open_kit: OpenKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = await guarded_kit(open_kit, 0.0, guard={"share": 0})
    spy = Spy(kit, monkeypatch)
    for _ in range(5):
        await ask(kit)
    assert len(spy.requests) == 5
    assert counts(kit) == {}
    kit = await guarded_kit(open_kit, 0.0)
    spy = Spy(kit, monkeypatch)
    for _ in range(5):
        await ask(kit)
    await ask(kit, rag={"blend": {"mode": "full"}})
    await kit.chat(model="trivial")  # without retrieval
    await kit.chat(rag={"dry_run": True})
    await kit.service.guard.settled()
    assert len(spy.requests) == 5 + 5 + 1 + 1
    assert len(spy.own) == 5
    assert counts(kit) == {"agree": 5}


async def test_the_comparison_is_a_full_prefill_of_the_same_prompt_after_everybody_else(
    open_kit: OpenKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = await guarded_kit(open_kit, 0.0, guard={"tokens": 7})
    spy = Spy(kit, monkeypatch)
    await ask(kit, stop=["zzz"], max_tokens=30)
    await ask(kit, max_tokens=3)
    await ask(kit, temperature=0.7, seed=3)
    served, own = [r for r in spy.requests if r not in spy.own], spy.own
    for theirs, ours in zip(served, own, strict=True):
        assert ours.prompt == theirs.prompt
        assert ours.tenant_salt == theirs.tenant_salt
        assert (ours.blend.mode, ours.priority, theirs.priority) == ("full", PRIORITY, 0)
        assert ours.id != theirs.id
        assert replace(ours.sampling, max_tokens=theirs.sampling.max_tokens) == theirs.sampling
    assert [r.sampling.max_tokens for r in own] == [7, 3, 1]


async def test_it_waits_while_people_are_served(open_kit: OpenKit, monkeypatch: pytest.MonkeyPatch) -> None:
    kit = await guarded_kit(open_kit, 0.0)
    spy = Spy(kit, monkeypatch)
    with kit.service.traffic.enter():
        for _ in range(3):
            await kit.chat()
        await asyncio.sleep(0.1)
        assert spy.own == []
    await kit.service.guard.settled()
    assert len(spy.own) == 3


async def test_a_stream_is_compared_too_and_a_client_that_leaves_breaks_nothing(open_kit: OpenKit) -> None:
    kit = await guarded_kit(open_kit, 0.0)
    chunks = events(await kit.chat(stream=True))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == ANSWER
    await kit.service.guard.settled()
    assert counts(kit) == {"agree": 1}
    body = ChatRequest(model="trivial:default", messages=[{"role": "user", "content": "Where was Mara Venn born?"}])
    left = stream(kit.service, body)
    await anext(left)
    await left.aclose()  # after four of the sixteen tokens that would be compared
    await kit.service.guard.settled()
    assert counts(kit) == {"agree": 1}
    assert kit.engine.running == set()
    await ask(kit)
    assert counts(kit) == {"agree": 2}


async def test_an_answer_is_compared_once_enough_of_it_was_seen_even_if_its_client_left(open_kit: OpenKit) -> None:
    kit = await guarded_kit(open_kit, UNFAITHFUL, guard={"tokens": 4})
    body = ChatRequest(model="trivial:default", messages=[{"role": "user", "content": "Where was Mara Venn born?"}])
    left = stream(kit.service, body)
    await anext(left)
    await left.aclose()
    await kit.service.guard.settled()
    assert counts(kit) == {"differ": 1}


@pytest.mark.parametrize(("faithful_ratio", "result"), [(0.0, "agree"), (UNFAITHFUL, "differ")])
async def test_sampled_answers_are_compared_by_their_first_tokens_distribution(
    open_kit: OpenKit, faithful_ratio: float, result: str
) -> None:
    kit = await guarded_kit(open_kit, faithful_ratio)
    await ask(kit, temperature=1.0, n=2)
    assert counts(kit) == {result: 1}
    kl = gauge(kit, "kl")
    assert kl is not None
    assert (kl == 0.0) if result == "agree" else (kl > 1.0)


@pytest.mark.parametrize("more", [{}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 1}])
async def test_clients_do_not_see_whether_they_are_watched(open_kit: OpenKit, more: dict[str, Any]) -> None:
    answers = []
    for share in (0, 1):
        kit = await guarded_kit(open_kit, 0.0, guard={"share": share})
        whole = (await kit.chat(n=2, **more)).json()
        chunks = events(await kit.chat(n=2, stream=True, stream_options={"include_usage": True}, **more))
        pieces = [(c["choices"], c["usage"]) for c in chunks]
        answers.append(json.dumps([whole["choices"], whole["usage"], sorted(pieces, key=str)]))
        await kit.service.guard.settled()
        assert counts(kit) == ({"agree": 2} if share else {})
    assert answers[0] == answers[1]
    assert ("top_logprobs" in answers[0]) is bool(more)


@pytest.mark.parametrize("asked", [None, 0, 3, 20])
def test_a_watch_gives_the_client_as_many_log_probabilities_as_it_asked_for(asked: int | None) -> None:
    top = tuple((i, str(i), -0.1 * i) for i in range(20))
    delta = Delta("x", (3,), (TokenLogprob(3, "3", -0.3, top),), finish_reason="length")
    request = Request("r", Prompt((1,), (Segment("question", 0, 1),)), Sampling(logprobs=asked), BlendOptions(), b"")
    watch = Watch(request, tokens=4, top=20, collections=("c",), counts=True, at=0.0)
    assert watch.request.sampling.logprobs == 20
    shown = watch.take(delta)
    assert len(watch.seen.top) == 20
    assert replace(shown, logprobs=()) == replace(delta, logprobs=())
    if asked is None:
        assert shown.logprobs == ()
    else:
        assert shown.logprobs == (TokenLogprob(3, "3", -0.3, top[:asked]),)


def seen(tokens: tuple[int, ...], top: dict[int, float]) -> Seen:
    found = Seen(4)
    logprobs = (TokenLogprob(tokens[0], "", 0.0, tuple((t, "", v) for t, v in top.items())),)
    found.take(Delta("", tokens, logprobs, "stop", BlendStats("blend", 0, 0, 0, 0)))
    return found


def test_greedy_answers_agree_by_their_first_tokens_and_sampled_ones_by_divergence() -> None:
    sure, unsure = {1: -0.01, 2: -5.0}, {1: -0.8, 2: -0.7}
    truth = seen((1, 2, 3, 4, 5), sure)
    assert compare(truth, seen((1, 2, 3, 4, 9), sure), greedy=True, max_kl=0.1).agree
    assert compare(truth, seen((1, 2, 3, 4), unsure), greedy=True, max_kl=0.1).agree
    assert not compare(truth, seen((1, 2, 3, 9), sure), greedy=True, max_kl=0.1).agree
    assert not compare(truth, seen((1, 2, 3), sure), greedy=True, max_kl=0.1).agree
    assert compare(truth, seen((9, 9), sure), greedy=False, max_kl=0.1).agree
    assert not compare(truth, seen((1, 2, 3, 4), unsure), greedy=False, max_kl=0.1).agree
    for nothing in ({}, {1: math.nan, 2: -1.0}, {1: 0.0, 2: -math.inf}):
        for one, other in ((truth, seen((1,), nothing)), (seen((1,), nothing), truth)):
            assert compare(one, other, greedy=True, max_kl=0.1).kl is None
            with pytest.raises(ValueError, match="no finite log-probabilities"):
                compare(one, other, greedy=False, max_kl=0.1)


async def test_what_a_client_chose_is_left_alone_and_moves_no_level(open_kit: OpenKit) -> None:
    kit = await guarded_kit(open_kit, UNFAITHFUL)
    for chosen in ({"mode": "blend"}, {"mode": "reuse"}, {"recompute_ratio": 0.0}, {"selector": "heads"}):
        for _ in range(3):
            _, cache = await ask(kit, rag={"blend": chosen})
            assert cache["why"] is None
    assert (count(kit, "differ", "client"), count(kit, "differ")) == (12, 0)
    for _ in range(2):
        await ask(kit)
    assert gauge(kit, "level") == 0.3
    _, explicit = await ask(kit, rag={"blend": {"mode": "blend", "recompute_ratio": 0.0}})
    assert (explicit["why"], explicit["recomputed"]) == (None, 0)
    _, below = await ask(kit, rag={"blend": {"recompute_ratio": 0.2}})
    assert "ratio raised to 0.3" in below["why"]
    _, above = await ask(kit, rag={"blend": {"recompute_ratio": 0.6}})
    assert above["why"] is None
    assert above["recomputed"] / above["tokens"] == pytest.approx(0.6, abs=0.02)


async def test_collections_are_judged_apart_and_a_prompt_of_several_by_the_worst(open_kit: OpenKit) -> None:
    kit = await guarded_kit(open_kit, UNFAITHFUL, guard={"ladder": []})
    await kit.ingest([{"id": "other", "text": "Mara Venn also wrote books about the sea."}], collection="other")
    for _ in range(2):
        await ask(kit)
    assert (await ask(kit))[1]["mode"] == "full"
    both = {"vector_store_ids": ["other", "default"]}
    assert (await ask(kit, model="trivial", rag=both))[1]["mode"] == "full"
    assert (await ask(kit, model="trivial:other", rag={"blend": {"mode": "auto"}}))[1]["why"] is None


async def test_after_a_while_less_is_tried_again(open_kit: OpenKit) -> None:
    kit = await guarded_kit(open_kit, UNFAITHFUL, guard={"ladder": [], "recover_after_s": 0.2})
    for _ in range(2):
        await ask(kit)
    assert (await ask(kit))[1]["mode"] == "full"
    kit.engine.faithful_ratio = 0.0  # whatever was wrong is repaired
    await asyncio.sleep(0.2)
    for _ in range(5):
        assert (await ask(kit))[1]["mode"] == "blend"
    assert gauge(kit, "level") == 0.0
    switches = {d: {"collection": "default", "direction": d} for d in ("up", "down")}
    registry = kit.service.metrics.registry
    assert all(registry.get_sample_value("ragblend_guard_switches_total", s) == 1 for s in switches.values())


async def test_a_server_that_compares_nothing_tries_nothing(open_kit: OpenKit) -> None:
    first = await guarded_kit(open_kit, UNFAITHFUL, guard={"ladder": [], "recover_after_s": 0.05})
    for _ in range(2):
        await ask(first)
    await first.service.close()
    kit = await open_kit(guard=GUARD | {"share": 0, "recover_after_s": 0.05})
    await kit.ingest()
    await asyncio.sleep(0.1)
    assert (await ask(kit))[1]["why"] == "guard: agreement 0.00 below 0.9, full prefill"


async def test_a_failed_comparison_is_counted_logged_and_nobody_elses_problem(
    open_kit: OpenKit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail() -> None:
        raise EngineError("out of memory")

    kit = await guarded_kit(open_kit, 0.0)
    Spy(kit, monkeypatch, fail)
    assert (await ask(kit))[0] == ANSWER
    assert (await ask(kit))[0] == ANSWER
    assert counts(kit) == {"failed": 2}
    assert "out of memory" in caplog.text
    monkeypatch.undo()
    await ask(kit)
    assert counts(kit) == {"failed": 2, "agree": 1}


async def test_a_comparison_that_takes_too_long_is_dropped(open_kit: OpenKit, monkeypatch: pytest.MonkeyPatch) -> None:
    kit = await guarded_kit(open_kit, 0.0, limits={"request_s": 0.2})
    Spy(kit, monkeypatch, lambda: asyncio.sleep(30))
    await ask(kit)
    assert counts(kit) == {"dropped": 1}


async def test_more_than_can_wait_are_dropped_and_counted(open_kit: OpenKit) -> None:
    kit = await guarded_kit(open_kit, 0.0, guard={"max_pending": 2})
    with kit.service.traffic.enter():
        await kit.chat()
        await asyncio.sleep(0)  # the guard has taken it, and waits
        for _ in range(4):
            await kit.chat()
    await kit.service.guard.settled()
    assert counts(kit) == {"agree": 3, "dropped": 2}


async def test_a_stop_does_not_wait_for_comparisons(open_kit: OpenKit, monkeypatch: pytest.MonkeyPatch) -> None:
    kit = await guarded_kit(open_kit, 0.0)
    Spy(kit, monkeypatch)
    with kit.service.traffic.enter():
        for _ in range(5):
            await kit.chat()
    kit.engine.delay_s = 60
    while not kit.engine.running:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert [name.endswith("-guard") for name in kit.engine.running] == [True]
    begin = time.monotonic()
    await kit.service.close()
    assert time.monotonic() - begin < 2
    assert kit.engine.running == set()


async def test_a_restart_keeps_the_level_and_the_window(open_kit: OpenKit, tmp_path: Path) -> None:
    store = tmp_path / "kv"
    first = await guarded_kit(open_kit, UNFAITHFUL, store=open_store(store))
    await ask(first)
    await first.service.close()
    second = await open_kit(faithful_ratio=UNFAITHFUL, guard=GUARD, store=open_store(store))
    assert (await ask(second))[1]["why"] is None  # the second of two comparisons
    assert "ratio raised to 0.3" in (await ask(second))[1]["why"]
    await second.service.close()
    third = await open_kit(faithful_ratio=UNFAITHFUL, guard=GUARD, store=open_store(store))
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


async def test_a_real_model_whose_reuse_is_wrong_ends_in_full_prefill(tmp_path: Path) -> None:
    """Random weights, chunks compiled alone, nothing recomputed: greedy answers differ from full prefill's."""
    settings = make_settings(
        tmp_path, model=str(write_model(tmp_path / "model", "llama")), engine="transformers", dtype="float32",
        device="cpu", compile={"context": "prefix"}, blend={"recompute_ratio": 0.0}, guard=GUARD | {"ladder": []},
    )  # fmt: skip
    service = await Service.open(settings, embedder=HashEmbedder())
    service.engine.certificate = passing(service.engine.info)
    try:
        transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            documents = [
                {"id": f"d{i}", "text": "\n\n".join(sentence(10 * i + j, 30) for j in range(3))} for i in range(2)
            ]
            job = await client.post("/ingest?wait=true", json={"documents": documents})
            assert job.json()["state"] == "precomputed", job.text

            async def chat(mode: str) -> dict[str, Any]:
                body = {
                    "model": f"{settings.served_name}:default", "max_tokens": 8, "rag": {"blend": {"mode": mode}},
                    "messages": [{"role": "user", "content": "Who painted the old bridge in winter?"}],
                }  # fmt: skip
                answer = await client.post("/v1/chat/completions", json=body)
                assert answer.status_code == 200, answer.text
                await service.guard.settled()
                found: dict[str, Any] = answer.json()
                return found

            truth = (await chat("full"))["choices"]
            first, _, third = [await chat("auto") for _ in range(3)]
            assert first["rag"]["cache"]["mode"] == "blend"
            assert first["choices"] != truth
            assert third["rag"]["cache"]["why"] == "guard: agreement 0.00 below 0.9, full prefill"
            assert third["choices"] == truth
            [level] = (await client.get("/guard")).json()["data"]
            assert level["least_ratio"] == 1.0
    finally:
        await service.close()
