"""How fast the store delivers, beside what the machine can do at all: plain reads of the same file, memcpy.

One piece of memory is the destination of everything: the staging K and V [L, N, H, D] that chunks are read into layer
by layer, and what plain reads and copies fill. Arms are interleaved in random order; before each run the destination is
poisoned, after it the bytes are compared with what was stored: an arm that delivered anything else gets no figures.

- ``ssd``: chunks found and read one after the other, as they lie on the device, the next one advised; beside ``preadv``
  of the same segment files in blocks of 8 MiB. ``cold``: after fdatasync and POSIX_FADV_DONTNEED, and only if the
  kernel then has none of it (RWF_NOWAIT); ``warm``: everything is in the page cache.
- ``ram``: the same chunks from the memory tier; beside memcpy (numpy) of pieces as large as a chunk. Copying K and V
  of each layer to the very places where a chunk's go (``pieces``), and all in one call (``whole``), is timed as well.
- ``codecs``: planes encoded and decoded, on one thread.
- ``copies``: bytes moved by the processor for each byte delivered: counted at the system calls, and by the memory that
  a read allocates.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.bench.copies import count_copies
from app.bench.delivery import BLOCK, Delivery, StoreArm, StoreSetup
from app.bench.shot import BenchError
from store.codec import open_codec

TARGET = 0.8


def run_store(setup: StoreSetup, folder: Path, *, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """The report, with a store in ``folder``, which must be empty and on the device to be measured::

        {"bytes", "chunks", "chunk_bytes", "plane_bytes", "block_bytes", "cold",
         "arms": [{"name", "state", "threads", "median_gb_s", "p10_gb_s", "p90_gb_s", "reference", "of_reference",
                   "of_reference_cpu", "target", "outputs_checked", "problem"}],
         "codecs": [{"codec", "lossless", "times_smaller", "bits_per_value", "encode_gb_s", "decode_gb_s", "error"}],
         "copies": {"ssd", "ram", "ssd CODEC", "ram CODEC"}, "data"}

    GB are 1e9 bytes of raw KV (of plain reads: of the file). ``of_reference`` is the median, over repeats, of the
    arm's speed over its reference's in the same repeat; ``of_reference_cpu`` the same by seconds of processor time:
    other processes on the machine disturb it less. None for references and for arms with a problem.
    """
    bench = Delivery(setup, folder)
    try:
        arms = bench.arms()
        rng = random.Random(setup.seed)
        for repeat in range(setup.repeats + 1):  # the first one warms up
            for arm in rng.sample(arms, len(arms)):
                bench.time(arm, keep=repeat > 0)
                progress(f"{arm.label}: {arm.problem or f'{arm.seconds[-1] if arm.seconds else 0:.3f} s'}")
        sizes = {arm.label: bench.file_bytes if arm.name == "plain" else bench.total for arm in arms}
        copies = count_copies(bench)
    finally:
        bench.close()
    return {
        "bytes": bench.total,
        "chunks": setup.chunks,
        "chunk_bytes": bench.total // setup.chunks,
        "plane_bytes": bench.total // setup.chunks // setup.layers,
        "block_bytes": BLOCK,
        "cold": "fdatasync, then POSIX_FADV_DONTNEED; checked with RWF_NOWAIT",
        "arms": [_report(arm, arms, sizes) for arm in arms],
        "codecs": measure_codecs(setup),
        "copies": copies,
        "data": "tiers: random bytes; codecs: normal values, K's channels of different scale (log-normal)",
    }


def measure_codecs(setup: StoreSetup) -> list[dict[str, Any]]:
    """``measure_codec`` of each, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [measure_codec(name, setup) for name in setup.codecs]
    finally:
        torch.set_num_threads(threads)


def measure_codec(name: str, setup: StoreSetup) -> dict[str, Any]:
    """Size and speed of one codec, on up to 4 layers of a chunk. ``error`` is the root mean square of what it changes,
    relative to the values'. Raises ``BenchError`` if it does not decode to the same values twice, or is off by half."""
    codec, layout = open_codec(name), setup.layout
    layers = min(4, setup.layers)
    generator = torch.Generator().manual_seed(setup.seed)
    shape = (layers, setup.chunk, setup.heads, setup.head_dim)
    k, v = (torch.randn(shape, generator=generator) for _ in range(2))
    k *= torch.randn((1, 1, *shape[2:]), generator=generator).exp()
    k, v = k.to(layout.torch_dtype), v.to(layout.torch_dtype)
    raw = k.nbytes + v.nbytes
    out, again = (torch.full_like(torch.stack((k, v)), float("nan")) for _ in range(2))
    encode_s: list[float] = []
    decode_s: list[float] = []
    for repeat in range(setup.repeats + 1):
        target = again if repeat else out
        begin = time.perf_counter()
        planes = [codec.encode(k[i], v[i], depth=i / max(1, layers - 1)) for i in range(layers)]
        middle = time.perf_counter()
        for i, plane in enumerate(planes):
            codec.decode(plane, target[0, i], target[1, i])
        end = time.perf_counter()
        if repeat:
            encode_s.append(middle - begin)
            decode_s.append(end - middle)
    if not torch.equal(out, again):
        raise BenchError(f"{name} decoded the same values to two different results")
    wanted = torch.stack((k, v)).double()
    error = ((out.double() - wanted).square().mean() / wanted.square().mean()).sqrt().item()
    if not error < 0.5 or (codec.lossless and error):
        raise BenchError(f"{name} is off by {error:.3g} of the values")
    size = sum(plane.size for plane in planes)
    return {
        "codec": name,
        "lossless": codec.lossless,
        "times_smaller": raw / size,
        "bits_per_value": 8 * size / (k.numel() + v.numel()),
        "encode_gb_s": raw / float(np.median(encode_s)) / 1e9,
        "decode_gb_s": raw / float(np.median(decode_s)) / 1e9,
        "error": error,
    }


def _report(arm: StoreArm, arms: Sequence[StoreArm], sizes: dict[str, int]) -> dict[str, Any]:
    ok = arm.problem is None and bool(arm.seconds)
    mine = np.divide(sizes[arm.label] / 1e9, arm.seconds)
    reference = next((other for other in arms if other.label == arm.reference), None)
    ratios: dict[str, float | None] = {"of_reference": None, "of_reference_cpu": None}
    if ok and reference is not None and reference.problem is None:
        larger = sizes[arm.label] / sizes[reference.label]
        ratios["of_reference"] = larger * float(np.median(np.divide(reference.seconds, arm.seconds)))
        ratios["of_reference_cpu"] = larger * float(np.median(np.divide(reference.cpu_seconds, arm.cpu_seconds)))
    p10, median, p90 = np.quantile(mine, [0.1, 0.5, 0.9]).tolist() if ok else (None, None, None)
    return {
        "name": arm.name,
        "state": arm.state or None,
        "threads": arm.threads,
        "median_gb_s": median,
        "p10_gb_s": p10,
        "p90_gb_s": p90,
        "reference": arm.reference or None,
        **ratios,
        "target": TARGET if arm.reference else None,
        "outputs_checked": ok,
        "problem": arm.problem,
    }
