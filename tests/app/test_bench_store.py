"""The benchmark of the store times only what delivered the right bytes, from where it says it did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from app.bench import delivery
from app.bench.delivery import StoreSetup
from app.bench.pagecache import drop_page_cache, resident
from app.bench.shot import BenchError
from app.bench.store import measure_codecs, run_store
from app.cli.root import app
from store.codec import CODECS, Bytes
from store.codec.raw import Raw
from store.held import HeldFound
from store.ssd.found import SsdFound

SMALL = StoreSetup(mib=4, layers=4, heads=2, head_dim=64, chunk=256, codecs=("raw", "int8"), repeats=2)
OPTIONS = "--mib 2 --layers 4 --heads 2 --head-dim 64 --chunk 256 --codec raw --threads 1 --repeats 1".split()


def arms_of(report: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [arm for arm in report["arms"] if arm["name"] == name]


def can_be_cold(folder: Path) -> bool:
    """Whether the kernel can be made to forget a file there (not on tmpfs)."""
    path = folder / "probe"
    path.write_bytes(bytes(1 << 20))
    drop_page_cache(folder)
    cold = resident(path) == 0.0
    path.unlink()
    return cold


def test_every_arm_is_checked_and_set_beside_its_reference(tmp_path: Path) -> None:
    cold = can_be_cold(tmp_path)
    said: list[str] = []
    report = run_store(SMALL, tmp_path, progress=said.append)
    assert (report["bytes"], report["chunks"], report["plane_bytes"]) == (4 << 20, 8, 128 << 10)
    labels = [(arm["name"], arm["state"], arm["threads"]) for arm in report["arms"]]
    states: list[tuple[str, str | None]] = [("plain", "cold"), ("ssd", "cold"), ("plain", "warm"), ("ssd", "warm")]
    states += [("memcpy", "chunks"), ("memcpy", "pieces"), ("memcpy", "whole"), ("ram", None)]
    assert labels == [(name, state, threads) for threads in (1, 2) for name, state in states]
    for arm in report["arms"]:
        if arm["state"] == "cold" and not cold:
            continue
        assert arm["outputs_checked"] and arm["problem"] is None
        assert 0 < arm["p10_gb_s"] <= arm["median_gb_s"] <= arm["p90_gb_s"]
        tier = arm["name"] in ("ssd", "ram")
        assert (arm["of_reference"] is not None) == (arm["of_reference_cpu"] is not None) == tier
        assert arm["target"] == (0.8 if tier else None)
    copies = report["copies"]
    assert (copies["ssd"], copies["ram"], copies["ram int8"]) == (1.0, 1.0, 1.0)
    assert 1.4 < copies["ssd int8"] < 1.6  # half as many bytes read, then decoded
    assert len(said) == 16 * 3
    json.dumps(report)


@pytest.mark.parametrize(("found", "name"), [(SsdFound, "ssd"), (HeldFound, "ram")])
@pytest.mark.parametrize("fault", ["a bit", "nothing at all", "the wrong layer"])
def test_an_arm_that_delivers_anything_else_gets_no_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: type, name: str, fault: str
) -> None:
    read = found.read  # type: ignore[attr-defined]

    def wrong(self: Any, layer: int, k: Tensor, v: Tensor) -> None:
        if fault != "nothing at all":
            read(self, (layer + 1) % 4 if fault == "the wrong layer" else layer, k, v)
        if fault == "a bit":
            v.view(torch.int16)[-1, -1, -1] ^= 1

    monkeypatch.setattr(found, "read", wrong)
    report = run_store(SMALL, tmp_path)
    for arm in arms_of(report, name):
        assert not arm["outputs_checked"] and arm["median_gb_s"] is None and arm["of_reference"] is None
        assert "K and V" in arm["problem"] or arm["state"] == "cold"
    for arm in (*arms_of(report, "memcpy"), *arms_of(report, "ram" if name == "ssd" else "ssd")):
        assert arm["outputs_checked"] or arm["state"] == "cold"


def test_cold_is_not_believed_but_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "drop_page_cache", lambda folder: None)
    report = run_store(SMALL, tmp_path)
    for arm in report["arms"]:
        assert arm["outputs_checked"] == (arm["state"] != "cold")
        assert arm["state"] != "cold" or "page cache" in arm["problem"]
    assert all(arm["of_reference"] for arm in arms_of(report, "ssd") if arm["state"] == "warm")


def test_the_page_cache_is_asked(tmp_path: Path) -> None:
    if not can_be_cold(tmp_path):
        pytest.skip("the kernel cannot be made to forget files here (tmpfs?)")
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(1).bytes(8 << 20))
    path.read_bytes()
    assert resident(path) == 1.0
    drop_page_cache(tmp_path)
    assert resident(path) == 0.0


def test_a_codec_is_measured_on_what_it_gives_back() -> None:
    raw, int8 = measure_codecs(SMALL)
    assert (raw["codec"], raw["lossless"], raw["error"], raw["times_smaller"]) == ("raw", True, 0.0, 1.0)
    assert not int8["lossless"] and 0 < int8["error"] < 0.02 and 1.8 < int8["times_smaller"] < 2.0
    assert int8["bits_per_value"] == pytest.approx(16 / int8["times_smaller"])
    assert all(codec["encode_gb_s"] > 0 and codec["decode_gb_s"] > 0 for codec in (raw, int8))


class Broken(Raw):
    """Says it is lossless, and loses; or gives something else each time."""

    name = "broken"

    def __init__(self, how: str) -> None:
        self.how, self.calls = how, 0

    def decode(self, plane: Bytes, k: Tensor, v: Tensor) -> None:
        super().decode(plane, k, v)
        self.calls += 1
        if self.how == "loses":
            v.mul_(1.01)
        elif self.how == "garbage":
            v.fill_(9.0)
        else:
            v[0] += self.calls


@pytest.mark.parametrize(("how", "said"), [("loses", "off by"), ("garbage", "off by"), ("wavers", "different")])
def test_a_codec_that_decodes_wrongly_is_not_timed(monkeypatch: pytest.MonkeyPatch, how: str, said: str) -> None:
    assert isinstance(CODECS, dict)
    monkeypatch.setitem(CODECS, "broken", Broken(how))
    with pytest.raises(BenchError, match=said):
        measure_codecs(StoreSetup(mib=1, chunk=16, codecs=("broken",)))


@pytest.mark.parametrize(
    ("field", "value"), [("mib", 0), ("layers", -1), ("threads", (0,)), ("threads", ()), ("codecs", ("zip",))]
)
def test_a_senseless_setup_is_refused(field: str, value: Any) -> None:
    with pytest.raises(BenchError):
        StoreSetup(**{field: value})


def test_chunks_that_lie_in_the_index_are_not_called_segments(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="larger --chunk"):
        run_store(StoreSetup(mib=1, layers=1, heads=1, head_dim=8, chunk=16), tmp_path)


def test_the_command_prints_data_or_a_table(tmp_path: Path) -> None:
    cold = can_be_cold(tmp_path)
    result = CliRunner().invoke(app, ["bench", "store", *OPTIONS, "--folder", str(tmp_path), "--json"])
    assert result.exit_code == (0 if cold else 1), result.output
    data = json.loads(result.stdout)
    assert data["setup"]["layers"] == 4 and data["machine"]["cores"] and len(data["arms"]) == 8
    result = CliRunner().invoke(app, ["bench", "store", *OPTIONS, "--folder", str(tmp_path)])
    assert (
        "| ram |" in result.stdout and "| ssd cold |" in result.stdout and "Bytes moved for each byte" in result.stdout
    )
    assert list(tmp_path.iterdir()) == []


def test_the_command_fails_when_something_was_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SsdFound, "read", lambda self, layer, k, v: None)
    result = CliRunner().invoke(app, ["bench", "store", *OPTIONS, "--folder", str(tmp_path)])
    assert result.exit_code == 1 and "no figures for ssd warm" in result.stderr
