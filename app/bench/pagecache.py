"""What the kernel remembers of files, forgotten: reads after it come from the device."""

from __future__ import annotations

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
