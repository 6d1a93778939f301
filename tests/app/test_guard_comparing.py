"""What the guard compares, how, and that nobody notices."""

from __future__ import annotations

import asyncio
import json
import math
import time
from dataclasses import replace
from typing import Any

import pytest

from app.chat import stream
from app.guard.watch import PRIORITY, Seen, Watch, compare
from app.schema.chat import ChatRequest
from blend.errors import EngineError
from blend.types import BlendOptions, BlendStats, Delta, Prompt, Request, Sampling, Segment, TokenLogprob

from .conftest import OpenKit
from .guarded import UNFAITHFUL, Spy, ask, counts, gauge, guarded_kit
from .test_chat import ANSWER, events


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
