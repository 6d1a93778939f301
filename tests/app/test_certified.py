"""``auto`` goes by the certificate that is found; the commands write one and show it."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import blend.load
import blend.method
from app.certify.lookup import find_all, in_data, in_model, lookup
from app.cli import app
from app.trivial import LAYOUT, TrivialEngine
from blend.certificate import read, write
from blend.errors import CertificateError
from blend.fingerprint import model_fingerprint, tokenizer_fingerprint
from kernels.rotate import angles
from store.memory import MemoryStore
from tests.app.conftest import Kit, OpenKit
from tests.certificates import passing

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"


# What auto goes by --------------------------------------------------------------------------------------------------


async def blended(kit: Kit, **asked: Any) -> dict[str, Any]:
    answer = await kit.chat(rag={"blend": asked})
    assert answer.status_code == 200, answer.text
    cache: dict[str, Any] = answer.json()["rag"]["cache"]
    return cache


async def test_an_uncertified_model_serves_full_prefill_and_says_so(
    open_kit: OpenKit, caplog: pytest.LogCaptureFixture
) -> None:
    kit = await open_kit(certified=False)
    assert "the model is not certified" in caplog.text
    assert "ragblend certify --model trivial" in caplog.text
    assert (await kit.ingest())["state"] == "precomputed"
    found = await blended(kit)
    assert (found["mode"], found["why"]) == ("full", "model is not certified; run `ragblend certify`")
    assert (await blended(kit, mode="blend", recompute_ratio=0.2))["mode"] == "blend"
    assert (await blended(kit, mode="reuse"))["mode"] == "reuse"
    assert (await kit.client.get("/readyz")).json()["certificate"] == {"passed": False}


async def test_auto_is_what_the_certificate_on_disk_says(
    open_kit: OpenKit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kit = await open_kit()
    made = passing(kit.engine.info, selector="question(layers=upper)", ratio=0.25)
    write(made, in_data(tmp_path, LAYOUT))
    caplog.set_level(logging.INFO)
    kit = await open_kit(certified=False)
    assert "certified: auto blends with question(layers=upper) at ratio 0.25" in caplog.text
    await kit.ingest()
    found = await blended(kit)
    assert (found["mode"], found["why"], found["selector"]) == ("blend", None, "question(layers=upper)")
    assert found["recomputed"] == pytest.approx(0.25 * found["tokens"], abs=2)
    assert (await blended(kit, recompute_ratio=0.0))["recomputed"] == 0
    assert (await blended(kit, selector="heads"))["selector"] == "heads"
    shown = (await kit.client.get("/readyz")).json()["certificate"]
    assert (shown["passed"], shown["selector"], shown["ratio"]) == (True, "question(layers=upper)", 0.25)


async def test_a_setting_goes_before_the_certificate(open_kit: OpenKit, tmp_path: Path) -> None:
    kit = await open_kit()
    write(passing(kit.engine.info, ratio=0.25), in_data(tmp_path, LAYOUT))
    kit = await open_kit(certified=False, blend={"recompute_ratio": 0.0})
    await kit.ingest()
    assert (await blended(kit))["recomputed"] == 0


@pytest.mark.parametrize(("change", "said"), [
    ({"model": "f" * 64}, f"model fingerprint {'f' * 64}, this is {LAYOUT.model}"),
    ({"dtype": "bfloat16"}, "dtype bfloat16, this is float32"),
    ({"compile": "prefix"}, "compile context prefix, this is document"),
])  # fmt: skip
async def test_a_stale_certificate_counts_as_none_and_names_both(
    open_kit: OpenKit, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, Any], said: str
) -> None:
    kit = await open_kit()
    path = in_data(tmp_path, LAYOUT)
    write(passing(kit.engine.info, **change), path)
    kit = await open_kit(certified=False)
    assert said in caplog.text
    assert str(path) in caplog.text
    await kit.ingest()
    found = await blended(kit)
    assert found["mode"] == "full"
    assert str(tmp_path) not in json.dumps(found)


async def test_a_tampered_certificate_counts_as_none_and_is_named(
    open_kit: OpenKit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kit = await open_kit()
    path = in_data(tmp_path, LAYOUT)
    write(passing(kit.engine.info, passed=False, reasons=("agreement is 0.50",)), path)
    path.write_text(path.read_text().replace('"passed": false', '"passed": true'))
    kit = await open_kit(certified=False)
    assert f"{path} is refused: it was changed" in caplog.text
    await kit.ingest()
    assert (await blended(kit))["mode"] == "full"


async def test_a_certificate_that_was_not_passed_says_why_in_every_answer(open_kit: OpenKit, tmp_path: Path) -> None:
    kit = await open_kit()
    write(passing(kit.engine.info, passed=False, reasons=("agreement is 0.50",)), in_data(tmp_path, LAYOUT))
    kit = await open_kit(certified=False)
    await kit.ingest()
    found = await blended(kit)
    assert (found["mode"], found["why"]) == ("full", "model is not certified; agreement is 0.50")


def test_what_was_measured_here_goes_before_what_came_with_the_model(tmp_path: Path, caplog: Any) -> None:
    model, data = tmp_path / "model", tmp_path / "data"
    model.mkdir()
    info = replace(TrivialEngine(MemoryStore()).info, model=str(model))

    def find() -> Any:
        return lookup(data, info.model, info.layout, info.tokenizer, "document", "raw")

    assert find() is None
    write(passing(info, ratio=0.05), in_model(str(model), "float32"))
    assert find().ratio == 0.05
    write(passing(info, passed=False, reasons=("it disagrees on this machine",)), in_data(data, info.layout))
    assert not find().passed
    in_data(data, info.layout).write_text("{")
    with pytest.raises(CertificateError, match="cut off"):
        find()


# Commands -----------------------------------------------------------------------------------------------------------


def run(*args: str | Path) -> Any:
    return CliRunner().invoke(app, [str(a) for a in args])


def test_the_demo_ships_certified() -> None:
    """For vLLM on a CPU (bfloat16) and for the transformers engine (float32): `make certify`."""
    found = find_all(Path("/nowhere"), str(DEMO), "document", "raw", None)
    for dtype in ("float32", "bfloat16"):
        one = found.get(dtype)
        assert not isinstance(one, CertificateError), one
        assert one is not None and one.passed, f"{DEMO} is not certified for {dtype}; run `make certify`"
        assert one.ratio <= 0.10, one.ratio
        assert one.floor >= 0.97


def test_the_fingerprint_does_not_cover_the_certificate(tmp_path: Path) -> None:
    model = shutil.copytree(DEMO, tmp_path / "model")
    before = model_fingerprint(model), tokenizer_fingerprint(model)
    in_model(str(model), "float32").write_text("anything")
    assert (model_fingerprint(model), tokenizer_fingerprint(model)) == before


def test_a_broken_engine_fails_the_command_and_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blend.load, "angles", lambda delta, *how: angles(-delta, *how))
    result = run("certify", "--model", DEMO, "--engine", "transformers", "--data-dir", tmp_path)
    assert result.exit_code == 1, result.output
    assert "| rotation | NO |" in result.stdout
    assert "not passed: check rotation failed: " in result.stdout
    layout = replace(LAYOUT, model=model_fingerprint(DEMO))
    assert not read(in_data(tmp_path, layout)).passed
    doctor = run("doctor", "--model", DEMO, "--data-dir", tmp_path, "--engine", "transformers")
    assert "not passed: check rotation failed" in doctor.stdout
    assert f"ragblend certify --model {DEMO} --dtype float32" in doctor.stdout


@pytest.mark.slow
def test_the_command_certifies_and_the_doctor_shows_it(tmp_path: Path) -> None:
    model = shutil.copytree(DEMO, tmp_path / "model", ignore=shutil.ignore_patterns("ragblend-certificate*"))
    doctor = ("doctor", "--model", model, "--data-dir", tmp_path, "--json")

    def shown() -> list[Any]:
        return [c for c in json.loads(run(*doctor).stdout)["checks"] if c["name"] == "certificate"]

    assert [(c["state"], c["advice"]) for c in shown()] == [("warn", f"ragblend certify --model {model}")]
    small = ("--questions", "4", "--documents", "3", "--data-dir", tmp_path, "--into-model", "--json")
    result = run("certify", "--model", model, "--engine", "transformers", "--floor", "0.8", *small)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["passed"] is True
    assert [Path(p).parent for p in printed["files"]] == [tmp_path / "certificates", model]
    assert "certify 32/32" in result.stderr  # four checks and 4 questions of 7 tasks
    assert [c["state"] for c in shown()] == ["ok"]
    assert "float32: auto blends with" in shown()[0]["detail"]
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"initializer_range": 0.5}))  # another revision
    found = shown()
    assert [c["state"] for c in found] == ["warn"]
    assert model_fingerprint(model) in found[0]["detail"]
    assert printed["model"] in found[0]["detail"]


def test_bad_options_show_their_value(tmp_path: Path) -> None:
    for args, said in (
        (("--compile", "sideways"), "sideways"),
        (("--floor", "1.5"), "1.5"),
        (("--questions", "1"), "1"),
        (("--dtype", "int8"), "int8"),
        (("--seed", "-1"), "-1"),
        (("--data", tmp_path / "none.jsonl"), "none.jsonl"),
        (("--model", tmp_path), str(tmp_path)),
    ):
        result = run("certify", "--data-dir", tmp_path, *args)
        assert result.exit_code in (1, 2), args
        assert said in result.output, args
        assert "Traceback" not in result.output
    assert not (tmp_path / "certificates").exists()
