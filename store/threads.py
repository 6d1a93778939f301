"""Threads that work behind somebody's back: where they run, and who comes first."""

from __future__ import annotations

import contextlib
import os
import threading

NICE = 10


def roam() -> None:
    """Let the calling thread run wherever any thread of this process may.

    A thread starts on the cores of the one that starts it. An OpenMP that binds its threads to cores binds its first
    one too, which is the caller of the store: what that starts would share its one core.
    """
    cores: set[int] = set()
    with contextlib.suppress(OSError):  # no /proc: there it starts
        for name in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                cores |= os.sched_getaffinity(int(name))
        os.sched_setaffinity(0, cores)


def yield_to_others() -> None:
    """``roam``, and run only when others leave room: a request is computing now."""
    roam()
    thread = threading.get_native_id()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread, max(NICE, os.getpriority(os.PRIO_PROCESS, thread)))
