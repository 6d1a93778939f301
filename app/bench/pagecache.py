"""What the kernel remembers of files, forgotten: reads after it come from the device."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def drop_page_cache(folder: Path) -> None:
    """Write back and drop the cached pages of every file below ``folder`` (POSIX_FADV_DONTNEED; pages that a process
    has mapped stay, so LMDB's index does)."""
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)  # dirty pages cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def resident(path: Path, samples: int = 64) -> float:
    """Part of a file that is in the page cache, by sample; 1.0 where the kernel does not say (tmpfs is all cache)."""
    size = path.stat().st_size
    descriptor = os.open(path, os.O_RDONLY)
    there = 0
    try:
        # Read backwards: asking must not start the kernel's readahead of what is asked next.
        for i in reversed(range(samples)):
            try:
                there += os.preadv(descriptor, [bytearray(1)], size * i // samples, os.RWF_NOWAIT)
            except OSError as error:
                if error.errno != errno.EAGAIN:
                    return 1.0
    finally:
        os.close(descriptor)
    return there / samples
