"""Estimates: what is announced is what precomputing then does, and nothing is guessed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from app.cli import app
from app.estimate import summary
from app.files import DataFileError
from app.offline import open_offline
from app.rates import FILE, Rate, Rates
from app.settings import Settings, load_settings
from app.trivial import LAYOUT, ByteTokenizer, TrivialEngine
from blend.engines import EngineConfig
from retriever.embed import HashEmbedder
from store import open_store
from store.codec import CODECS
from tests.app.conftest import DOCUMENTS, Kit, OpenKit

ROOT = Path(__file__).resolve().parents[2]
TEXT = "Linrik keeps a donkey. He plays the bagpipe.\n\n" * 40


async def estimated(kit: Kit, documents: list[dict[str, Any]]) -> dict[str, Any]:
    answer = await kit.client.post("/ingest/estimate", json={"documents": documents})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


class TestOverHTTP:
    @pytest.mark.parametrize("context", ["prefix", "document"])
    async def test_what_is_announced_is_what_is_done(self, open_kit: OpenKit, context: str) -> None:
        kit = await open_kit(compile={"context": context, "budget": 150})
        found = await estimated(kit, DOCUMENTS)
        assert (found["documents"], found["chunks"], found["precomputed"]) == (2, 4, 0)
        assert found["minutes"] is None
        assert "not known" in summary(found)[2]
        assert kit.engine.store.stats().entries == 0  # nothing was done
        assert kit.service.retriever.documents() == []

        await kit.ingest()
        done = kit.engine.store.stats()
        tokens = sum(e.tokens for e in kit.engine.store.entries())
        assert found["tokens"] == tokens
        assert found["gib_by_codec"]["raw"] * 2**30 == done.bytes

    async def test_compile_tokens_are_those_that_run_through_the_model(
        self, open_kit: OpenKit, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kit = await open_kit(compile={"budget": 150})
        found = await estimated(kit, [{"id": "long", "text": TEXT}])
        ran: list[int] = []
        compile_ = TrivialEngine.compile

        async def counted(self: TrivialEngine, job: Any) -> Any:
            ran.append(job.tokens)
            return await compile_(self, job)

        monkeypatch.setattr(TrivialEngine, "compile", counted)
        await kit.ingest([{"id": "long", "text": TEXT}])
        assert found["compile_tokens"] == sum(ran) > found["tokens"]
        assert found["passes"] == len(ran)

    async def test_what_is_stored_already_is_not_counted_again(self, kit: Kit) -> None:
        found = await estimated(kit, DOCUMENTS)
        assert (found["chunks"], found["precomputed"], found["tokens"], found["compile_tokens"]) == (4, 4, 0, 0)
        assert found["gib"] == 0
        assert found["fits"] is True

    async def test_ready_made_chunks_are_taken_as_they_are(self, open_kit: OpenKit) -> None:
        kit = await open_kit()
        found = await estimated(kit, [{"chunks": ["One.", "Two is longer.", "One."]}])
        assert (found["documents"], found["chunks"]) == (1, 3)
        texts = ["One.\n\n", "Two is longer.\n\n", "One.\n\n"]
        assert found["tokens"] == len(kit.service.layout.prefix) + sum(len(t) for t in texts)

    async def test_neighbours_that_are_not_known_yet_are_said_to_be_assumed(self, open_kit: OpenKit) -> None:
        kit = await open_kit(compile={"context": "neighbours", "neighbours": 2})
        found = await estimated(kit, DOCUMENTS)
        assert found["assumed_neighbours"] == 4
        assert found["compile_tokens"] > 2 * found["tokens"]
        assert "assumed" in summary(found)[3]

    async def test_too_much_does_not_fit_and_the_limit_is_named(
        self, open_kit: OpenKit, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RAGBLEND_STORE__MAX_GIB", "0.004")
        kit = await open_kit()
        found = await estimated(kit, [{"text": " ".join(f"word{n}" for n in range(40_000))}])
        assert found["max_gib"] == pytest.approx(0.004)
        assert found["gib"] > 0.004
        assert found["fits"] is False
        assert "does NOT fit" in summary(found)[1]

    async def test_faults_are_those_of_ingest(self, kit: Kit) -> None:
        answer = await kit.client.post("/ingest/estimate", json={"documents": [{"title": "no text"}]})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "documents[0].text"

    async def test_minutes_follow_the_speed_of_earlier_runs(self, open_kit: OpenKit) -> None:
        kit = await open_kit()
        assert (await estimated(kit, DOCUMENTS))["minutes"] is None
        await kit.ingest([{"id": "long", "text": TEXT}])  # a run long enough to tell
        found = await estimated(kit, [{"text": TEXT.replace("donkey", "parrot")}])
        rate = kit.service.rates.find("trivial", LAYOUT)
        assert rate is not None
        assert found["tokens_per_s"] == pytest.approx(rate.tokens_per_s, rel=1e-6)
        assert found["minutes"] == pytest.approx(found["compile_tokens"] / rate.tokens_per_s / 60)


class TestRates:
    def test_older_runs_count_less(self, tmp_path: Path) -> None:
        rates = Rates(tmp_path)
        rates.learn("vllm", LAYOUT, "cpu", 100_000, 100.0)
        rates.learn("vllm", LAYOUT, "cpu", 100_000, 50.0)
        found = rates.find("vllm", LAYOUT)
        assert found is not None
        assert found.tokens_per_s == pytest.approx(150_000 / 100.0)

    def test_engines_models_and_machines_are_kept_apart(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rates = Rates(tmp_path)
        rates.learn("vllm", LAYOUT, "cpu", 1000, 1.0)
        assert rates.find("transformers", LAYOUT) is None
        assert rates.find("vllm", LAYOUT) is not None
        monkeypatch.setattr("app.rates.machine", lambda: "another")
        assert rates.find("vllm", LAYOUT) is None
        rates.learn("vllm", LAYOUT, "cpu", 1000, 10.0)  # what the other machine did does not count here
        found = rates.find("vllm", LAYOUT)
        assert found is not None
        assert found.tokens_per_s == 100.0

    def test_a_run_too_short_to_tell_is_not_learned_from(self, tmp_path: Path) -> None:
        Rates(tmp_path).learn("vllm", LAYOUT, "cpu", 10, 9.0)
        Rates(tmp_path).learn("vllm", LAYOUT, "cpu", 1000, 0.0)
        assert not (tmp_path / FILE).exists()

    @pytest.mark.parametrize("text", ["", "[]", '{"format": 2}', '{"rates": {"a": {}}}'])
    def test_a_broken_file_is_named(self, tmp_path: Path, text: str) -> None:
        (tmp_path / FILE).write_text(text)
        with pytest.raises(DataFileError, match="does not hold rates"):
            Rates(tmp_path).find("vllm", LAYOUT)

    async def test_a_broken_file_does_not_stop_precompute(self, open_kit: OpenKit, tmp_path: Path) -> None:
        kit = await open_kit()
        (tmp_path / FILE).write_text("{")
        assert (await kit.ingest([{"text": TEXT}]))["state"] == "precomputed"


class TestOnTheCommandLine:
    @pytest.fixture(autouse=True)
    def settings(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Settings:
        async def open_engine(kind: str, config: EngineConfig) -> TrivialEngine:
            return TrivialEngine(open_store(config.store))

        for module in ("app.bench.workbench", "app.service"):
            monkeypatch.setattr(f"{module}.open_engine", open_engine)
        monkeypatch.setattr("app.bench.workbench.load_tokenizer", lambda model: ByteTokenizer())
        monkeypatch.setenv("RAGBLEND_EMBEDDER", "hash")
        monkeypatch.setenv("RAGBLEND_PORT", "9")
        monkeypatch.setenv("RAGBLEND_ENGINE", "transformers")
        monkeypatch.setenv("RAGBLEND_DATA_DIR", str(tmp_path / "data"))
        monkeypatch.setenv("RAGBLEND_MODEL", str(ROOT / "models/demo"))
        monkeypatch.setenv("RAGBLEND_CHUNK_TOKENS", "60")
        (tmp_path / "oak.txt").write_text(TEXT)
        return load_settings()

    def data(self, *args: str | Path) -> dict[str, Any]:
        result = CliRunner().invoke(app, ["estimate", *(str(a) for a in args), "--json"])
        assert result.exit_code == 0, result.output
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    def test_files_are_weighed_and_nothing_is_made(self, tmp_path: Path) -> None:
        found = self.data(tmp_path / "oak.txt")
        assert found["documents"] == 1
        assert found["chunks"] == 40
        assert found["dtype"] == "float32"  # what the transformers engine computes in on a CPU
        assert set(found["gib_by_codec"]) == set(CODECS)
        assert not (tmp_path / "data").exists()

    def test_gib_are_those_of_the_codec(self, tmp_path: Path) -> None:
        found = self.data(tmp_path / "oak.txt", "--codec", "raw")
        config = json.loads((ROOT / "models/demo/config.json").read_text())
        token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 4
        assert found["gib"] == pytest.approx(found["tokens"] * token / 2**30)
        assert all(found["gib_by_codec"][name] <= found["gib"] for name in CODECS)
        result = CliRunner().invoke(app, ["estimate", str(tmp_path / "oak.txt"), "--codec", "zip"])
        assert result.exit_code == 1
        assert "zip" in result.stderr

    def test_nothing_ingested_is_nothing_to_do(self) -> None:
        result = CliRunner().invoke(app, ["estimate", "--json"])
        assert json.loads(result.stdout)["documents"] == 0
        assert "nothing was ingested" in result.stderr

    def test_what_is_ingested_and_not_precomputed_is_the_default(self, settings: Settings, tmp_path: Path) -> None:
        from retriever.parse import from_text
        from retriever.retriever import Retriever

        embedder = HashEmbedder()
        with Retriever.open(settings.index_dir, embedder, lambda text: len(text.encode()), chunk_tokens=60) as index:
            index.ingest("default", [from_text(TEXT, document_id="oak")])
            index.create_collection("other")
            index.ingest("other", [from_text("Fenora painted the harbour in winter.", document_id="elm")])
        assert self.data()["chunks"] == 41
        assert self.data("--collection", "other")["chunks"] == 1
        assert "collection" in CliRunner().invoke(app, ["estimate", "--collection", "atlantis"]).stderr

    def test_addresses_are_the_engine_s(self, settings: Settings) -> None:
        """The service's own addresses, over the real tokenizer and fingerprints."""
        from blend.fingerprint import model_fingerprint, tokenizer_fingerprint

        with open_offline(settings) as offline:
            assert offline.keys.layout.model == model_fingerprint(settings.model)
            assert offline.keys.tokenizer == tokenizer_fingerprint(settings.model)
            assert offline.store is None

    def test_minutes_are_measured_or_not_given(self, settings: Settings, tmp_path: Path) -> None:
        assert self.data(tmp_path / "oak.txt")["minutes"] is None
        assert "not known" in CliRunner().invoke(app, ["estimate", str(tmp_path / "oak.txt")]).stdout
        measured = self.data(tmp_path / "oak.txt", "--measure")
        assert measured["minutes"] is not None
        assert measured["tokens_per_s"] > 0
        with open_offline(settings) as offline:
            layout = offline.keys.layout
        Rates(settings.data_dir).learn("transformers", layout, "cpu", 1000, 10.0)
        found = self.data(tmp_path / "oak.txt")
        assert found["tokens_per_s"] == 100
        assert found["minutes"] == pytest.approx(found["compile_tokens"] / 100 / 60)

    def test_files_and_a_collection_exclude_each_other(self, tmp_path: Path) -> None:
        result = CliRunner().invoke(app, ["estimate", str(tmp_path / "oak.txt"), "--collection", "default"])
        assert result.exit_code == 2
        assert "exclude each other" in result.stderr

    def test_a_file_that_cannot_be_read_is_passed_over(self, tmp_path: Path) -> None:
        (tmp_path / "bad.pdf").write_bytes(b"not a pdf")
        result = CliRunner().invoke(app, ["estimate", str(tmp_path / "bad.pdf"), str(tmp_path / "oak.txt"), "--json"])
        assert json.loads(result.stdout)["documents"] == 1
        assert "bad.pdf" in result.stderr


