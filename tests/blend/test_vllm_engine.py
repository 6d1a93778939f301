"""The vLLM engine as a service sees it: refusals before it starts, aborts, repeats, a store that cannot be read."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from blend.engines import EngineConfig, open_engine
from blend.engines.vllm.wire import pack_blend, pack_compile, pack_stats, unpack_blend, unpack_compile, unpack_stats
from blend.errors import EngineError, PromptTooLongError, UnknownSelectorError, UnsupportedModelError
from blend.types import BlendOptions, BlendStats, ChunkStats, CompileJob, Prompt, Segment
from store import KVKey
from store.errors import StoreIOError
from tests.blend.served import Loop, Served, open_served
from tests.blend.tiny import sentence


@pytest.fixture
def served(engines: Callable[[str, str], Served]) -> Served:
    return engines("vllm", "llama")


@pytest.mark.parametrize(
    ("field", "value"),
    [("sliding_window", 128), ("kv_lora_rank", 64), ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0})],
)
async def test_a_model_that_cannot_be_blended_is_refused_before_vllm_starts(
    field: str, value: Any, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    config = json.loads((tiny_model("llama") / "config.json").read_text())
    config.pop("rope_parameters", None)
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 10000.0, field: value}))
    begin = time.monotonic()
    with pytest.raises(UnsupportedModelError, match=r"config field " + field.replace("rope_scaling", "rope_param")):
        await open_engine("vllm", EngineConfig(str(tmp_path)))
    assert time.monotonic() - begin < 5


async def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=str(tmp_path)):
        await open_engine("vllm", EngineConfig(str(tmp_path)))


@pytest.mark.vllm
async def test_an_argument_vllm_does_not_know_or_that_is_ours_is_an_error(tiny_model: Callable[[str], Path]) -> None:
    for name in ("no_such_argument", "kv_transfer_config"):
        with pytest.raises(EngineError, match=name):
            await open_engine("vllm", EngineConfig(str(tiny_model("llama")), options={name: 1}))


async def test_an_unknown_engine_shows_the_choices() -> None:
    with pytest.raises(EngineError, match="auto, vllm, transformers"):
        await open_engine("tensorrt", EngineConfig("x"))


def test_the_wire_keeps_everything() -> None:
    key = KVKey(bytes(range(32)))
    prompt = Prompt(
        (5, 6, 7, 8),
        (
            Segment("prefix", 0, 1, key, b"p" * 32, "prefix"),
            Segment("chunk", 1, 3, lacking=True),
            Segment("question", 3, 4),
        ),
    )
    options = BlendOptions("blend", "heads", 0.25)
    assert unpack_blend(_json(pack_blend("id", prompt, options)), prompt.token_ids) == (prompt, options)
    job = CompileJob("id", (1, 2), ((3,), (4, 5)), (key, KVKey(b"k" * 32)), (b"a" * 32, b"b" * 32))
    assert unpack_compile(_json(pack_compile(job)), (1, 2, 3, 4, 5, 5)) == job
    stats = BlendStats("blend", 3, 1, 1, 1, 0.1, 0.2, "auto", None, (ChunkStats("c", 3, 1, 1, 1, "ssd", None),))
    assert unpack_stats(_json(pack_stats(stats))) == stats


def _json(wire: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(wire))
    return found


@pytest.mark.vllm
def test_a_client_that_leaves_frees_its_place_and_the_next_one_is_served(served: Served) -> None:
    prompt = served.prompt(served.document(*(sentence(600 + i, 20) for i in range(3)), name="leaver"))
    request = served.request(prompt, "blend", ratio=0.2, tokens=200)

    async def leave() -> int:
        stream = served.engine.generate(request)
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]
        for _ in range(100):
            if (running := gauge(await served.engine.metrics(), "vllm:num_requests_running")) == 0:
                return int(running)
            await asyncio.sleep(0.05)
        return -1

    assert served.loop.run(leave()) == 0
    assert served.ask(prompt, "blend", ratio=0.2).stats.mode == "blend"


def gauge(metrics: str, name: str) -> float:
    return sum(float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines() if line.startswith(name + "{"))


@pytest.mark.vllm
def test_the_same_blended_question_gets_the_same_answer(served: Served) -> None:
    """Half-repaired rows of the first run must not be found by the second one in vLLM's prefix cache."""
    prompt = served.prompt(served.document(*(sentence(700 + i, 40) for i in range(6)), name="again")[::-1])
    first, *others = [served.ask(prompt, "blend", ratio=0.2) for _ in range(3)]
    for other in others:
        assert other.distance(first) == 0.0
        assert other.stats.recomputed == first.stats.recomputed


