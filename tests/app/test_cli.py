"""Commands: help, one-line errors, the shape of what they print. Engines are trivial here; the wiring is real."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.cli.options import _repeat
from app.demo.world import TASKS
from app.trivial import ByteTokenizer, TrivialEngine
from blend.engines import EngineConfig
from store import open_store
from tests.app.commands import data, fails, run

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [
    ["serve"],
    ["ingest"],
    ["precompute"],
    ["ask"],
    ["search"],
    ["doctor"],
    ["bench"],
    ["bench", "ttft"],
    ["bench", "novelty"],
    ["bench", "store"],
    ["estimate"],
    ["certify"],
    ["eval"],
    ["eval", "quality"],
    ["eval", "report"],
    ["cache"],
    ["cache", "ls"],
    ["cache", "verify"],
    ["guard"],
    ["guard", "ls"],
    ["guard", "reset"],
]
NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens


@pytest.fixture(autouse=True)
def trivial(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Every engine is trivial, every embedder hashes, no server is taken for ours; gives the data folder."""

    async def open_engine(kind: str, config: EngineConfig) -> TrivialEngine:
        return TrivialEngine(open_store(replace(config.store, codec="raw")))

    for module in ("app.bench.workbench", "app.service"):
        monkeypatch.setattr(f"{module}.open_engine", open_engine)
    monkeypatch.setattr("app.bench.workbench.load_tokenizer", lambda model: ByteTokenizer())
    monkeypatch.setattr("app.service._load_tokenizer", lambda model: ByteTokenizer())
    monkeypatch.setenv("RAGBLEND_EMBEDDER", "hash")
    monkeypatch.setenv("RAGBLEND_PORT", "9")
    monkeypatch.setenv("RAGBLEND_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("RAGBLEND_MODEL", str(ROOT / "models/demo"))
    for name in ("HF_HUB_OFFLINE", "VLLM_LOGGING_LEVEL", "TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # commands set these; put them back afterwards
    return tmp_path / "data"


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    (folder / "deep").mkdir(parents=True)
    (folder / "oak.txt").write_text("Linrik keeps a donkey. He plays the bagpipe.")
    (folder / "deep" / "elm.md").write_text("# Elm\n\nFenora painted the harbour in winter.")
    (folder / "photo.png").write_bytes(b"\x89PNG....")
    return folder


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert f"Usage: ragblend {' '.join(command)}" in " ".join(result.stdout.split())
    assert not result.stderr


def test_a_group_alone_shows_its_help() -> None:
    assert "Commands:" in run().stdout
    assert "ttft" in run("bench").stdout


def test_version() -> None:
    assert run("--version").stdout.startswith("ragblend 0.")


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['ragblend', '--help']\n"
        "from app.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = ('torch', 'vllm', 'transformers', 'faiss', 'lmdb', 'fastapi', 'pydantic')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.splitlines()[-1] == "[]"


class TestErrors:
    def test_wrong_usage_exits_with_2(self) -> None:
        assert "--prot" in fails(2, "serve", "--prot", "1")
        assert "teapot" in fails(2, "teapot")
        assert "PATHS" in fails(2, "ingest").upper()
        assert "--ratio" in fails(2, "bench", "ttft", "--ratio")
        assert "--repeats" in fails(2, "bench", "ttft", "--repeats", "many")

    def test_an_unknown_setting_is_an_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config = tmp_path / "settings.yaml"
        config.write_text("prot: 8000\n")
        assert "prot" in fails(1, "search", "x", "--config", config)
        monkeypatch.setenv("RAGBLEND_PROT", "1")
        assert "RAGBLEND_PROT" in fails(1, "search", "x")

    def test_a_bad_value_is_shown_with_the_choices(self) -> None:
        line = fails(1, "doctor", "--engine", "steam")
        assert "steam" in line
        assert "transformers" in line

    def test_a_missing_model_folder_is_named(self) -> None:
        assert "/nowhere" in fails(1, "precompute", "--model", "/nowhere")
        assert "/nowhere" in fails(1, "serve", "--model", "/nowhere", "--port", "0")

    def test_a_file_that_is_not_there_is_named(self) -> None:
        assert "/nowhere/x.txt does not exist" in fails(1, "ingest", "/nowhere/x.txt")

    def test_an_unknown_collection_is_named(self) -> None:
        assert "atlantis" in fails(1, "search", "x", "--collection", "atlantis")

    def test_a_server_that_does_not_answer_is_named(self) -> None:
        assert NOWHERE in fails(1, "ask", "x", "--url", NOWHERE)

    def test_a_full_traceback_only_on_request(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RAGBLEND_DEBUG", "1")
        result = run("search", "x", "--collection", "atlantis")
        assert result.exit_code == 1
        assert "Traceback" in result.stderr
        assert os.environ["RAGBLEND_DEBUG"] == "1"


class TestDocuments:
    def test_ingest_search_ask_and_look_at_the_cache(self, documents: Path) -> None:
        report = data("ingest", documents)
        assert [d["filename"] for d in report["documents"]] == ["elm.md", "oak.txt"]
        assert {d["status"] for d in report["documents"]} == {"precomputed"}
        again = data("ingest", documents)
        assert all(d["unchanged"] for d in again["documents"])

        found = data("search", "who keeps a donkey", "--mode", "text")
        assert [r["filename"] for r in found["results"]] == ["oak.txt"]
        assert "donkey" in found["results"][0]["text"]

        answer = data("ask", "Who keeps a donkey?", "--mode", "reuse")
        assert answer["object"] == "chat.completion"
        assert answer["rag"]["cache"]["missing"] == 0
        assert answer["rag"]["cache"]["recomputed"] == 0
        plain = run("ask", "Who keeps a donkey?", "--mode", "reuse")
        assert "context rows" in plain.stdout
        assert "missing" in plain.stdout

        listing = data("cache", "ls")
        assert listing["total"] == len(listing["entries"]) == 3  # our prefix and two chunks
        assert set(listing["entries"][0]) >= {"key", "tokens", "bytes", "layout", "title", "pinned"}
        assert len(data("cache", "ls", "--limit", "1")["entries"]) == 1
        assert data("cache", "verify") == {"checked": 3, "bad": [], "repaired": 0}

    def test_a_bad_file_fails_alone(self, documents: Path) -> None:
        result = run("ingest", documents / "photo.png", documents / "oak.txt", "--json")
        assert result.exit_code == 1
        states = {d["filename"]: d["status"] for d in json.loads(result.stdout)["documents"]}
        assert states == {"photo.png": "failed", "oak.txt": "precomputed"}
        assert "photo.png" in result.stderr

    def test_neighbours_are_refreshed_in_their_compile_context_only(
        self, documents: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        said = fails(1, "precompute", "--refresh-neighbours")
        assert "compile.context is document" in said
        assert "neighbours" in said
        monkeypatch.setenv("RAGBLEND_COMPILE__CONTEXT", "neighbours")
        assert data("ingest", documents / "oak.txt")["cascaded"] == 0
        report = data("precompute", "--refresh-neighbours")
        assert (report["failed"], report["cascaded"], report["removed"]) == (0, 0, 0)

    def test_precompute_does_what_ingest_left(self, documents: Path) -> None:
        report = data("ingest", documents, "--no-precompute")
        assert {d["status"] for d in report["documents"]} == {"searchable"}
        first = data("precompute", "--max-gib", "1e-6")
        assert first["stopped"]
        assert first["done"] < 2
        second = data("precompute")
        assert second["done"] + second["skipped"] == 2
        third = data("precompute", "--collection", "default")
        assert (third["done"], third["skipped"], third["failed"]) == (0, 2, 0)
        assert set(third) >= {"done", "skipped", "failed", "gib", "tokens_per_s", "seconds", "interrupted"}
        assert data("precompute", "--all")["done"] + data("precompute", "--all")["skipped"] >= 2
        line = run("precompute").stdout.strip()
        assert line.startswith("done 0, skipped 2, failed 0; ")
        assert line.endswith("tokens/s")

    def test_an_empty_folder_is_not_a_success(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        assert "holds no file" in fails(1, "ingest", tmp_path / "empty")

    def test_damaged_entries_are_found_and_repaired(self, documents: Path, trivial: Path) -> None:
        data("ingest", documents)
        path = trivial / "kv" / "data.mdb"
        whole = path.read_bytes()
        damaged = whole.replace(struct.pack("<f", ord("k")), struct.pack("<f", ord("K")))  # K of each token "k"
        assert damaged != whole
        path.write_bytes(damaged)
        result = run("cache", "verify", "--json")
        assert result.exit_code == 1
        bad = json.loads(result.stdout)["bad"]
        assert bad
        assert data("cache", "verify", "--repair")["repaired"] == len(bad)
        assert data("cache", "verify")["bad"] == []


class TestRunningServer:
    @pytest.fixture
    def url(self, trivial: Path, unused_tcp_port: int) -> Iterator[str]:
        import uvicorn

        from app.server import create_app
        from app.service import Service
        from app.settings import load_settings

        stop, ready = threading.Event(), threading.Event()

        async def serve() -> None:
            service = await Service.open(load_settings())
            config = uvicorn.Config(create_app(service), port=unused_tcp_port, log_level="error", lifespan="off")
            server = uvicorn.Server(config)
            task = asyncio.create_task(server.serve())
            while not server.started:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            ready.set()
            await asyncio.to_thread(stop.wait)
            server.should_exit = True
            await task
            await service.close()

        thread = threading.Thread(target=lambda: asyncio.run(serve()))
        thread.start()
        assert ready.wait(30)
        yield f"http://127.0.0.1:{unused_tcp_port}"
        stop.set()
        thread.join(30)
        assert not thread.is_alive()

    def test_ingest_and_ask_go_through_it(self, documents: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("app.cli.ask._ask_here", None)
        monkeypatch.setattr("app.cli.ingest._here", None)
        report = data("ingest", documents, "--url", url)
        assert {d["status"] for d in report["documents"]} == {"precomputed"}
        answer = data("ask", "Who keeps a donkey?", "--url", url)
        assert answer["rag"]["cache"]["missing"] == 0
        monkeypatch.setenv("RAGBLEND_PORT", url.rpartition(":")[2])
        assert "context rows" in run("ask", "Who keeps a donkey?").stdout

    def test_what_its_guard_knows_is_its_own(self, url: str, trivial: Path) -> None:
        assert data("guard", "ls", "--url", url) == {"collections": []}
        assert "no answer was compared yet" in run("guard", "ls", "--url", url).stdout
        assert "atlantis/2" in fails(1, "guard", "reset", "atlantis/2", "--url", url)
        assert not (trivial / "guard.json").exists()

    def test_its_errors_are_one_line(self, url: str) -> None:
        assert "atlantis" in fails(1, "ask", "x", "--collection", "atlantis", "--url", url)


class TestMeasurements:
    def test_bench_prints_exactly_the_agreed_shape(self, monkeypatch: pytest.MonkeyPatch) -> None:
        words = [i for i in range(ByteTokenizer.vocab_size) if not ord("a") <= i <= ord("z")]
        monkeypatch.setattr(ByteTokenizer, "all_special_ids", words, raising=False)
        options = ["--engine", "transformers", "--context", "200", "--chunk", "64", "--repeats", "2"]
        result = run("bench", "ttft", *options, "--ratio", "0.1", "0.3", "--json")
        report = json.loads(result.stdout)
        assert list(report) == ["arms", "context", "chunk", "machine"]
        assert [(a["name"], a["ratio"]) for a in report["arms"]] == [
            ("full-eager", None), ("reuse", 0.0), ("deviation", 0.1), ("deviation", 0.3), ("auto", 0.1), ("auto", 0.3),
        ]  # fmt: skip
        fields = ["name", "ratio", "tier", "ttft_median_s", "ttft_p10_s", "ttft_p90_s", "outputs_checked"]
        assert all(list(arm) == fields for arm in report["arms"])

    def test_novelty_prints_quarters_and_a_verdict(self, monkeypatch: pytest.MonkeyPatch) -> None:
        words = [i for i in range(ByteTokenizer.vocab_size) if not ord("a") <= i <= ord("z")]
        monkeypatch.setattr(ByteTokenizer, "all_special_ids", words, raising=False)
        options = ["--engine", "transformers", "--queries", "8", "--chunks", "3", "--chunk", "64", "--pool", "6"]
        result = run("bench", "novelty", *options, "--ram-mib", "0.004", "--check-every", "3", "--json")
        report = json.loads(result.stdout)
        assert len(report["quarters"]) == 4
        assert report["bytes_per_chunk_constant"] is True
        assert result.exit_code == (report["last_over_second"] > 1.05)

    def test_eval_prints_exactly_the_agreed_shape(self) -> None:
        report = data(
            "eval", "quality", "--questions", "2", "--selector", "heads,auto", "--ratio", "0.1", "--seed", "3"
        )
        assert report["seed"] == 3
        assert set(report) >= {"tasks", "seed", "ratio", "model", "machine"}
        assert list(report["tasks"]) == list(TASKS)
        fields = ["accuracy", "n", "ci95", "agreement", "kl_first", "difference", "difference_ci95", "retention",
                  "diverges_at", "f1", "f1_ids", "rouge_l", "subspan_em", "recall", "recomputed", "reused",
                  "computed_share"]  # fmt: skip
        for arms in report["tasks"].values():
            assert list(arms) == ["full", "reuse", "heads", "auto"]
            assert all(list(a) == fields for a in arms.values())

    def test_eval_prints_a_table(self) -> None:
        command = ["eval", "quality", "--questions", "1", "--selector", "auto", "--task", "cross-chunk", "two-hop"]
        table = run(*command).stdout
        assert "| task | arm | score |" in table
        assert "| cross-chunk | reuse |" in table
        assert "| same-chunk |" not in table

    def test_eval_asks_a_file_and_reports_of_several_runs(self, tmp_path: Path) -> None:
        data, table = ROOT / "tests/app/questions.jsonl", tmp_path / "tables/table.md"
        command = ["eval", "quality", "--data", data, "--questions", "2", "--style", "hotpotqa", "--prompt", "plain",
                   "--compile", "prefix,neighbours",
                   "--selector", "deviation(check=0,filter=gradual),heads"]  # fmt: skip
        for name, first in (("a.jsonl", "0"), ("b.jsonl", "2")):
            result = run(*command, "--out", tmp_path / name, "--first", first)
            assert result.exit_code == 0, result.output
        report = json.loads(
            run("eval", "report", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--json", "--markdown", table).stdout
        )
        arms = report["tasks"]["questions"]
        assert {a["n"] for a in arms.values()} == {3}
        assert "deviation(check=0,filter=gradual)/neighbours" in arms
        assert report["metric"] == "f1"
        assert "| questions | heads/prefix |" in table.read_text()

    def test_bad_requests_show_their_value(self) -> None:
        assert "nonsense" in fails(1, "eval", "quality", "--selector", "nonsense")
        assert "sideways" in fails(1, "eval", "quality", "--compile", "sideways")
        assert "1.5" in fails(1, "eval", "quality", "--ratio", "1.5")
        assert "riddle" in fails(1, "eval", "quality", "--task", "riddle")
        assert "64-255" in fails(1, "eval", "quality", "--chunk-tokens", "64-255")
        assert "haiku" in fails(1, "eval", "quality", "--data", "x.json", "--style", "haiku")
        assert "x.json cannot be read" in fails(1, "eval", "quality", "--data", "x.json")
        assert "--max-chunks" in fails(1, "eval", "quality", "--max-chunks", "3")
        assert "two-hop" in fails(1, "eval", "quality", "--data", "x.json", "--task", "two-hop")
        assert "4096" in fails(1, "bench", "ttft", "--chunk", "4096", "--context", "512")


class TestDoctor:
    def test_lists_checks_with_advice(self) -> None:
        result = run("doctor", "--json")
        report = json.loads(result.stdout)
        assert {c["name"] for c in report["checks"]} >= {
            "python", "sqlite", "kernels guard", "lock", "torch", "vllm", "cpu", "model", "embedder", "data", "store",
        }  # fmt: skip
        for check in report["checks"]:
            assert set(check) == {"name", "state", "detail", "advice"}
            assert check["state"] in ("ok", "warn", "fail")
            assert bool(check["advice"]) or check["state"] == "ok" or check["name"] == "lock"
        assert report["ok"] is (result.exit_code == 0)

    def test_names_the_field_of_a_model_that_cannot_be_blended(self, tmp_path: Path) -> None:
        config = json.loads((ROOT / "models/demo/config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"sliding_window": 64}))
        result = run("doctor", "--model", tmp_path)
        assert result.exit_code == 1
        assert "sliding_window" in result.stdout
        assert "safetensors" not in result.stdout  # one failure of the model is enough

    def test_fails_on_the_package_that_shadows_our_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from app.bench.machine import version_of

        monkeypatch.setattr("app.diagnosis.version_of", lambda name: "0.9" if name == "kernels" else version_of(name))
        result = run("doctor")
        assert result.exit_code == 1
        assert "pip uninstall kernels" in result.stdout


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (["--r", "1", "2", "--x", "3"], ["--r", "1", "--r", "2", "--x", "3"]),
        (["--r=1", "2", "--x"], ["--r", "1", "--r", "2", "--x"]),
        (["--r", "1,2", "--r", "3"], ["--r", "1", "--r", "2", "--r", "3"]),
        (["--r", "f(a=1,b=2)+g:0.5,h"], ["--r", "f(a=1,b=2)+g:0.5", "--r", "h"]),
        (["--r"], ["--r"]),
        (["--r", "--x"], ["--r", "--x"]),
        (["x", "--y", "z"], ["x", "--y", "z"]),
    ],
)
def test_repeatable_options_take_several_values(given: list[str], read: list[str]) -> None:
    assert _repeat(given, {"--r"}) == read


def test_ctrl_c_in_precompute_keeps_what_is_done(documents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data("ingest", documents, "--no-precompute")
    compile_ = TrivialEngine.compile
    passes = 0

    async def interrupted(self: TrivialEngine, job: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == 2:  # the first document; the first pass is the prefix
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(0.01)
        return await compile_(self, job)

    monkeypatch.setattr(TrivialEngine, "compile", interrupted)
    result = run("precompute", "--json")
    assert result.exit_code == 130
    assert "run the same command again" in result.stderr
    monkeypatch.setattr(TrivialEngine, "compile", compile_)
    again = data("precompute")
    assert again["skipped"] >= 1
    assert again["done"] + again["skipped"] == 2