@pytest.mark.slow
def test_a_precompute_on_the_real_engine_is_what_was_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an engine, then with it: the same chunks, tokens and bytes; afterwards nothing is left to do."""
    for name, value in {"EMBEDDER": "hash", "PORT": "9", "ENGINE": "transformers", "CHUNK_TOKENS": "64",
                        "DATA_DIR": str(tmp_path / "data"), "MODEL": str(ROOT / "models/demo"),
                        "STORE__CODEC": "raw"}.items():  # fmt: skip
        monkeypatch.setenv(f"RAGBLEND_{name}", value)
    (tmp_path / "oak.txt").write_text(TEXT)

    def data(*args: str | Path) -> dict[str, Any]:
        result = CliRunner().invoke(app, [*(str(a) for a in args), "--json"])
        assert result.exit_code == 0, result.output
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    before = data("estimate", tmp_path / "oak.txt")
    assert before["minutes"] is None
    data("ingest", tmp_path / "oak.txt")
    stored = data("cache", "stats")
    listed = data("cache", "ls", "--limit", "0")["entries"]
    assert before["tokens"] == sum(e["tokens"] for e in listed)
    assert before["gib"] == pytest.approx(stored["bytes"] / 2**30)
    after = data("estimate")
    assert (after["precomputed"], after["tokens"]) == (after["chunks"], 0)
    assert after["minutes"] == 0  # and the speed is known now
    assert after["tokens_per_s"] > 0
    shutil.rmtree(tmp_path / "data" / "kv")
    assert data("estimate")["tokens"] == before["tokens"]


def test_a_rate_says_where_it_was_measured() -> None:
    rate = Rate.now("vllm", LAYOUT, "cpu", 100, 4.0)
    assert rate.tokens_per_s == 25
    assert "cores" in rate.machine
