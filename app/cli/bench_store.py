"""``ragblend bench store``: how fast chunks come from the device and from memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.options import Json
from app.cli.output import Meter, human, note, print_json, print_table, say


def store(
    mib: Annotated[int, typer.Option("--mib", help="MiB of raw KV; memory needed is five times that.")] = 512,
    layers: Annotated[int, typer.Option("--layers", help="Layers of the model.")] = 32,
    heads: Annotated[int, typer.Option("--heads", help="Key-value heads.")] = 8,
    head_dim: Annotated[int, typer.Option("--head-dim", help="Dimension of a head.")] = 128,
    chunk: Annotated[int, typer.Option("--chunk", help="Tokens of each chunk.")] = 512,
    codec: Annotated[list[str] | None, typer.Option("--codec", help="Codecs to time.  [default: all]")] = None,
    threads: Annotated[list[int] | None, typer.Option("--threads", help="Reader threads.  [default: 1, 2]")] = None,
    repeats: Annotated[int, typer.Option("--repeats", help="Timed runs of each arm.")] = 7,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the data and of the order of arms.")] = 0,
    folder: Annotated[
        Path | None,
        typer.Option("--folder", help="Where a temporary store is made: on the device to be measured.", exists=True),
    ] = None,
    as_json: Json = False,
) -> None:
    """Chunk reads from the SSD tier beside plain 8 MiB reads of the same file, cold and warm, the memory tier beside
    memcpy, every codec, and copies per byte. One run, interleaved, every byte checked; wrong bytes get no figures.
    """
    from app.bench.delivery import StoreSetup
    from app.bench.machine import describe_machine
    from app.bench.store import run_store
    from store.codec import CODECS

    setup = StoreSetup(
        mib, layers, heads, head_dim, chunk, tuple(codec or CODECS), tuple(threads or (1, 2)), repeats, seed
    )
    steps = 8 * len(setup.threads) * (repeats + 1)
    with tempfile.TemporaryDirectory(prefix="ragblend-bench-", dir=folder) as place, Meter("bench", steps) as meter:
        report = run_store(setup, Path(place), progress=lambda text: meter(text))
    for arm in report["arms"]:
        if arm["problem"]:
            note(f"no figures for {_name(arm)}: {arm['problem']}")
    if as_json:
        print_json({**report, "setup": vars(setup), "machine": describe_machine()})
    else:
        _print(report)
    if any(arm["problem"] for arm in report["arms"]):
        raise typer.Exit(1)


def _print(report: dict[str, Any]) -> None:
    shape = f"{report['chunks']} chunks of {human(report['chunk_bytes'])}, planes of {human(report['plane_bytes'])}"
    columns = ["arm", "threads", "GB/s", "p10", "p90", "beside", "of it", "by CPU time", "target"]
    rows = [
        [
            _name(arm),
            arm["threads"],
            *(_digits(arm[f"{q}_gb_s"]) for q in ("median", "p10", "p90")),
            (arm["reference"] or "").rpartition("/")[0],
            _digits(arm["of_reference"]),
            _digits(arm["of_reference_cpu"]),
            arm["target"],
        ]
        for arm in report["arms"]
    ]
    print_table(f"Delivering {human(report['bytes'])}: {shape}", columns, rows)
    say()
    columns = ["codec", "times smaller", "bits a value", "encode GB/s", "decode GB/s", "error"]
    fields = ("times_smaller", "bits_per_value", "encode_gb_s", "decode_gb_s", "error")
    rows = [[codec["codec"], *(_digits(codec[name]) for name in fields)] for codec in report["codecs"]]
    print_table("Codecs, one thread, GB of raw KV", columns, rows)
    say()
    copies = ", ".join(f"{path} {count:g}" for path, count in report["copies"].items())
    say(f"Bytes moved for each byte delivered: {copies} (ssd: from the page cache)")
    say(f"Cold: {report['cold']}. Data: {report['data']}.")


def _name(arm: dict[str, Any]) -> str:
    return f"{arm['name']} {arm['state']}" if arm["state"] else str(arm["name"])


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