@pytest.mark.vllm
def test_exact_prefixes_are_still_found_by_full_prefill(served: Served) -> None:
    prompt = served.prompt(served.document(*(sentence(800 + i, 60) for i in range(4)), name="exact", compiled=False))
    cold, warm = served.ask(prompt, "full"), served.ask(prompt, "full")
    assert cold.cached == 0
    assert warm.cached > 0
    assert warm.distance(cold) <= served.tolerance


@pytest.mark.vllm
def test_an_unknown_selector_and_a_prompt_too_long_fail_before_the_worker(served: Served) -> None:
    prompt = served.prompt(served.document(sentence(900), name="bad"))
    with pytest.raises(UnknownSelectorError, match="nonsense"):
        served.ask(prompt, "blend", selector="nonsense")
    with pytest.raises(PromptTooLongError, match=str(served.engine.info.max_context)):
        served.ask(prompt, "full", tokens=served.engine.info.max_context)
    assert served.ask(prompt, "full").tokens


@pytest.mark.vllm
def test_a_store_that_cannot_be_read_is_answered_by_full_prefill(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = served.prompt(served.document(*(sentence(950 + i, 30) for i in range(4)), name="unread"))

    def fail(key: KVKey) -> bool:
        raise StoreIOError("the device is on fire")

    monkeypatch.setattr(served.engine.store, "contains", fail)
    stats = served.ask(prompt, "auto").stats
    assert stats.mode == "full"
    assert "on fire" in str(stats.why)


@pytest.mark.vllm
def test_an_engine_without_progress_is_not_ready(served: Served) -> None:
    served.loop.run(served.engine.check())
    engine: Any = served.engine
    engine._running, engine._progress, before = 1, time.monotonic() - 61, (engine._running, engine._progress)
    try:
        with pytest.raises(EngineError, match="no progress for 61 s"):
            served.loop.run(served.engine.check())
    finally:
        engine._running, engine._progress = before
    served.loop.run(served.engine.check())


@pytest.mark.vllm
@pytest.mark.slow
def test_a_killed_engine_is_an_error_and_not_a_hang(loop: Loop, tiny_model: Callable[[str], Path]) -> None:
    before = set(psutil.Process().children(recursive=True))
    served = open_served(loop, "vllm", "qwen3", tiny_model("qwen3"), None)
    for child in set(psutil.Process().children(recursive=True)) - before:
        if "VLLM" in child.name() or "EngineCore" in " ".join(child.cmdline()) + child.name():
            child.kill()
    prompt = served.prompt(served.document(*(sentence(i, 30) for i in range(3)), compiled=False))
    with pytest.raises(EngineError):
        served.ask(prompt, "full")
    with pytest.raises(EngineError):
        loop.run(served.engine.check())
    loop.run(served.engine.stop())
    with pytest.raises(EngineError, match="stopped"):
        served.ask(prompt, "full")


_HOLD = """
import asyncio, sys
from blend.engines import EngineConfig, open_engine

async def main():
    await open_engine("vllm", EngineConfig(sys.argv[1], kv_cache_gib=0.25, options={"enforce_eager": True}))
    print("ready", flush=True)
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.vllm
@pytest.mark.slow
def test_a_killed_front_end_leaves_no_process_behind(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    script = tmp_path / "hold.py"
    script.write_text(_HOLD)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    holder = subprocess.Popen([sys.executable, script, tiny_model("llama")], stdout=subprocess.PIPE, env=environment)
    assert holder.stdout is not None
    assert b"ready\n" in iter(holder.stdout.readline, b"")  # vLLM logs there too
    children = psutil.Process(holder.pid).children(recursive=True)
    engine = [c for c in children if c.name().startswith("VLLM")]
    assert len(engine) >= 2, children
    holder.kill()
    holder.wait()
    holder.stdout.close()
    _, alive = psutil.wait_procs(engine, timeout=10)
    assert alive == []
