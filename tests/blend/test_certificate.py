"""The file of a certificate: it says what was measured, or it is refused by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blend.certificate import Certificate, file_name, read, write
from blend.engines import EngineInfo
from blend.errors import CertificateError
from store.types import KVLayout
from tests.certificates import passing

LAYOUT = KVLayout("ab" * 32, 6, 2, 64, "float32", "cd" * 16)
INFO = EngineInfo("transformers", "5.19.0", "models/demo", "cpu", LAYOUT, "ef" * 32, 8192, 3200)
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "certificates" / file_name(LAYOUT)
    write(passing(INFO), path)
    return path


def reseal(path: Path, change: Change) -> None:
    """Edit the file and give it the digest of its new content, as a careful forger or another version would."""
    content = json.loads(path.read_text())
    del content["digest"]
    change(content)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content | {"digest": digest}))


def test_what_is_written_is_read_again(path: Path) -> None:
    found = read(path)
    assert found == passing(INFO)
    assert found.file == str(path)
    assert [p.name for p in path.parent.iterdir()] == [f"{'ab' * 8}-float32.json"]


def test_a_second_one_takes_the_place_of_the_first(path: Path) -> None:
    write(passing(INFO, ratio=0.05), path)
    assert read(path).ratio == 0.05


def test_one_that_cannot_be_written_says_where(tmp_path: Path) -> None:
    (tmp_path / "certificates").write_text("a file, not a folder")
    with pytest.raises(CertificateError, match=r"certificates/x\.json cannot be written"):
        write(passing(INFO), tmp_path / "certificates" / "x.json")


def test_every_cut_is_refused_by_name(path: Path) -> None:
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:size])
        with pytest.raises(CertificateError, match=rf"{path.name} is cut off or no JSON"):
            read(path)


@pytest.mark.parametrize(("old", "new"), [
    ('"ratio": 0.1,', '"ratio": 0.2,'),
    ('"passed": true', '"passed": false'),
    ('"agreement": 0.5', '"agreement": 0.9'),
    ('"selector": "auto"', '"selector": "none"'),
    (f'"{"ab" * 32}"', f'"{"ac" * 32}"'),
])  # fmt: skip
def test_a_file_edited_by_hand_is_refused(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(CertificateError, match=rf"{path.name} is refused: it was changed after it was written"):
        read(path)


@pytest.mark.parametrize(("change", "said"), [
    (lambda c: c.update(format=3), "format is 3, this version reads 2"),
    (lambda c: c.pop("format"), "format is None"),
    (lambda c: c.pop("model"), "model is missing"),
    (lambda c: c.update(note="x"), "note is unknown"),
    (lambda c: c.update(passed="yes"), "passed is 'yes', not a bool"),
    (lambda c: c.update(ratio=True), "ratio is True, not a float"),
    (lambda c: c.update(ratio=float("nan")), "ratio is nan, not a float"),
    (lambda c: c.update(ratio=1.5), "ratio is 1.5, not within 0..1"),
    (lambda c: c.update(checks={}), "checks is {}, not a list"),
    (lambda c: c["checks"].append(3), r"checks\[1\] is 3, not an object"),
    (lambda c: c["checks"][0].pop("limit"), r"checks\[0\].limit is missing"),
    (lambda c: c["ratios"][1].update(n=1.5), r"ratios\[1\].n is 1.5, not a int"),
    (lambda c: c["calibration"].update(seed="0"), "calibration.seed is '0', not a int"),
    (lambda c: c.update(selector="nonsense"), "selector 'nonsense' is unknown"),
    (lambda c: c.update(passed=False), "it was not passed and gives no reasons"),
])  # fmt: skip
def test_a_wrong_field_is_named(path: Path, change: Change, said: str) -> None:
    reseal(path, change)
    with pytest.raises(CertificateError, match=rf"{path.name} is refused: .*{said}"):
        read(path)


def test_a_list_is_no_certificate(path: Path) -> None:
    path.write_text("[1, 2]")
    with pytest.raises(CertificateError, match="holds a list, not an object"):
        read(path)


@pytest.mark.parametrize(("change", "said"), [
    ({"layout": replace(LAYOUT, model="12" * 32)}, f"model fingerprint {'ab' * 32}, this is {'12' * 32}"),
    ({"layout": replace(LAYOUT, dtype="bfloat16")}, "dtype float32, this is bfloat16"),
    ({"layout": replace(LAYOUT, rope="34" * 16)}, f"RoPE signature {'cd' * 16}, this is {'34' * 16}"),
    ({"layout": replace(LAYOUT, layers=7)}, "layout digest"),
    ({"tokenizer": "56" * 32}, f"tokenizer fingerprint {'ef' * 32}, this is {'56' * 32}"),
    ({"compile": "prefix"}, "compile context document, this is prefix"),
    ({"codec": "int4"}, "KV stored as raw, this is int4"),
    ({"codec": "auto"}, "KV stored as raw, this is auto"),
])  # fmt: skip
def test_a_certificate_of_something_else_names_both(path: Path, change: dict[str, Any], said: str) -> None:
    own: dict[str, Any] = {"layout": LAYOUT, "tokenizer": "ef" * 32, "compile": "document", "codec": "raw"}
    found = read(path)
    found.require(**own)
    with pytest.raises(CertificateError, match=rf"{path.name} is for {said}.*certify` again"):
        found.require(**own | change)


def test_another_engine_of_the_same_dtype_may_use_it(path: Path) -> None:
    """Engines agree token by token (invariant 10); what they must not differ in is checked, and the engine is not."""
    found: Certificate = read(path)
    assert found.engine == "transformers"
    found.require(replace(LAYOUT), "ef" * 32, "document", "raw")


def test_what_was_measured_through_a_lossy_codec_holds_without_it(path: Path) -> None:
    found = replace(read(path), codec="int4")
    found.require(LAYOUT, "ef" * 32, "document", "int4")
    found.require(LAYOUT, "ef" * 32, "document", "raw")
    with pytest.raises(CertificateError, match="KV stored as int4, this is int8"):
        found.require(LAYOUT, "ef" * 32, "document", "int8")
