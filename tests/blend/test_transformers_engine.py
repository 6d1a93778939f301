"""The reference engine as a service sees it: refusals, interruptions, the end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blend.engines import EngineConfig, open_engine
from blend.errors import EngineError, PromptTooLongError, UnknownSelectorError
from store.errors import StoreFullError
from tests.blend.served import Served
from tests.blend.tiny import sentence

TEXTS = [sentence(i, 20) for i in range(4)]


@pytest.fixture
def served(reference: Callable[..., Served]) -> Served:
    return reference()


def test_it_says_who_it_is(served: Served) -> None:
    info = served.engine.info
    assert (info.name, info.device, info.layout.dtype, info.max_context) == ("transformers", "cpu", "float32", 2048)
    assert (info.layout.layers, info.layout.heads, info.layout.head_dim) == (4, 2, 32)
    assert info.model == str(served.folder)
    assert served.loop.run(served.engine.metrics()) == ""


def test_unknown_engines_options_and_lengths_are_refused(
    served: Served, reference: Callable[..., Served], tiny_model: Callable[[str], Path]
) -> None:
    with pytest.raises(EngineError, match=r"'tpu'.*auto, vllm, transformers"):
        served.loop.run(open_engine("tpu", EngineConfig("x")))
    with pytest.raises(EngineError, match=r"'min_tokens'.*min_context_tokens"):
        reference(options={"min_tokens": 3})
    with pytest.raises(EngineError, match=r"4096.*2048"):
        reference(max_context=4096)
    with pytest.raises(EngineError, match="no/such"):
        reference(model="no/such")


def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(reference: Callable[..., Served]) -> None:
    served = reference(max_context=128)
    prompt = served.prompt(served.document(*TEXTS, compiled=False)[:2])
    size = len(prompt.token_ids)
    assert served.ask(prompt, tokens=128 - size).finish == "length"
    with pytest.raises(PromptTooLongError, match=rf"{size} .*{129 - size} .*128"):
        served.ask(prompt, tokens=129 - size)
    with pytest.raises(PromptTooLongError, match="128"):
        served.document(*TEXTS, *TEXTS, context="document")


def test_nonsense_in_a_request_is_refused_and_harms_nobody(served: Served) -> None:
    prompt = served.prompt(served.document(*TEXTS))
    good = served.ask(prompt)
    with pytest.raises(UnknownSelectorError, match="best"):
        served.ask(prompt, "blend", selector="best", ratio=0.3)
    with pytest.raises(EngineError, match="max_tokens is 0"):
        served.ask(prompt, tokens=0)
    with pytest.raises(EngineError, match="vocabulary"):
        served.ask(replace(prompt, token_ids=(*prompt.token_ids[:-1], 100_000)))
    assert served.ask(prompt).tokens == good.tokens


def test_a_failure_of_the_model_is_an_engine_error_and_the_next_request_works(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = served.prompt(served.document(*TEXTS))

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("blend.engines.transformers.engine.walk", fail)
        with pytest.raises(EngineError, match="out of memory"):
            served.ask(prompt)
    assert served.ask(prompt).finish == "length"


def test_a_full_store_is_the_jobs_error_and_the_engine_goes_on(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Any) -> int:
        raise StoreFullError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(served.engine.store, "put", full)
        with pytest.raises(StoreFullError, match="no room"):
            served.document(*TEXTS)
    assert served.ask(served.prompt(served.document(*TEXTS)), "reuse").stats.missing == 0


def test_a_compile_reports_what_it_did(served: Served) -> None:
    keys = served.keys()
    refs = served.document(*TEXTS, context="document", compiled=False)
    (job,) = served.keys(context="document").jobs(refs)
    done = served.compile(job)
    assert (done.chunks, done.tokens) == (4, job.tokens)
    assert done.bytes == sum(len(r.token_ids) for r in refs) * served.engine.info.layout.token_bytes
    assert served.compile(job).bytes == 0  # it was there
    assert done.tokens == len(keys.prefix) + sum(len(r.token_ids) for r in refs)


def test_the_whole_stream_is_answer_and_accounting(served: Served) -> None:
    prompt = served.prompt(served.document(*TEXTS))

    async def deltas() -> list[Any]:
        return [d async for d in served.engine.generate(served.request(prompt, "reuse", tokens=5))]

    got = served.loop.run(deltas())
    assert [len(d.token_ids) for d in got] == [1] * 5
    assert [d.finish_reason for d in got] == [None] * 4 + ["length"]
    assert [d.stats is None for d in got] == [False] + [True] * 4
    assert got[0].cached_tokens == got[0].stats.reused == prompt.context_tokens


def test_sampling_is_repeated_by_its_seed(served: Served) -> None:
    prompt = served.prompt(served.document(*TEXTS))
    once, again, other = (served.ask(prompt, tokens=12, temperature=1.5, seed=s).tokens for s in (7, 7, 8))
    assert once == again != other
    free = {tuple(served.ask(prompt, tokens=12, temperature=1.5).tokens) for _ in range(3)}
    assert len(free) > 1


def test_closing_the_stream_frees_the_request(reference: Callable[..., Served]) -> None:
    served = reference(kv_cache_gib=1e-6)  # room for one request at a time
    prompt = served.prompt(served.document(*TEXTS))

    async def leave() -> float:
        stream = served.engine.generate(served.request(prompt, tokens=1500))
        async for _ in stream:
            break
        begin = time.monotonic()
        await stream.aclose()  # type: ignore[attr-defined]
        return time.monotonic() - begin

    assert served.loop.run(leave()) < 5
    assert served.ask(prompt, tokens=2).finish == "length"


def test_a_cancelled_request_frees_its_place(reference: Callable[..., Served]) -> None:
    served = reference(kv_cache_gib=1e-6)
    prompt = served.prompt(served.document(*TEXTS))

    async def cancel() -> None:
        task = asyncio.ensure_future(served.collect(served.request(prompt, tokens=1500)))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    served.loop.run(cancel())
    assert served.ask(prompt, tokens=2).finish == "length"


def test_requests_take_turns_token_by_token(served: Served) -> None:
    """A long answer that came first does not keep a short one waiting until its end."""
    prompt = served.prompt(served.document(*TEXTS))
    order: list[str] = []

    async def follow(name: str, tokens: int) -> None:
        async for _ in served.engine.generate(served.request(prompt, tokens=tokens)):
            order.append(name)

    async def both() -> None:
        await asyncio.gather(follow("long", 40), follow("short", 5))

    served.loop.run(both())
    assert order.index("short") < 10
    assert len(order) - 1 - order[::-1].index("short") < 20


def test_more_requests_than_places_are_all_served(reference: Callable[..., Served]) -> None:
    served = reference(kv_cache_gib=1e-6)
    prompt = served.prompt(served.document(*TEXTS))
    alone = served.ask(prompt)
    for crowded in served.together(*(served.request(prompt) for _ in range(6))):
        assert crowded.tokens == alone.tokens


def test_a_running_engine_is_well_and_a_stopped_one_is_not(served: Served) -> None:
    prompt = served.prompt(served.document(*TEXTS))
    served.loop.run(served.engine.check())
    served.loop.run(served.engine.stop())
    served.loop.run(served.engine.stop())
    for work in (served.engine.check, lambda: served.collect(served.request(prompt))):
        with pytest.raises(EngineError, match="stopped"):
            served.loop.run(work())
    with pytest.raises(EngineError, match="stopped"):
        served.compile(served.keys().prefix_job())


def test_stopping_lets_running_requests_end_with_an_error_not_a_hang(served: Served) -> None:
    prompt = served.prompt(served.document(*TEXTS))

    async def stop_midway() -> None:
        task = asyncio.ensure_future(served.collect(served.request(prompt, tokens=1500)))
        await asyncio.sleep(0.05)
        await served.engine.stop()
        with pytest.raises(EngineError, match="stopped"):
            await asyncio.wait_for(task, 10)

    served.loop.run(stop_midway())


def test_an_engine_that_hangs_is_noticed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = served.prompt(served.document(*TEXTS))
    monkeypatch.setattr("blend.engines.transformers.engine._STALL_S", 0.05)
    release = threading.Event()

    def hang(*_: Any, **__: Any) -> bool:
        release.wait(30)
        return True

    async def look() -> None:
        task = asyncio.ensure_future(served.collect(served.request(prompt, "auto", tokens=1)))
        await asyncio.sleep(0.3)
        try:
            with pytest.raises(EngineError, match="no progress"):
                await served.engine.check()
        finally:
            release.set()
            await task
        await served.engine.check()

    monkeypatch.setattr(served.engine.store, "contains", hang)
    served.loop.run(look())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_reuses_too(reference: Callable[..., Served], dtype: str) -> None:
    served = reference(dtype=dtype)
    prompt = served.prompt(served.document(*TEXTS, context="document"))
    full, reused = served.ask(prompt, tokens=1), served.ask(prompt, "reuse", tokens=1)
    assert served.engine.info.layout.dtype == dtype
    assert reused.stats.missing == 0
    shared = full.top[0].keys() & reused.top[0].keys()
    assert max(abs(full.top[0][t] - reused.top[0][t]) for t in shared) < 0.3


def test_a_store_on_disk_serves_the_next_start(reference: Callable[..., Served], tmp_path: Path) -> None:
    first = reference(path=tmp_path / "kv")
    prompt = first.prompt(first.document(*TEXTS))
    before = first.ask(prompt, "reuse")
    first.loop.run(first.engine.stop())
    second = reference(path=tmp_path / "kv")
    after = second.ask(prompt, "reuse")
    assert after.stats.missing == 0
    assert after.distance(before) == 0.0
